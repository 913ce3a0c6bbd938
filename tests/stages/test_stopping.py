"""A signal in a chosen pass, save or answer of a run: what is finished, what is dropped, and the rerun's bytes."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import write_recipe

from lora_cli import pipeline
from lora_cli.errors import Stopped
from lora_cli.models.adapted import AdaptedModel
from lora_cli.objectives.sft import Sft
from lora_cli.recipe.load import load_recipe
from lora_cli.runtime.checkpoint import Checkpoints
from lora_cli.types import Batch

CHANGES: dict[str, Any] = {
    "adapter__dropout": 0.1,
    "train__max_steps": 4,
    "train__micro_batch_tokens": 64,
    "train__eval_every": 2,
    "train__final_weights": "best",
    "evaluate__metrics": ["loss", "exact_match"],
    "evaluate__batch_tokens": 64,
}


def results_of(run: Path) -> list[object]:
    """Return what a run came to: weights, answers, scores and metrics, without the speed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("tokens_per_second", None)
    summary = json.loads((run / "summary.json").read_text())
    answers = (run / "generations.jsonl").read_text().replace(str(run.parent), "")
    return [(run / "adapter/adapter_model.safetensors").read_bytes(), answers, summary["eval"], lines]


class Calls:
    """Counts calls of a kind, and sends this process a signal within one of them."""

    def __init__(self, at: int) -> None:
        self.at, self.made = at, 0

    def __call__(self) -> None:
        """Count one call."""
        self.made += 1
        if self.made == self.at:
            signal.raise_signal(signal.SIGTERM)


def watch(patch: pytest.MonkeyPatch, what: str, calls: Calls) -> None:
    """Have each call of a kind counted: a training pass, a pass of held-out rows, a save, or generated answers."""

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            calls()
            return original(*arguments, **settings)

        return call

    if what == "save":
        patch.setattr(Checkpoints, "save", counted(Checkpoints.save))
    elif what == "answers":
        patch.setattr(AdaptedModel, "generate", counted(AdaptedModel.generate))
    else:
        original = Sft.loss_sum

        def loss_sum(self: Sft, model: AdaptedModel, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
            if model.model.training is (what == "training"):
                calls()
            return original(self, model, batch)

        patch.setattr(Sft, "loss_sum", loss_sum)


@pytest.mark.parametrize(
    ("what", "at", "step"),
    [
        ("training", 1, 0),  # the first pass of all
        ("training", 2, 0),
        ("training", 5, 1),  # of the second step, which has four passes as the first
        ("held-out", 1, 2),
        ("held-out", 3, 2),
        ("save", 1, 2),  # of the best so far
        ("save", 2, 4),
        ("answers", 1, None),
    ],
)
def test_what_is_dropped_is_made_again(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, what: str, at: int, step: int | None
) -> None:
    """The pass or save in progress is the last that is made; the last full step is saved; a step, held-out loss or
    answer that was dropped is made again, and the run ends in the bytes of the one that was never stopped."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    pipeline.train(load_recipe(write_recipe(tmp_path / "straight", base, **CHANGES)))
    recipe, run = (
        load_recipe(write_recipe(tmp_path / "stopped", base, **CHANGES)),
        tmp_path / "stopped" / "run",
    )
    calls = Calls(at)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, what, calls)
        with pytest.raises(Stopped) as caught:
            pipeline.train(recipe)
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    # A signal in the save of the best leaves it the state's only one; all else would be a second save of a step.
    assert calls.made == at
    steps = Checkpoints(run / "checkpoints", keep=9).steps()
    if step is None:
        assert steps[0] == 4
        assert str(caught.value) == "stopped by signal 15, nothing was left half-written"
    elif step:
        assert steps[0] == step
        assert str(caught.value) == f"stopped by signal 15 after step {step} of 4, saved"
    else:
        assert not steps
        assert str(caught.value) == "stopped by signal 15 in the first step of 4, there is nothing to save"
    passes = Calls(0)
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, "training", passes)
        pipeline.train(recipe)
    assert (passes.made == 0) is (step in (4, None))
    assert results_of(run) == results_of(tmp_path / "straight" / "run")
