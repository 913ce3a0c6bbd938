"""For every method and base, layers that are recomputed leave every bit of loss and gradient as it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from packed_models import PACKS, make
from small import make_model, make_rows
from test_adapters import ALL, BASES, SETTINGS

from lora_cli import adapters
from lora_cli.models.activations import Recomputation, decoder_layers
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.packing import keep_apart
from lora_cli.objectives.sft import Sft
from lora_cli.types import Progress


def with_dropout(name: str) -> Any:
    """Return the method's block with a dropout, where it has one."""
    block = SETTINGS[name]
    return block.model_copy(update={"dropout": 0.3} if "dropout" in type(block).model_fields else {})


def gradients(model: Any, name: str, recomputed: int, *, packs: bool) -> tuple[list[torch.Tensor], int]:
    """Return the losses and gradients of three passes, with B not zero, and how often the layers were computed."""
    method = adapters.build(with_dropout(name), seed=3)
    method.plan(3)
    method.inject(model)
    for key, parameter in method.trainable(model).items() if method.layers else ():
        generator = torch.Generator().manual_seed(len(key))
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    if packs:
        assert keep_apart(model) is None
    layers = decoder_layers(model)
    adapted, objective, calls = AdaptedModel(model, method.layers, packs=packs), Sft(pad_id=0), []
    for layer in layers:
        # A part of the layer, since hooks of the layer itself stand outside of what is recomputed.
        next(layer.children()).register_forward_pre_hook(lambda *_: calls.append(1))
    Recomputation(layers).set(recomputed)
    model.train()
    rows = list(enumerate(make_rows(8, seed=5)))
    found = []
    for batch in objective.micro_batches(adapted, rows, Progress(0, 1), tokens=120):
        torch.manual_seed(sum(batch.rows))
        loss = objective.loss_sum(adapted, batch)[0]
        loss.backward()
        found.append(loss.detach())
    assert len(found) > 1
    return found + [p.grad for p in method.trainable(model).values()], len(calls) // len(found)  # type: ignore[misc]


@pytest.mark.parametrize(("name", "base"), ALL)
def test_recomputed_layers_change_no_bit(name: str, base: str) -> None:
    """With one layer recomputed, or all of them, every loss and gradient has the bits of the run that keeps all, though
    dropouts are drawn within: packed in bfloat16, padded in float32."""
    packs = "bf16" in base
    kept, calls = gradients(make_model("llama", **BASES[base]), name, 0, packs=packs)
    assert calls == 2
    for count in (1, 2):
        found, calls = gradients(make_model("llama", **BASES[base]), name, count, packs=packs)
        assert calls == 2 + count
        assert all(torch.equal(one, other) for one, other in zip(kept, found, strict=True))


@pytest.mark.parametrize("architecture", sorted(PACKS))
def test_every_architecture_recomputes(architecture: str) -> None:
    """Layers that hand over windows, biases or experts, with dropouts of the model's own, keep their bits as well."""
    config = copy.deepcopy(PACKS[architecture])
    for name in ("attention_dropout", "resid_pdrop", "attn_pdrop", "dropout", "hidden_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.2)
    kept, first = gradients(make(config), "lora", 0, packs=False)
    found, second = gradients(make(config), "lora", 2, packs=False)
    assert second > first
    assert all(torch.equal(one, other) for one, other in zip(kept, found, strict=True))
