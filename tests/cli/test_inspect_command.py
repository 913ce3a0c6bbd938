"""`lora inspect` from end to end: runs of every method, adapters, models, what it prints, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from command_line import ROOT, run_here
from lora_variants import stir
from toy import lora, write_base, write_recipe
from transformers import AutoModelForCausalLM

from lora_cli import adapters, pipeline, without_training
from lora_cli.cli import inspect_table
from lora_cli.recipe.load import load_recipe
from lora_cli.stages import _inspection
from lora_cli.stages._inspection import Module, Spectrum

BLOCKS: dict[str, dict[str, Any]] = {
    "vera": {"rank": 8},
    "full": {},
    "adalora": {"initial_rank": 4, "target_rank": 3},
    "relora": {"rank": 2, "restart_every": 2},
}
"""The block of a method; of those not named here it is rank 4."""
PAGE = {
    "target",
    "base",
    "quantize",
    "method",
    "parameters",
    "modules",
    "whole",
    "unchanged",
    "kinds",
    "layers",
}
MODULE = {
    "path", "kind", "layer", "out_features", "in_features", "parameters", "rank", "alpha", "initial_rank",
    "update_rank",
    "weight_norm", "update_norm", "relative_change", "update", "low_rank", "verdict", "suggested_rank",
}  # fmt: skip
KIND = {
    "kind", "modules", "shape", "parameters", "update_rank", "relative_change", "share", "rank_99", "effective_rank",
    "profile", "verdicts", "verdict", "suggested_rank",
}  # fmt: skip


def train(folder: Path, base: Path, method: str, **changes: Any) -> Path:
    """Train a toy run of a method for four steps and return its folder."""
    block = {"method": method, **BLOCKS.get(method, {"rank": 4})}
    path = write_recipe(folder, base, adapter=block, train__max_steps=4, **changes)
    pipeline.train(load_recipe(path))
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """Return a LoRA run with both exports, which no test changes."""
    folder = tmp_path_factory.mktemp("lora")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_CLI_CACHE", str(folder / "cache"))
        return train(folder, base, "lora", export__formats=["peft", "merged"])


def found_in(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Return the object that `lora inspect ... --json` prints."""
    result = run_here(capsys, "lora", "inspect", *arguments, "--json")
    assert result.code == 0, result.errors
    return json.loads(result.output)


