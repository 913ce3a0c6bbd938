"""LoRA's variants on a base of NF4 layers: starts, biases, whole modules, and what cannot be trained there."""

from __future__ import annotations

import pytest
import torch
from lora_variants import CASES, TARGETS, logits, ours, stir
from small import make_model

from lora_cli import adapters
from lora_cli.errors import InputError
from lora_cli.recipe.schema import LoraAdapter

# Of every bias, some are in quantized layers without an adapter; that is refused, see below.
ON_NF4 = [(name, architecture) for name, architecture in CASES if name != "every bias"]


@pytest.mark.parametrize(("name", "architecture"), ON_NF4)
def test_a_variant_starts_at_the_base_and_merges(name: str, architecture: str) -> None:
    """It starts at the quantized base, merges to 1e-5 of what it computes, and unmerging restores every bit."""
    model, method = ours(name, architecture, quantize="nf4")
    base = logits(make_model(architecture, quantize="nf4"))
    assert float((logits(model) - base).abs().max()) <= 1e-5
    stir(method.trainable(model).values())
    live = logits(model)
    assert float((live - base).abs().max()) > 0.01
    for part in method.placed().values():
        part.merge()
    assert float((logits(model) - live).abs().max()) <= 1e-5
    for part in method.placed().values():
        part.unmerge()
    assert torch.equal(logits(model), live)
    for part in method.placed().values():
        part.enabled = False
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_every_bias_is_trained_where_all_layers_have_an_adapter(architecture: str) -> None:
    """With `all-linear` the biases of quantized layers are trained; all of them get a gradient."""
    model = make_model(architecture, quantize="nf4")
    method = adapters.build(LoraAdapter(rank=2, bias="all"), 0)
    method.inject(model)
    biases = {name for name, _ in make_model(architecture).named_parameters() if name.endswith("bias")}
    trained = {name: value for name, value in method.trainable(model).items() if name.endswith("bias")}
    assert trained.keys() == biases
    model(input_ids=torch.arange(1, 21).view(1, 20)).logits.square().sum().backward()
    assert all(value.grad is not None and bool(value.grad.any()) for value in trained.values())


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": "all"}, r"adapter\.bias: .* is quantized and has a bias but no adapter"),
        ({"train_also": ["OTHER"]}, r"adapter\.train_also: .* is quantized, so it cannot be trained whole"),
    ],
)
def test_what_is_quantized_is_not_trained_in_place(
    architecture: str, settings: dict[str, object], message: str
) -> None:
    """A quantized layer without an adapter is refused by name where its bias, or all of it, is to be trained."""
    other = {"qwen2": "k_proj", "gpt2": "mlp.c_proj"}[architecture]
    chosen = {key: [other] if key == "train_also" else value for key, value in settings.items()}
    method = adapters.build(LoraAdapter(targets=TARGETS[architecture], **chosen), 0)
    with pytest.raises(InputError, match=message):
        method.inject(make_model(architecture, quantize="nf4"))
