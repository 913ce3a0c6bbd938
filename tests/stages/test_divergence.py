"""Losses and gradients that are not finite, in every method: the step is not applied, and its rows are named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_in_two
from safetensors.torch import load_file
from toy import write_recipe

from lora_cli import adapters, pipeline
from lora_cli.errors import DivergedError
from lora_cli.manifest import verify
from lora_cli.models.adapted import AdaptedModel
from lora_cli.objectives.sft import Sft
from lora_cli.recipe.load import load_recipe
from lora_cli.runtime import order
from lora_cli.runtime.optim import MasterAdamW
from lora_cli.types import Batch

BLOCKS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "qlora": {"rank": 4},
    "dora": {"rank": 4},
    "vera": {"rank": 16},
    "full": {},
    "adalora": {"initial_rank": 6, "target_rank": 2, "tinit": 1, "tfinal": 2, "delta_t": 1},
    "relora": {"rank": 4, "restart_every": 2, "restart_warmup": 1},
}


class _NanBackward(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Return the input."""
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Return NaN."""
        return gradient * float("nan")


def test_every_method_is_covered() -> None:
    """Every file in adapters/ is here."""
    assert sorted(BLOCKS) == adapters.names()


@pytest.mark.parametrize("where", ["first", "later"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_not_finite_is_not_applied(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, name: str, what: str, where: str
) -> None:
    """A NaN in step 2, in the loss or only in the gradient of one micro-batch, stops before the update, names the rows
    of that micro-batch, and leaves the checkpoint of step 1 and no other file that is not finite."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    changes: dict[str, Any] = {"adapter": {"method": name, **BLOCKS[name]}, "train__micro_batch_tokens": 64}
    changes["model__dtype"] = "bfloat16" if where == "first" else "float32"
    recipe = load_recipe(
        write_recipe(
            tmp_path, base, train__save_every=1, train__max_grad_norm=None, data__eval=None, **changes
        )
    )
    rows = set(order.rows_of_step(1, num_rows=40, batch_size=8, seed=0))
    original, poisoned = Sft.loss_sum, []

    def loss_sum(self: Sft, model: AdaptedModel, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        loss, metrics = original(self, model, batch)
        if set(batch.rows) <= rows:
            seen.setdefault(batch.rows, len(seen))
            if seen[batch.rows] == (0 if where == "first" else 2):
                poisoned.append(batch.rows)
                loss = _NanBackward.apply(loss) if what == "gradient" else loss * float("nan")
        return loss, metrics

    seen: dict[tuple[int, ...], int] = {}
    updates: list[float] = []
    step = MasterAdamW.step

    def count(self: MasterAdamW, learning_rate: float) -> None:
        updates.append(learning_rate)
        step(self, learning_rate)

    monkeypatch.setattr(Sft, "loss_sum", loss_sum)
    monkeypatch.setattr(MasterAdamW, "step", count)
    with pytest.raises(DivergedError) as caught:
        pipeline.train(recipe)
    assert len(updates) == 1
    assert len(seen) > 2
    told = str(caught.value)
    assert told.startswith("step 2: ")
    assert ("the loss is nan" in told) is (what == "loss")
    assert (
        sorted(int(line) - 1 for line in re.findall(r"train\.jsonl:(\d+)", told)) == sorted(poisoned[0])[:5]
    )
    run = tmp_path / "run"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-1"]
    verify(run / "checkpoints" / "step-1")
    for file in run.rglob("*.safetensors"):
        assert all(
            bool(value.isfinite().all()) for value in load_file(file).values() if value.is_floating_point()
        )
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
    assert not (run / "adapter").exists()


def test_rows_of_another_process_are_named(tmp_path: Path, base: Path) -> None:
    """Of two processes the second meets a NaN gradient: both end with 3, and the first names the second's rows."""
    recipe = write_recipe(tmp_path, base, data__eval=None, train__micro_batch_tokens=64)
    row = order.rows_of_step(0, num_rows=40, batch_size=8, seed=0)[3]  # an odd place: of the second process
    program = (
        "import sys, torch\n"
        "from lora_cli.objectives.sft import Sft\n"
        "original = Sft.loss_sum\n"
        "class Nan(torch.autograd.Function):\n"
        "    @staticmethod\n"
        "    def forward(ctx, x): return x.clone()\n"
        "    @staticmethod\n"
        "    def backward(ctx, gradient): return gradient * float('nan')\n"
        "def loss_sum(self, model, batch):\n"
        "    loss, metrics = original(self, model, batch)\n"
        "    return (Nan.apply(loss) if int(sys.argv[2]) in batch.rows else loss), metrics\n"
        "Sft.loss_sum = loss_sum\n"
        "from lora_cli.cli import train_main\n"
        "raise SystemExit(train_main([sys.argv[1]]))\n"
    )
    first, second = run_in_two(program, str(recipe), str(row))
    assert (first.returncode, second.returncode) == (3, 3), first.stderr + second.stderr
    told = [line for line in first.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert told[0].startswith("error: step 1: ")
    assert f"train.jsonl:{row + 1}" in told[0]
    assert "error: " not in second.stderr


def test_a_sum_that_overflows_is_told_from_its_parts(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where each micro-batch is finite and only their sum is not, no row is blamed."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    recipe = load_recipe(
        write_recipe(tmp_path, base, data__eval=None, train__micro_batch_tokens=64, train__max_grad_norm=None)
    )
    norms = iter([float("inf"), 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(MasterAdamW, "gradient_norm", lambda self: torch.tensor(next(norms)))
    with pytest.raises(DivergedError, match=r"step 1: .*the sum of the micro-batches"):
        pipeline.train(recipe)


def test_a_held_out_loss_that_is_not_finite_is_valid_json(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A held-out loss of NaN while training stands as null in metrics.jsonl, and the final one stops the run."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    recipe = load_recipe(write_recipe(tmp_path, base, train__eval_every=5))
    original = Sft.loss_sum

    def loss_sum(self: Sft, model: AdaptedModel, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        loss, metrics = original(self, model, batch)
        return (loss if model.model.training else loss * float("nan")), metrics

    monkeypatch.setattr(Sft, "loss_sum", loss_sum)
    with pytest.raises(DivergedError, match=r"held-out loss of base is nan; nothing was exported"):
        pipeline.train(recipe)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    read = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [line["eval_loss"] for line in read if "eval_loss" in line] == [None, None]