@pytest.mark.parametrize("method", adapters.names())
def test_a_run_of_every_method_can_be_inspected(
    tmp_path: Path,
    base: Path,
    method: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The object has its keys whatever the method; every adapted module moved; the table is there and is narrow."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    folder = train(tmp_path, base, method)
    found = found_in(capsys, str(folder))
    assert found.keys() == PAGE | {"suggestion"}
    assert (found["method"], found["base"]) == (method, str(base))
    assert found["quantize"] == ("nf4" if method == "qlora" else "none")
    assert len(found["modules"]) == 14
    for module in found["modules"]:
        assert module.keys() == MODULE
        assert 0 < module["relative_change"] < 1
        values = module["update"]["singular_values"]
        assert values == sorted(values, reverse=True)
        assert 1 <= module["update"]["effective_rank"] <= len(values)
    assert all(kind.keys() == KIND for kind in found["kinds"])
    assert [layer["layer"] for layer in found["layers"]] == [0, 1]
    summary = json.loads((folder / "summary.json").read_text())
    # Of ReLoRA one cycle is counted; AdaLoRA prunes what was trained; full leaves unchanged tensors out.
    if method not in ("adalora", "full"):
        assert found["parameters"] == summary["trainable_parameters"]
    ranks = {module["rank"] for module in found["modules"]}
    if method == "relora":
        assert (ranks, {module["update_rank"] for module in found["modules"]}) == ({2}, {4})
    if method == "adalora":
        assert {module["initial_rank"] for module in found["modules"]} == {4}
    for option in ([], ["--all"]):
        result = run_here(capsys, "lora", "inspect", str(folder), *option)
        assert (result.code, result.errors) == (0, "")
        assert max(map(len, result.output.splitlines()[1:])) <= inspect_table.WIDTH


def test_json_is_all_that_is_on_stdout(run: Path) -> None:
    """A process of its own prints one JSON object on stdout, and what else it says on stderr."""
    result = lora("inspect", run, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["method"] == "lora"
    assert "inspecting" in result.stderr


def test_an_adapter_or_a_merged_model_tells_the_same_as_its_run(
    run: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter alone has the same numbers; the merged weights have the same largest singular values to 1e-4."""
    whole = found_in(capsys, str(run))
    alone = found_in(capsys, str(run / "adapter"), f"model.base={base}", "model.dtype=float32")
    assert alone["modules"] == whole["modules"]
    merged = found_in(capsys, str(run / "merged"), f"model.base={base}")
    assert merged["method"] == "full"
    assert [module["path"] for module in merged["modules"]] == [module["path"] for module in whole["modules"]]
    for one, other in zip(merged["modules"], whole["modules"], strict=True):
        values, wanted = one["update"]["singular_values"], other["update"]["singular_values"]
        assert max(abs(a - b) for a, b in zip(values, wanted, strict=False)) <= 1e-4 * wanted[0]
        assert one["relative_change"] == pytest.approx(other["relative_change"], rel=1e-4)


def test_an_adapter_that_peft_wrote_is_inspected(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its singular values are torch's of the weight difference that PEFT's merge makes."""
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2}
    )
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    stir(parameter for parameter in theirs.parameters() if parameter.requires_grad)
    theirs.save_pretrained(tmp_path / "adapter")
    found = found_in(capsys, str(tmp_path / "adapter"), f"model.base={base}", "model.dtype=float32")
    merged, plain = theirs.merge_and_unload(), AutoModelForCausalLM.from_pretrained(base)
    for module in found["modules"]:
        assert module["rank"] == (2 if module["kind"] == "q_proj" else 4)
        after, before = (one.get_submodule(module["path"]).weight.detach() for one in (merged, plain))
        dense = torch.linalg.svdvals(after.double() - before.double())
        values = torch.tensor(module["update"]["singular_values"], dtype=torch.float64)
        assert float((values - dense[: len(values)]).abs().max()) <= 1e-5 * float(dense[0])


def _change_recipe(folder: Path, section: str, **changes: Any) -> None:
    path = folder / "recipe.yaml"
    mark, _, text = path.read_text().partition("\n")
    recipe = yaml.safe_load(text)
    recipe[section] |= changes
    path.write_text(f"{mark}\n{yaml.safe_dump(recipe)}")


def _quantized_and_merged_only(folder: Path) -> None:
    _change_recipe(folder, "model", quantize="nf4")
    shutil.rmtree(folder / "adapter")


def _nothing_exported(folder: Path) -> None:
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "merged")


