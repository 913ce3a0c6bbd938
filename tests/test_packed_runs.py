"""Whole runs with packed rows: equal to padded ones, resumed, in two processes, and refused where a model leaks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import LEAKS, make
from test_processes import in_two_processes, losses_of, tensors_of
from toy import write_recipe, write_tokenizer

from lora_cli import pipeline
from lora_cli.cli import main
from lora_cli.errors import InputError
from lora_cli.recipe.load import load_recipe

SETTINGS = {"train__eval_every": 4, "train__batch_size": 7, "train__micro_batch_tokens": 64}


def answers(run: Path) -> list[dict[str, Any]]:
    """Return what a run generated, without the path of the rows' file."""
    lines = (run / "generations.jsonl").read_text().splitlines()
    return [one | {"row": one["row"].rpartition("/")[2]} for one in map(json.loads, lines)]


@pytest.fixture(scope="module")
def leaking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model that does not keep documents apart, with our toy tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "leaking"
    config = LEAKS["convolution"][0]
    config.vocab_size = write_tokenizer(folder)
    make(config).save_pretrained(folder)
    return folder


pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_packed_run_is_the_padded_one(tmp_path: Path, base: Path) -> None:
    """By the command, packed, padded, and packed in two processes: one set of losses, scores and weights in fp32."""
    runs = [tmp_path / name / "run" for name in ("padded", "packed", "two")]
    for run in runs:
        settings = SETTINGS | {"data__packing": run != runs[0], "evaluate__metrics": ["loss", "exact_match"]}
        recipe = write_recipe(run.parent, base, **settings)
        if run == runs[2]:
            assert in_two_processes(recipe).returncode == 0
        else:
            assert main(["train", str(recipe)]) == 0
    padded, *others = runs
    for run in others:
        assert losses_of(run) == pytest.approx(losses_of(padded), rel=1e-5)
        expected = tensors_of(padded)
        for name, value in tensors_of(run).items():
            assert float((value - expected[name]).norm() / expected[name].norm()) <= 1e-4
        summaries = [json.loads((folder / "summary.json").read_text()) for folder in (padded, run)]
        for key in ("tokens", "trained_tokens", "steps"):
            assert summaries[0][key] == summaries[1][key]
        for state in ("base", "tuned"):
            assert summaries[1]["eval"][state] == pytest.approx(summaries[0]["eval"][state], rel=1e-5)
        assert answers(run) == answers(padded)


def test_a_packed_run_resumes(tmp_path: Path, base: Path) -> None:
    """Continued from a checkpoint, a packed run with dropout ends in the same adapter, bit for bit."""
    settings = SETTINGS | {"data__packing": True, "train__save_every": 2, "train__keep_checkpoints": 99}
    adapter = {"method": "lora", "rank": 4, "alpha": 8, "dropout": 0.1}
    recipe = load_recipe(write_recipe(tmp_path, base, adapter=adapter, train__max_steps=6, **settings))
    run = tmp_path / "run"
    pipeline.train(recipe)
    expected = tensors_of(run)
    for name in ("adapter", "summary.json", "checkpoints/step-4", "checkpoints/step-6"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    pipeline.train(recipe, resume=True)
    assert all(torch.equal(value, expected[name]) for name, value in tensors_of(run).items())


def test_a_leaking_model_is_refused_or_padded(
    tmp_path: Path, leaking: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`packing: true` on a model that leaks is exit 2 and one line; `auto` pads and trains."""
    recipe = write_recipe(tmp_path, leaking, train__max_steps=1)
    assert main(["train", str(recipe), "data.packing=true"]) == 2
    refused = capsys.readouterr().err
    assert refused.count("\n") == 1
    assert refused.startswith("error: data.packing: found true, but lfm2 does not keep rows apart")
    assert not (tmp_path / "run").exists()
    assert main(["train", str(recipe)]) == 0


def test_a_merged_model_says_nothing_of_it(tmp_path: Path, base: Path) -> None:
    """The config of a merged model trained packed names no attention of ours."""
    recipe = write_recipe(
        tmp_path, base, data__packing=True, train__max_steps=1, export={"formats": ["merged"]}
    )
    pipeline.train(load_recipe(recipe))
    assert "lora_cli" not in (tmp_path / "run" / "merged" / "config.json").read_text()


def test_the_key_takes_three_values(tmp_path: Path, base: Path) -> None:
    """`packing` is auto, true or false; anything else is refused."""
    recipe = write_recipe(tmp_path, base)
    assert [load_recipe(recipe, [f"data.packing={value}"]).data.packing for value in ("auto", "true", "false")] == [
        "auto", True, False,
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"data\.packing"):
        load_recipe(recipe, ["data.packing=yes please"])
