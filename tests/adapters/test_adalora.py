"""AdaLoRA's algebra and schedule, and its training and allocation against PEFT's."""

from __future__ import annotations

import peft
import pytest
import torch
from adalora_runs import (
    DELTA_T,
    STEPS,
    TFINAL,
    TINIT,
    injected,
    pefts,
    run,
    train,
    train_pefts,
)
from pydantic import ValidationError

from lora_cli.adapters._adalora_budget import Schedule, budget, settle_schedule
from lora_cli.adapters.adalora import AdaLora, AdaLoraLinear
from lora_cli.errors import InputError
from lora_cli.recipe.schema import AdaLoraAdapter
from lora_cli.runtime.optim import MasterAdamW
from lora_cli.types import Progress


def test_forward_is_the_papers_equation() -> None:
    """h = W x + b + s P diag(E) Q x (arXiv 2303.10512, section 3.1), computed by hand."""
    layer = AdaLoraLinear(torch.nn.Linear(5, 3), rank=2, alpha=6.0)
    for parameter in (layer.lora_A, layer.lora_E, layer.lora_B):
        torch.nn.init.normal_(parameter)
    x = torch.randn(4, 5)
    update = layer.lora_B @ torch.diag(layer.lora_E[:, 0]) @ layer.lora_A * (6.0 / (2 + 1e-5))
    torch.testing.assert_close(layer(x), layer.base(x) + x @ update.T)


def test_it_starts_as_pefts() -> None:
    """E is zero and A and B have PEFT's spread, 0.02, in every layer; PEFT's own layers show the same."""
    _, ours = injected(initial_rank=64, target_rank=64)
    theirs = pefts(init_r=64, target_r=64)
    for path, layer in ours.layers.items():
        module = theirs.get_submodule(f"base_model.model.{path}")
        assert not layer.lora_E.any()
        assert not module.lora_E["default"].any()
        for name in ("lora_A", "lora_B"):
            assert abs(float(getattr(layer, name).detach().std()) / 0.02 - 1) < 0.1
            assert abs(float(getattr(module, name)["default"].detach().std()) / 0.02 - 1) < 0.1


def test_penalty_is_pefts_and_the_papers_gram_matrices(architecture: str) -> None:
    """The penalty is what PEFT adds to its loss, and half the mean of ||Q Q' - I|| and ||P' P - I|| by hand."""
    model, method = injected(architecture)
    other = pefts(architecture)
    grams = []
    for path, layer in method.layers.items():
        module = other.get_submodule(f"base_model.model.{path}")
        with torch.no_grad():
            for name in ("lora_A", "lora_B"):
                torch.nn.init.normal_(getattr(layer, name), std=0.3)
                getattr(module, name)["default"].copy_(getattr(layer, name))
        grams += [layer.lora_A @ layer.lora_A.T, layer.lora_B.T @ layer.lora_B]
    by_hand = 0.5 * sum((gram - torch.eye(6)).norm() for gram in grams) / len(grams)
    ids = torch.arange(1, 41).view(2, 20)
    theirs = other(input_ids=ids, labels=ids).loss - model(input_ids=ids, labels=ids).loss
    penalty = method.penalty()
    assert penalty is not None
    assert penalty.dim() == 0
    assert float(penalty) == pytest.approx(float(theirs), rel=1e-5)
    assert float(penalty) == pytest.approx(float(by_hand), rel=1e-6)
    assert injected(architecture, orthogonal_weight=0.0)[1].penalty() is None


@pytest.mark.parametrize(("delta_t", "kind"), [(1, "llama"), (3, "llama"), (3, "qwen2"), (3, "gpt2")])
def test_training_and_allocation_equal_pefts(delta_t: int, kind: str) -> None:
    """30 steps follow PEFT with its penalty and allocator: loss to 1e-4 at every step, the same ranks at the end."""
    model, method = injected(kind, delta_t=delta_t)
    other = pefts(kind, deltaT=delta_t)
    with torch.no_grad():
        for path, layer in method.layers.items():
            module = other.get_submodule(f"base_model.model.{path}")
            module.lora_A["default"].copy_(layer.lora_A)
            module.lora_B["default"].copy_(layer.lora_B)
    for (step, loss, penalty), (_, theirs) in zip(train(model, method), train_pefts(other), strict=True):
        assert abs(loss + penalty - theirs) / theirs <= 1e-4, f"step {step}: {loss + penalty} and {theirs}"
        pattern = other.peft_config["default"].rank_pattern
        if pattern is not None:
            ours = {f"{path}.lora_E.default": layer.kept.tolist() for path, layer in method.layers.items()}
            assert ours == pattern, f"step {step}"
    assert len({tuple(layer.kept.tolist()) for layer in method.layers.values()}) > 1
    peft.get_peft_model_state_dict(other)  # takes the adapter's name out of the pattern, as saving does
    assert method.disk_config()["rank_pattern"] == other.peft_config["default"].rank_pattern


