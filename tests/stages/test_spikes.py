"""Steps that stand out: skipped on request, counted, the same after a resume."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toy import write_recipe

from lora_cli import pipeline
from lora_cli.errors import DivergedError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.objectives.sft import Sft
from lora_cli.recipe.load import load_recipe
from lora_cli.runtime.checkpoint import State
from lora_cli.stages import _spikes
from lora_cli.types import Batch


def values(number: int) -> list[float]:
    """Return numbers around 3 that differ by about 0.1."""
    return list(np.random.Generator(np.random.PCG64(0)).normal(3.0, 0.1, number))


def test_deviations_are_those_of_the_definition() -> None:
    """The distance to the mean in sample standard deviations, of 64 values on; never of fewer."""
    before = values(_spikes.ENOUGH)
    expected = (4.0 - statistics.mean(before)) / statistics.stdev(before)
    assert _spikes.deviations(4.0, before) == pytest.approx(expected, rel=1e-12)
    assert _spikes.deviations(4.0, before[1:]) == 0.0
    assert _spikes.deviations(2.0, before) < 0


def test_values_that_are_all_but_equal_have_no_spikes() -> None:
    """A loss that has settled to nine digits does not make a change of a thousandth a spike."""
    assert _spikes.deviations(1.001, [1.0 + 1e-9 * (index % 2) for index in range(128)]) < 2


def test_a_skipped_step_does_not_join_the_others() -> None:
    """The second of two equal spikes is judged like the first; either number alone suffices; windows stay bounded."""
    state = State(recent_losses=values(128), recent_norms=values(128))
    first = _spikes.skip(state, 9.0, 3.0, 6.0)
    assert first == _spikes.skip(state, 9.0, 3.0, 6.0) > 6
    assert _spikes.skip(state, 3.0, 9.0, 6.0) > 6
    assert (state.skipped, state.skipped_in_a_row) == (3, 3)
    assert _spikes.skip(state, 3.0, 3.0, 6.0) == 0.0
    assert (state.skipped, state.skipped_in_a_row) == (3, 0)
    assert len(state.recent_losses) == len(state.recent_norms) == _spikes.WINDOW


def test_a_lasting_rise_ends_the_run() -> None:
    """The eleventh skipped step in a row is a divergence."""
    state = State(recent_losses=values(128), recent_norms=values(128))
    for _ in range(_spikes.IN_A_ROW):
        assert _spikes.skip(state, 9.0, 3.0, 6.0)
    with pytest.raises(DivergedError, match=r"as were the last 10; .*train\.skip_spikes"):
        _spikes.skip(state, 9.0, 3.0, 6.0)


def spiked(monkeypatch: pytest.MonkeyPatch, calls: Sequence[int]) -> list[int]:
    """Make the losses of these training passes, one a step, 50 times what they are; return the list of passes made."""
    made: list[int] = []
    original = Sft.loss_sum

    def loss_sum(self: Sft, model: AdaptedModel, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        loss, metrics = original(self, model, batch)
        if not model.model.training:
            return loss, metrics
        made.append(len(made))
        return (loss * 50 if made[-1] in calls else loss), metrics

    monkeypatch.setattr(Sft, "loss_sum", loss_sum)
    return made


@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "lora", "rank": 4},
        # The warm start ends, and a restart comes, at a step that is skipped.
        {"method": "relora", "rank": 4, "restart_every": 4, "restart_warmup": 1, "warm_start_steps": 68},
        {"method": "adalora", "initial_rank": 6, "target_rank": 2, "tinit": 60, "tfinal": 9, "delta_t": 1},
    ],
    ids=["lora", "relora", "adalora"],
)
def test_a_spike_is_skipped_counted_and_resumed_alike(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, adapter: dict[str, Any]
) -> None:
    """Spikes at steps 68 and 72 of 76 move no weight, are told, and a run resumed around them has the same bytes."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    path = write_recipe(
        tmp_path, base, adapter=adapter, data__eval=None, train__max_steps=76, train__batch_size=4,
        train__skip_spikes=6, train__activations="keep",  # which makes no passes of its own before the first step
        train__save_every=1, train__keep_checkpoints=76, train__learning_rate=1e-4,
    )  # fmt: skip
    recipe, run = load_recipe(path), tmp_path / "run"
    spiked(monkeypatch, [67, 71])
    summary = pipeline.train(recipe)
    assert summary["skipped_steps"] == 2
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0] * 67 + [1] * 4 + [2] * 5
    if adapter["method"] == "lora":
        before, after = (
            load_file(run / f"checkpoints/step-{step}/optimizer.safetensors") for step in (67, 68)
        )
        assert all(torch.equal(value, after[name]) for name, value in before.items())
    weights = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    for step in (66, 68, 71):
        shutil.rmtree(run / "adapter")
        (run / "summary.json").unlink()
        for later in range(step + 1, 77):
            shutil.rmtree(run / f"checkpoints/step-{later}", ignore_errors=True)
        monkeypatch.undo()
        monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
        spiked(monkeypatch, [67 - step, 71 - step])
        assert pipeline.train(recipe)["skipped_steps"] == 2
        assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == weights, step


def test_nothing_is_skipped_unasked(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without train.skip_spikes a spike is applied, and no line tells of any."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    spiked(monkeypatch, [67])
    recipe = load_recipe(
        write_recipe(tmp_path, base, data__eval=None, train__max_steps=70, train__batch_size=2)
    )
    assert pipeline.train(recipe)["skipped_steps"] == 0
    assert "skipped" not in (tmp_path / "run" / "metrics.jsonl").read_text()