REFUSED: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "missing": (lambda run: None, ["{run}x"], "no such folder (did you mean"),
    "a file": (lambda run: None, ["{run}/summary.json"], "is not a folder"),
    "neither": (lambda run: None, ["{run}/checkpoints"], "is neither a run, an adapter nor a model"),
    "no base": (lambda run: None, ["{run}/adapter"], "is an adapter without its run"),
    "no base of a model": (lambda run: None, ["{run}/merged"], "is a model without its run"),
    "bad base": (lambda run: None, ["{run}/adapter", "model.base=./nowhere"], "no such folder"),
    "nothing exported": (_nothing_exported, ["{run}"], "the run has exported nothing yet"),
    "merged only": (_quantized_and_merged_only, ["{run}"], "cannot be told from what quantizing the base"),
    "no tensors": (
        lambda run: (run / "adapter" / "adapter_model.safetensors").unlink(),
        ["{run}"],
        "adapter_model.safetensors: is not a plain file",
    ),
    "bad tensors": (
        lambda run: (run / "adapter" / "adapter_model.safetensors").write_bytes(b"x"),
        ["{run}"],
        "not a safetensors file",
    ),
    "bad config": (
        lambda run: (run / "adapter" / "adapter_config.json").write_text("{"),
        ["{run}"],
        "not valid JSON",
    ),
    "no effect": (lambda run: None, ["{run}", "adapter.rank=3"], "has no effect here"),
    "no effect of data": (lambda run: None, ["{run}", "data.max_length=3"], "has no effect here"),
    "no effect of the type": (
        lambda run: None,
        ["{run}/merged", "model.base={base}", "model.dtype=float32"],
        "has no effect, weights are compared in the type of",
    ),
    "all and json": (lambda run: None, ["{run}", "--all", "--json"], "exclude each other"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_target_is_one_line_and_exit_2(
    tmp_path: Path, run: Path, base: Path, name: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The line says what is wrong, before a model is loaded."""
    monkeypatch.setattr(
        without_training, "inspect", lambda *arguments: pytest.fail("a bad target was let through")
    )
    change, arguments, expected = REFUSED[name]
    shutil.copytree(run, tmp_path / "run")
    change(tmp_path / "run")
    filled = [argument.format(run=tmp_path / "run", base=base) for argument in arguments]
    result = run_here(capsys, "lora", "inspect", *filled)
    (line,) = result.errors.splitlines()
    assert (result.code, result.output) == (2, "")
    assert expected in line


def test_the_wrong_base_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An adapter of ours is only compared with the base that it was trained on."""
    other = write_base(tmp_path / "other", poison=True)
    result = run_here(capsys, "lora", "inspect", str(run / "adapter"), f"model.base={other}")
    assert result.code == 2
    assert "was trained on another base" in result.errors


def test_a_bad_target_is_told_without_torch(tmp_path: Path) -> None:
    """A process that refuses a target has loaded neither torch nor transformers."""
    code = (
        "import sys; from lora_cli.cli import main; code = main(['inspect', sys.argv[1]]);"
        " print(code, sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    (tmp_path / "adapter_config.json").write_text("{}")
    for target in (tmp_path, tmp_path / "nowhere"):
        command = [sys.executable, "-c", code, str(target)]
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert result.stdout.strip() == "2 []", result.stderr


def deep() -> dict[str, Any]:
    """Return what would be found in a model of 24 layers of 7 modules, large ones with long names."""
    modules = []
    for layer in range(24):
        for index, name in enumerate(
            "q_proj k_proj v_proj o_proj gate_proj up_proj a_projection_of_a_long_name".split()
        ):
            spectrum = Spectrum.of([0.9 ** (step * (1 + index)) for step in range(128)])
            modules.append(
                Module(
                    f"model.layers.{layer}.block_{index}.{name}", layer, 14336, 4096, 2_359_296, 128, 256.0, None, 128,
                    100.0, 12.0 + layer, 0.12 + layer / 100, spectrum, None, "wasted", spectrum.rank_99,
                )
            )  # fmt: skip
    kinds = _inspection.by_kind(modules)
    records = [_inspection.as_json(module) for module in modules]
    whole = [
        {"name": f"model.layers.{layer}.norm.weight", "parameters": 4096, "relative_change": 12.5}
        for layer in range(24)
    ]
    return {
        "method": "lora", "base": "some-owner/a-large-model", "parameters": 1, "modules": records, "whole": whole,
        "unchanged": 3, "kinds": kinds, "layers": _inspection.by_layer(modules),
        "suggestion": {"rank": 64, "alpha": 128},
    }  # fmt: skip


def test_a_deep_model_is_a_short_table() -> None:
    """Of 168 modules there are 7 rows, with `--all` all 168; no line of either is wider than 100 characters."""
    found = deep()
    short = inspect_table.lines(found, every=False, encoding="utf-8")
    every = inspect_table.lines(found, every=True, encoding="utf-8")
    assert len(short) <= 24
    assert len([line for line in every if ".block_" in line or line.startswith("..")]) >= 168
    for lines in (short, every):
        assert max(map(len, lines)) <= inspect_table.WIDTH
    assert any("least" in line and "(layer 0)" in line and "(layer 23)" in line for line in short)
    assert [line.strip() for line in short[-2:]] == ["rank: 64", "alpha: 128"]


def test_pictures_are_ascii_where_the_terminal_is() -> None:
    """For an encoding that lacks blocks every character is ASCII, and the columns are the same."""
    found = deep()
    blocks, plain = (inspect_table.lines(found, every=False, encoding=name) for name in ("utf-8", "latin-1"))
    assert "".join(plain).isascii()
    assert not "".join(blocks).isascii()
    assert list(map(len, blocks)) == list(map(len, plain))


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (None, "-"),
        (0.0, "0.00%"),
        (1e-6, "<0.01%"),
        (0.0123, "1.23%"),
        (0.123, "12.3%"),
        (1.23, "123%"),
        (12.3, "12x"),
    ],
)
def test_parts_are_short(part: float | None, text: str) -> None:
    """A relative change has three digits and at most six characters."""
    assert inspect_table._percent(part) == text


def test_no_number_is_beyond_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All numbers are finite, so that every reader of JSON takes the object."""

    def numbers(value: Any) -> list[float]:
        if isinstance(value, dict):
            return [number for inner in value.values() for number in numbers(inner)]
        if isinstance(value, list):
            return [number for inner in value for number in numbers(inner)]
        return [value] if isinstance(value, float) else []

    assert all(map(math.isfinite, numbers(found_in(capsys, str(run)))))