def test_budget_is_pefts() -> None:
    """The budget at every step of a run, and whether it is applied, are those of PEFT's allocator."""
    model = pefts()
    theirs, count = model.base_model.rankallocator, 6
    schedule = Schedule(STEPS, TINIT, TFINAL, DELTA_T)
    for step in range(STEPS):
        expected, _ = theirs.budget_schedule(step)
        assert budget(step, schedule, 6 * count, 3 * count) == expected
    assert budget(STEPS - TFINAL, schedule, 6 * count, 3 * count) == 3 * count


@pytest.mark.parametrize("architecture_weight", [("llama", 0.5), ("gpt2", 0.0)])
def test_final_ranks_are_reached_exactly(architecture_weight: tuple[str, float]) -> None:
    """At the end the ranks sum to the budget, pruned entries are zero, and the report names every layer's rank."""
    architecture, weight = architecture_weight
    model, method = injected(architecture, orthogonal_weight=weight)
    run(model, method)
    masks = [layer.kept for layer in method.layers.values() if layer.kept is not None]
    assert sum(int(mask.sum()) for mask in masks) == 3 * len(method.layers)
    for layer, mask in zip(method.layers.values(), masks, strict=True):
        assert not layer.lora_E[~mask].any()
        assert layer.lora_E[mask].all()
    lines = method.report()
    assert "mean rank 3 " in lines[0]
    ranks = [int(rank) for line in lines[1:] for rank in line.split("rank ")[1].split()]
    assert sorted(ranks) == sorted(int(mask.sum()) for mask in masks)


def test_equal_scores_meet_the_budget() -> None:
    """Where no gradient has come all scores are equal, and still exactly the budget stays."""
    model, method = injected()
    optimizer = MasterAdamW(method.trainable(model))
    for step in range(STEPS):
        optimizer.gradients()
        method.after_step(optimizer, Progress(step, STEPS))
    assert sum(int(layer.kept.sum()) for layer in method.layers.values()) == 3 * len(method.layers)


@pytest.mark.parametrize("total", [2, 3, 10, 187, 5000])
def test_derived_schedules_fit(total: int) -> None:
    """A schedule derived from the run leaves room to prune, with 100 updates or one a step; PEFT accepts it."""
    schedule = settle_schedule(total, None, None, None)
    peft.AdaLoraConfig(total_step=total, tinit=schedule.tinit, tfinal=schedule.tfinal)
    assert schedule.tfinal >= 1
    updates = (schedule.end - schedule.tinit) / schedule.delta_t
    assert updates >= min(100, schedule.end - schedule.tinit)
    assert settle_schedule(total, None, total - 1, None).tinit == 0
    assert settle_schedule(total, total - 2, None, None).tfinal == 1


@pytest.mark.parametrize(
    ("total", "settings", "message"),
    [
        (30, {"tinit": 20, "tfinal": 10}, r"adapter.tinit: tinit 20 \+ tfinal 10 leave none of the run's 30"),
        (30, {"tinit": 30}, r"adapter.tinit: tinit 30 \+ tfinal 1 "),
        (30, {"tfinal": 30}, r"adapter.tfinal: tinit 0 \+ tfinal 30 "),
        (1, {}, "the run's 1 steps"),
        (30, {"delta_t": 20}, "adapter.delta_t: 20 steps .* only 18 of the run's 30"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(total: int, settings: dict[str, int], message: str) -> None:
    """A schedule longer than the run is refused with the rule and the numbers."""
    method = AdaLora(initial_rank=6, target_rank=3, alpha=8.0, **settings)
    with pytest.raises(InputError, match=message):
        method.plan(total)


def test_ranks_that_would_grow_are_refused() -> None:
    """target_rank above initial_rank is refused in the recipe; equal ranks train, and prune nothing."""
    with pytest.raises(ValidationError, match=r"above adapter\.initial_rank 4"):
        AdaLoraAdapter(initial_rank=4, target_rank=5)
    model, method = injected(target_rank=6)
    run(model, method)
    assert all(bool(layer.kept.all()) for layer in method.layers.values())


@pytest.mark.parametrize("total", [18, 60])
def test_a_run_that_goes_on_with_other_steps_ends_at_its_target(total: int) -> None:
    """Continued after step 16 of 30 with fewer steps or with more, a run still ends with the budget's ranks."""
    model, method = injected()
    run(model, method, 16)
    state = method.state_dict()
    other_model, other = injected()
    other.load_state_dict(state)
    other.plan(total)
    optimizer = MasterAdamW(other.trainable(other_model))
    for step in range(16, total):
        optimizer.gradients()
        other.after_step(optimizer, Progress(step, total))
    assert sum(int(layer.kept.sum()) for layer in other.layers.values()) == 3 * len(other.layers)
