"""Every recipe in configs/ is valid, says how to run it, and trains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from toy import pairs, rows, write_base, write_rows

from lora_cli import adapters, chain, objectives, pipeline
from lora_cli.recipe.chain import Chain, load
from lora_cli.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPES = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.parent.name != "constitutions"]
CHAINS = [path for path in RECIPES if isinstance(load(path), Chain)]
"""Recipes of several objectives."""
CONFIGS = [path for path in RECIPES if path not in CHAINS and load_recipe(path).constitution is None]
"""Recipes that are trained; the others make rows, see tests/stages/test_constitution.py."""


def test_every_method_has_a_recipe() -> None:
    """Each adapter method is shown by at least one recipe."""
    assert {load_recipe(path).adapter.method for path in CONFIGS} == set(adapters.names())


def test_every_objective_has_a_recipe() -> None:
    """Each objective is shown by at least one recipe."""
    assert {load_recipe(path).objective.name for path in CONFIGS} == set(objectives.names())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_the_header_says_how_to_run_it(path: Path) -> None:
    """A recipe opens with a comment that holds the exact command, when to choose it, memory and expected result."""
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    command = "lora-train" if path in CONFIGS + CHAINS else "lora constitution make"
    assert f"{command} {path.relative_to(ROOT)}" in header
    for word in ("Choose it", "emory", "Expect"):
        assert word in header, word


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_it_trains(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe runs to the end on a small base and rows of its own columns, changed only in base, data and length."""
    torch.set_num_threads(1)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    base = write_base(tmp_path / "base")
    recipe = load_recipe(path)
    overrides = [
        f"model.base={base}",
        "train.max_steps=2",
        "data.max_length=512",
        f"run.output={tmp_path / 'run'}",
    ]
    if not Path(str(recipe.data.train)).exists():
        named = (
            re.findall(r"{(\w+)}", recipe.data.fields.prompt + recipe.data.fields.completion)
            if recipe.data.fields
            else []
        )
        columns = named or ["instruction", "output"]
        content = [dict(zip(columns, row.values(), strict=True)) for row in rows(40)]
        if recipe.objective.name != "sft":
            content = pairs(40)
        data = write_rows(tmp_path / "rows.jsonl", content)
        overrides += [f"data.train={data}"] + ([f"data.eval={data}"] if recipe.data.eval else [])
    else:
        overrides += ["data.max_train_rows=64", "data.max_eval_rows=8"]
    summary = pipeline.train(load_recipe(path, overrides))
    assert summary["status"] == "done"
    assert summary["steps"] == 2


@pytest.mark.parametrize("path", CHAINS, ids=lambda path: path.name)
def test_every_stage_of_it_trains(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All stages run to the end on a small base, on few rows of the files that they name, for two steps each."""
    torch.set_num_threads(1)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    named = load(path)
    assert isinstance(named, Chain)
    overrides = [f"model.base={write_base(tmp_path / 'base')}", f"run.output={tmp_path / 'run'}"]
    overrides += [f"data.{key}" for key in ("max_length=512", "max_train_rows=64", "max_eval_rows=8")]
    for index, stage in enumerate(named.stages):
        if stage.recipe.constitution is None:
            overrides.append(f"objective.{index}.train.max_steps=2")
    stages = load(path, overrides)
    assert isinstance(stages, Chain)
    assert chain.train(stages)["status"] == "done"
