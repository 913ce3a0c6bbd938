"""What objectives compare with is the model that their stage began with, an adapter's too, resumed and scored alone."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.test_adapters import SETTINGS
from small import make_model
from toy import pairs, write_recipe, write_rows

from lora_cli import adapters, chain, pipeline, without_training
from lora_cli.models.adapted import AdaptedModel, values_of
from lora_cli.recipe.chain import Chain, load
from lora_cli.recipe.load import load_recipe

pytestmark = pytest.mark.usefixtures("own_cache")
STARTS = sorted(name for name in SETTINGS if "init_from" in type(SETTINGS[name]).model_fields)
RATES = {"full": 1e-3, "vera": 5e-2}


def after_sft(folder: Path, base: Path, method: str, second: dict[str, Any], **changes: Any) -> Chain:
    """Return a chain of a few steps of sft and an objective over pairs, or what else `second` says."""
    data = str(write_rows(folder / "pairs.jsonl", pairs(24)))
    held = str(write_rows(folder / "held.jsonl", pairs(8)))
    objective = [
        {"name": "sft", "train": {"max_steps": 4}},
        {"data": {"train": data, "eval": held}, "train": {"max_steps": 3}, **second},
    ]
    settings = {
        "objective": objective, "adapter": SETTINGS[method].model_dump(exclude_none=True),
        "train__learning_rate": RATES.get(method, 1e-2), **changes,
    }  # fmt: skip
    found = load(write_recipe(folder, base, **settings))
    assert isinstance(found, Chain)
    return found


def lines_of(run: Path) -> list[dict[str, Any]]:
    """Return the lines of steps in a run's metrics."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def dpo_run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Chain, Any]]:
    """Return a function that gives a chain of sft and dpo under a method and in a type, run once, and its summary."""
    known: dict[tuple[str, str], tuple[Chain, Any]] = {}

    def run(method: str, dtype: str) -> tuple[Chain, Any]:
        if (method, dtype) not in known:
            folder = tmp_path_factory.mktemp(f"{method}-{dtype}")
            saved = {"train__save_every": 1, "train__keep_checkpoints": 9}
            stages = after_sft(folder, base, method, {"name": "dpo"}, model__dtype=dtype, **saved)
            known[method, dtype] = stages, chain.train(stages)
        return known[method, dtype]

    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", sorted(SETTINGS))
def test_dpo_begins_at_ln_2_after_sft(
    dpo_run: Callable[[str, str], tuple[Chain, Any]], method: str, dtype: str
) -> None:
    """Under every method the first loss after an sft stage is ln 2 and its margins are zero; then they grow."""
    stages, summary = dpo_run(method, dtype)
    first, *_, last = lines_of(stages.stages[1].folder)
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert first["reward_margin"] == 0.0
    assert last["reward_margin"] > 0.0
    scores = summary["stages"][1]["eval"]
    if method in STARTS:  # the base is what it was before both stages: far from where the second began
        assert abs(scores["base"]["reward_margin"]) > 1e-3
    else:
        assert scores["base"]["reward_margin"] == 0.0


@pytest.mark.parametrize("method", STARTS)
def test_a_resumed_stage_compares_with_the_same(
    dpo_run: Callable[[str, str], tuple[Chain, Any]], method: str
) -> None:
    """A stage that goes on from its second step has the margins, and ends in the bytes, of one in one piece."""
    stages, _ = dpo_run(method, "float32")
    run = stages.stages[1].folder
    whole, metrics = (run / "adapter" / "adapter_model.safetensors").read_bytes(), lines_of(run)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-3")
    pipeline.train(stages.stages[1].recipe)
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == whole
    assert [line["reward_margin"] for line in lines_of(run)] == [line["reward_margin"] for line in metrics]


@pytest.mark.parametrize("method", STARTS)
def test_scoring_a_run_alone_compares_with_the_same(
    dpo_run: Callable[[str, str], tuple[Chain, Any]], tmp_path: Path, method: str
) -> None:
    """`lora-eval` of a stage gives the scores of the stage itself; without its start it is refused in one line."""
    stages, summary = dpo_run(method, "float32")
    start, run = (stage.folder for stage in stages.stages)
    recipe = load_recipe(run / "recipe.yaml")
    found = without_training.evaluate(run, recipe)
    for column, scores in summary["stages"][1]["eval"].items():
        assert found[column] == pytest.approx(scores, rel=1e-4, abs=1e-5)
    start.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="1-sft"):
        without_training.evaluate(run, recipe)
    (tmp_path / "elsewhere").rename(start)


@pytest.mark.parametrize("name", ["grpo", "rloo", "ppo"])
def test_rollouts_are_measured_from_where_their_stage_began(tmp_path: Path, base: Path, name: str) -> None:
    """The divergence from the reference is zero at the first step after an sft stage, and grows from there."""
    second = {
        "name": name, "beta": 0.1, "samples": 2, "rewards": [{"name": "regex", "pattern": "[aeiou]"}],
        "sampling": {"max_new_tokens": 6}, "data": {},
    }  # fmt: skip
    chain.train(after_sft(tmp_path, base, "lora", second))
    first, *_, last = lines_of(tmp_path / "run" / f"2-{name}")
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)
    assert last["kl"] > 1e-6


@pytest.mark.parametrize("method", STARTS)
def test_the_three_models_are_told_apart(method: str) -> None:
    """Base, beginning and now are three models, whichever is asked for within another, and each comes back."""
    model = make_model("llama")
    base = logits(model)
    placed = adapters.build(SETTINGS[method], seed=3)
    placed.plan(3)
    placed.inject(model)
    trained = placed.trainable(model)
    move(trained, 1)
    start = logits(model)
    adapted = AdaptedModel(model, placed.placed(), began=values_of(placed.placed()))
    move(trained, 2)
    live = logits(model)
    assert not torch.equal(base, start)
    assert not torch.equal(start, live)
    with adapted.as_it_began():
        assert torch.equal(logits(model), start)
        with adapted.reference():
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), start)
    with adapted.reference():
        assert torch.equal(logits(model), base)
        with adapted.as_it_began():
            assert torch.equal(logits(model), start)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), live)
    assert all(placed.trainable(model)[name] is parameter for name, parameter in trained.items())


def test_a_gradient_holds_over_a_look_at_the_beginning() -> None:
    """What was computed before the model was looked at as it began is still differentiated as it was."""
    found = []
    for looks in (False, True):
        model = make_model("llama")
        placed = adapters.build(SETTINGS["lora"], seed=3)
        placed.inject(model)
        move(placed.trainable(model), 1)
        adapted = AdaptedModel(model, placed.placed(), began=values_of(placed.placed()))
        move(placed.trainable(model), 2)
        loss = model(input_ids=torch.arange(1, 21)[None], use_cache=False).logits.float().square().mean()
        if looks:
            with adapted.as_it_began():
                logits(model)
        loss.backward()
        found.append({name: one.grad for name, one in placed.trainable(model).items()})
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name])  # type: ignore[arg-type]


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Return the logits of fixed tokens."""
    found: torch.Tensor = model(input_ids=torch.arange(1, 41).view(2, 20), use_cache=False).logits
    return found


@torch.no_grad()
def move(parameters: dict[str, torch.nn.Parameter], seed: int) -> None:
    """Move all parameters, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
