"""ReLoRA's full-rank warm start: what is trained when, its export, its resume."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from relora_runs import BASES, EVERY, TOTAL, WARM, begin, take
from safetensors.torch import load_file
from small import make_model
from test_relora import logits, write
from toy import write_recipe
from transformers import AutoModelForCausalLM

from lora_cli import pipeline
from lora_cli.adapters.relora import Relora, ReloraLinear
from lora_cli.errors import InputError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.recipe.load import load_recipe
from lora_cli.runtime.checkpoint import Checkpoints


@pytest.mark.parametrize("base", sorted(BASES))
def test_one_thing_is_trained_at_a_time(architecture: str, base: str) -> None:
    """At injection nothing changes; D moves in the warm start alone, A and B after it alone, the base never."""
    before = logits(make_model(architecture, **BASES[base]))
    model, method, step = begin(architecture, base)
    assert torch.equal(logits(model), before)
    frozen = {key: value.clone() for key, value in model.state_dict().items() if ".base." in key}
    assert {name.rpartition(".")[2] for name in step.optimizer.weights} == {"delta"}
    take(step, WARM - 1)
    layer = next(iter(method.layers.values()))
    assert isinstance(layer, ReloraLinear)
    assert layer.delta is not None
    assert bool((layer.delta != 0).any())
    assert not layer.lora_B.any()
    take(step, WARM)
    assert {name.rpartition(".")[2] for name in step.optimizer.weights} == {"lora_A", "lora_B"}
    assert layer.delta is None
    assert layer.past_delta is not None
    past = layer.past_delta.clone()
    take(step, WARM + EVERY - 1)
    assert torch.equal(layer.past_delta, past)
    assert layer.lora_B.any()
    take(step, WARM + EVERY)
    assert not torch.equal(layer.past_delta, past)
    assert not layer.lora_B.any()
    assert len(layer.past_A) == 0
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in frozen.items())
    with AdaptedModel(model, method.layers).reference():
        assert torch.equal(logits(model), before)


def test_the_end_of_the_warm_start_changes_no_output_and_frees_its_state() -> None:
    """The last warm step and its update are kept bit for bit; D's gradient and moments are freed at once."""
    model, method, step = begin("llama")
    take(step, WARM - 1)
    kept = [
        weakref.ref(moment)
        for name in step.optimizer.weights
        for moment in step.optimizer.moments(name).values()
    ]
    assert len(kept) == 2 * len(method.layers)
    after_step, seen = method.after_step, []

    def watch(*arguments: Any) -> None:
        model.eval()
        seen.append(logits(model))
        after_step(*arguments)
        seen.append(logits(model))
        model.train()

    method.after_step = watch  # type: ignore[method-assign]
    take(step, WARM)
    assert torch.equal(*seen)
    gc.collect()
    assert all(reference() is None for reference in kept)
    state = step.optimizer.state_dict()
    assert {name.rpartition(".")[2] for name in state} == {"master"}


@pytest.mark.parametrize("until", [WARM - 1, WARM, WARM + EVERY + 1])
def test_both_exports_hold_the_warm_start(tmp_path: Path, base: Path, architecture: str, until: int) -> None:
    """Within the warm start, at its end and in a later cycle, adapter and merged model have the live logits to 1e-5."""
    model, method, step = begin(architecture)
    take(step, until)
    live = logits(model)
    differences, log = write(model, method, base, peft=tmp_path / "adapter", merged=tmp_path / "merged")
    assert max(differences.values()) <= 1e-5
    theirs = peft.PeftModel.from_pretrained(make_model(architecture), tmp_path / "adapter").eval()
    assert float((logits(theirs) - live).abs().max()) <= 1e-5
    assert theirs.peft_config["default"].r == 32  # the smaller side of every layer
    assert "LORA of rank 32: relative error" in log
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert float((logits(merged) - live).abs().max()) <= 1e-5
    for layer in method.layers.values():
        a, b = layer.plain_factors() or (None, None)
        torch.testing.assert_close(b @ a, layer.merged_weight() - layer.base_weight(), rtol=1e-4, atol=1e-5)  # type: ignore[operator]


