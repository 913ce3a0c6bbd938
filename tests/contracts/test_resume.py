"""Every method resumed after every step of a short run: AdaLoRA's budget steps and ReLoRA's restarts are among them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy import write_recipe

from lora_cli import adapters, pipeline
from lora_cli.recipe.load import load_recipe

STEPS = 6
"""More than an epoch, which has 5."""

BLOCKS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "dropout": 0.1},
    "qlora": {"rank": 4, "dropout": 0.1},
    "dora": {"rank": 4, "dropout": 0.1},
    "vera": {"rank": 16, "dropout": 0.1},
    "full": {},
    # The budget falls at steps 2, 3 and 4, and the ranks are final in the last two.
    "adalora": {"initial_rank": 6, "target_rank": 2, "tinit": 1, "tfinal": 2, "delta_t": 1, "dropout": 0.1},
    # Restarts after steps 2, 4 and 6
    "relora": {"rank": 4, "restart_every": 2, "restart_warmup": 1, "reset": "random", "dropout": 0.1},
}
RUNS = [(name, "nf4" if name == "qlora" else "none") for name in BLOCKS] + [
    ("adalora", "nf4"),
    ("relora", "nf4"),
]


def test_every_method_is_covered() -> None:
    """Every file in adapters/ has a run here."""
    assert sorted(BLOCKS) == adapters.names()


def result_of(run: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Return all tensors of the last checkpoint and of the export, and the losses."""
    files = [
        *(run / "checkpoints" / f"step-{STEPS}").glob("*.safetensors"),
        *run.glob("*/*model.safetensors"),
    ]
    tensors = {f"{file.name} {key}": value for file in files for key, value in load_file(file).items()}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return tensors, [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize(("name", "form"), RUNS)
def test_resumed_after_any_step_it_is_the_same_run(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, name: str, form: str
) -> None:
    """Continued after each step in turn, a bfloat16 run has the checkpoint, export and losses of one that was not."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    path = write_recipe(
        tmp_path, base, adapter={"method": name, **BLOCKS[name]}, model__dtype="bfloat16", model__quantize=form,
        data__eval=None, train__max_steps=STEPS, train__save_every=1, train__keep_checkpoints=STEPS,
        train__micro_batch_tokens=128,
    )  # fmt: skip
    recipe, run = load_recipe(path), tmp_path / "run"
    pipeline.train(recipe)
    straight = tmp_path / "straight"
    run.rename(straight)
    tensors, losses = result_of(straight)
    assert len(losses) == STEPS
    for step in range(1, STEPS):
        # As if it had been killed right after saving this step.
        run.mkdir()
        for kept in ("recipe.yaml", "metrics.jsonl"):
            shutil.copy(straight / kept, run)
        saved = f"checkpoints/step-{step}"
        shutil.copytree(straight / saved, run / saved)
        pipeline.train(recipe, resume=True)
        again, same_losses = result_of(run)
        assert again.keys() == tensors.keys()
        assert [key for key, value in tensors.items() if not torch.equal(again[key], value)] == [], step
        assert same_losses == losses
        shutil.rmtree(run)
