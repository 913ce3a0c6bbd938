"""What every adapter method must keep, over every method there is, on three kinds of linear layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import make_model, make_rows
from transformers import PreTrainedModel

from lora_cli import adapters
from lora_cli.adapters import Method
from lora_cli.models.adapted import AdaptedModel
from lora_cli.objectives.sft import Sft
from lora_cli.recipe import schema
from lora_cli.runtime.optim import MasterAdamW
from lora_cli.types import Progress

SETTINGS: dict[str, schema.Section] = {
    "lora": schema.LoraAdapter(rank=4, alpha=8.0),
    "dora": schema.DoraAdapter(rank=4, alpha=8.0),
    "vera": schema.VeraAdapter(rank=16),
    "full": schema.FullAdapter(),
    "adalora": schema.AdaLoraAdapter(initial_rank=6, target_rank=4, alpha=48.0),
    "relora": schema.ReloraAdapter(rank=4, alpha=8.0, restart_every=2),
}
"""One block per method; a method without one fails `test_every_method_is_covered`."""

CONSTANT_START = {"full", "vera"}
"""Methods whose trained parameters start from constants or from the base, whatever the seed."""

WITH_LAYERS = [name for name in sorted(SETTINGS) if name != "full"]
STEPS = 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def injected(
    name: str, architecture: str, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, Method]:
    """Return a model with the method in it."""
    model = make_model(architecture, dtype)
    method = adapters.build(SETTINGS[name], seed=3)
    method.plan(STEPS)
    method.inject(model)
    return model, method


def train(model: PreTrainedModel, method: Method, rate: float = 1e-2) -> None:
    """Train a few steps the way the loop does."""
    adapted, objective = AdaptedModel(model, method.layers), Sft(pad_id=0)
    optimizer = MasterAdamW(method.trainable(model))
    rows = list(enumerate(make_rows(8)))
    model.train()
    for step in range(STEPS):
        for batch in objective.micro_batches(adapted, rows, Progress(step, STEPS), tokens=128):
            loss, _ = objective.loss_sum(adapted, batch)
            loss.backward()
        optimizer.step(rate * method.schedule_factor(step))
        method.after_step(optimizer, Progress(step, STEPS))
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits of fixed tokens."""
    return model(input_ids=torch.arange(1, 41).view(2, 20), use_cache=False).logits


def test_every_method_is_covered() -> None:
    """Every file in adapters/ is in this contract, and in the recipe's schema."""
    assert adapters.names() == sorted(SETTINGS)
    tags: Any = schema.Recipe.model_json_schema()["properties"]["adapter"]["discriminator"]["mapping"]
    assert sorted(tags) == adapters.names()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_injection_changes_nothing(name: str, architecture: str, dtype: str) -> None:
    """An injected model's output equals the base's bit for bit."""
    before = logits(make_model(architecture, DTYPES[dtype]))
    model, _ = injected(name, architecture, DTYPES[dtype])
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WITH_LAYERS)
def test_training_leaves_the_base_alone(name: str, architecture: str, dtype: str) -> None:
    """After training every base weight is bit-equal, only the method's parameters have moved, and all of them could."""
    base = make_model(architecture, DTYPES[dtype])
    before = {key: value.clone() for key, value in base.state_dict().items()}
    model, method = injected(name, architecture, DTYPES[dtype])
    start = {key: value.detach().clone() for key, value in method.trainable(model).items()}
    train(model, method)
    after = {key.replace(".base.", "."): value for key, value in model.state_dict().items()}
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(not torch.equal(value, start[key]) for key, value in method.trainable(model).items())
    assert all(parameter.dtype == torch.float32 for parameter in method.trainable(model).values())
    trainable = {id(parameter) for parameter in method.trainable(model).values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trainable


@pytest.mark.parametrize("name", WITH_LAYERS)
def test_merged_equals_forward(name: str, architecture: str) -> None:
    """The merged weights compute what the adapted layers compute, to 1e-5 in fp32, with and without a bias."""
    model, method = injected(name, architecture)
    train(model, method)
    live = logits(model)
    base = logits(make_model(architecture))
    assert float((live - base).abs().max()) > 0.01  # the update is not nothing
    for layer in method.layers.values():
        layer.merge()
    assert float((logits(model) - live).abs().max()) <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WITH_LAYERS)
def test_unmerge_restores_every_bit(name: str, architecture: str, dtype: str) -> None:
    """Merging and unmerging leaves the model bit-equal."""
    model, method = injected(name, architecture, DTYPES[dtype])
    train(model, method)
    live = logits(model)
    for layer in method.layers.values():
        layer.merge()
    assert not torch.equal(logits(model), live)
    for layer in method.layers.values():
        layer.unmerge()
    assert torch.equal(logits(model), live)


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_reference_is_the_base(name: str, architecture: str) -> None:
    """Inside `reference()` a trained model computes what the base did, bit for bit, and outside what it learned."""
    before = logits(make_model(architecture))
    model, method = injected(name, architecture)
    copies = {} if method.layers else {key: p.detach().clone() for key, p in method.trainable(model).items()}
    train(model, method)
    adapted, live = AdaptedModel(model, method.layers, copies), logits(model)
    with adapted.reference():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), live)
    assert not torch.equal(live, before)


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_gradients_do_not_depend_on_the_split(name: str) -> None:
    """Gradients of 8 x 1, 4 x 2 and 1 x 8 micro-batches of unequal lengths agree to 1e-6 relative in fp32."""
    rows = list(enumerate(make_rows(8, seed=5)))
    gradients = []
    for size in (1, 2, 8):
        model, method = injected(name, "llama")
        with torch.no_grad():  # B = 0 would leave A without a gradient
            for key, parameter in method.trainable(model).items():
                if method.layers:
                    generator = torch.Generator().manual_seed(len(key))
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        adapted, objective = AdaptedModel(model, method.layers), Sft(pad_id=0)
        batches = [
            batch
            for first in range(0, 8, size)
            for batch in objective.micro_batches(
                adapted, rows[first : first + size], Progress(0, 1), tokens=10_000
            )
        ]
        assert len(batches) == 8 // size
        units = sum(map(objective.units, batches))
        for batch in batches:
            (objective.loss_sum(adapted, batch)[0] / units).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in method.trainable(model).values()]))  # type: ignore[union-attr]
    for other in gradients[1:]:
        assert float((other - gradients[0]).norm() / gradients[0].norm()) <= 1e-6


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_initialisation_is_a_function_of_the_seed(name: str) -> None:
    """The same seed gives the same parameters bit for bit; another seed gives others where the method draws any."""
    first, second = (injected(name, "llama") for _ in range(2))
    for key, value in first[1].trainable(first[0]).items():
        assert torch.equal(value, second[1].trainable(second[0])[key])
    if name not in CONSTANT_START:
        model = make_model("llama")
        method = adapters.build(SETTINGS[name], seed=4)
        method.inject(model)
        other = method.trainable(model)
        assert any(not torch.equal(value, other[key]) for key, value in first[1].trainable(first[0]).items())