def test_a_truncated_export_says_what_it_loses(tmp_path: Path, base: Path) -> None:
    """With `export_rank` each error is that of the truncated SVD of the whole update, and log and card state it."""
    model, method, step = begin("llama", export_rank=8)
    take(step, WARM + EVERY + 1)
    _, log = write(model, method, base, peft=tmp_path / "adapter")
    for text in (log, (tmp_path / "adapter" / "README.md").read_text()):
        assert "LORA of rank 8: relative error" in text
    for path, error in method.as_peft()[1].items():
        layer = method.layers[path]
        values = torch.linalg.svdvals((layer.merged_weight() - layer.base_weight()).detach().double())
        assert error == pytest.approx(float(values[8:].norm() / values.norm()), rel=1e-3)
        assert error > 0.1


@pytest.mark.parametrize("back", [WARM - 2, WARM, WARM + EVERY])
def test_an_earlier_checkpoint_is_restored(tmp_path: Path, back: int) -> None:
    """From its end a run goes back into the warm start, to its end or to a restart, bit for bit, and on from there."""
    model, method, step = begin("qwen2")
    checkpoints = Checkpoints(tmp_path, keep=9)
    take(step, back)
    there = logits(model)
    checkpoints.save(step.state, step.optimizer, method.state_dict(), {})
    take(step, TOTAL)
    end = logits(model)
    assert not torch.equal(there, end)
    step.state = step.restore(checkpoints, back)
    for file in (
        tmp_path / f"step-{back}"
    ).iterdir():  # the run does not go on in pages of the checkpoint's files
        with file.open("r+b") as content:
            content.write(bytes(file.stat().st_size))
    assert torch.equal(logits(model), there)
    assert step.state.step == back
    take(step, TOTAL)
    assert torch.equal(logits(model), end)


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, base: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Continued before, at and after the warm start's end (2) and at a restart (4), a run ends bit-equal."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    path = write_recipe(
        tmp_path, base, train__max_steps=5, train__save_every=1, train__keep_checkpoints=9, model__dtype="bfloat16",
        adapter={"method": "relora", "rank": 4, "alpha": 8, "restart_every": 2, "warm_start_steps": 2, "dropout": 0.1},
    )  # fmt: skip
    pipeline.train(load_recipe(path))
    run = tmp_path / "run"
    shutil.copytree(run, tmp_path / "straight")
    for entry in [*run.iterdir(), *(run / "checkpoints").iterdir()]:
        name = entry.name
        if name in ("adapter", "summary.json") or (name.startswith("step-") and int(name[5:]) > step):
            shutil.move(entry, tmp_path / f"aside-{name}")
    pipeline.train(load_recipe(path), resume=True)
    for name in ("checkpoints/step-5/optimizer", "checkpoints/step-5/method", "adapter/adapter_model"):
        straight, resumed = (
            load_file(tmp_path / side / f"{name}.safetensors") for side in ("straight", "run")
        )
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(resumed[key], value) for key, value in straight.items())


def test_the_schedule_warms_up_again_after_the_warm_start() -> None:
    """The factor is 1 in the warm start, then climbs from near 0 in the first cycle as in every other."""
    method = Relora(rank=1, alpha=1.0, restart_every=4, restart_warmup=1, warm_start_steps=3)
    method.plan(12)
    cycle = [0.5, 1.0, 1.0, 1.0]
    assert [method.schedule_factor(step) for step in range(12)] == [1.0] * 3 + cycle + cycle + cycle[:1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warm_start_steps": 20}, r"warm_start_steps: found 20, but the run has 20 steps: no low-rank step"),
        ({"warm_start_steps": 12, "restart_every": 8}, r"restart_every: found 8, .* 20 steps, 8 of them after .* 12"),
        ({"warm_start_steps": 19}, r"restart_every: found null, which gives 1, .* 20 steps, 1 of them after"),
    ],
)  # fmt: skip
def test_a_warm_start_that_leaves_no_restart_is_refused(settings: dict[str, int], message: str) -> None:
    """The run must have a restart after the warm start and before its end; the message has the numbers."""
    with pytest.raises(InputError, match=message):
        Relora(rank=1, alpha=1.0, **settings).plan(20)
    Relora(rank=1, alpha=1.0, warm_start_steps=12, restart_every=7).plan(20)
