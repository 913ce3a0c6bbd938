"""Which models' logits are those of their head over their decoder's hidden states, and what is said of others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from packed_models import LEAKS, LLAMA, PACKS, SIZES, make
from small import make_model
from torch import nn
from transformers import (
    Cohere2Config,
    FalconConfig,
    GraniteConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from lora_cli.models.linear_cross_entropy import PLAIN, Scaling
from lora_cli.models.output_head import OutputHead, find_head
from lora_cli.models.packing import keep_apart
from lora_cli.stages.inject import settle_head

MODELS: dict[str, tuple[PretrainedConfig, Scaling]] = {
    **{name: (config, PLAIN) for name, config in PACKS.items()},
    **{name: (config, PLAIN) for name, (config, _) in LEAKS.items()},
    "gemma2": (PACKS["gemma2"], Scaling(1.0, 30.0)),
    "cohere2": (Cohere2Config(**LLAMA, logit_scale=0.0625), Scaling(0.0625)),
    "granite": (GraniteConfig(**LLAMA, logits_scaling=8.0), Scaling(0.125)),
    "phi": (PhiConfig(**LLAMA), PLAIN),
    "falcon": (FalconConfig(**SIZES), PLAIN),
    "qwen3-moe": (
        Qwen3MoeConfig(**LLAMA, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24), PLAIN
    ),
    "opt-projected": (
        OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=256), PLAIN
    ),
}  # fmt: skip
ONLY_FLOAT32 = {"state space"}
"""Models that transformers cannot run in bfloat16 on a CPU."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_every_family_has_its_head_found(name: str, dtype: torch.dtype) -> None:
    """Decoder and head make each family's logits, with the scaling that its code applies."""
    if name in ONLY_FLOAT32 and dtype == torch.bfloat16:
        pytest.skip("transformers does not run this model in bfloat16 on a CPU")
    config, scaling = MODELS[name]
    model = make(copy.deepcopy(config), dtype)
    found = find_head(model, packs=name in PACKS and keep_apart(model) is None)
    assert isinstance(found, OutputHead)
    assert found.scaling == scaling
    ids = torch.arange(5, 45).view(2, 20)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits.float()
        hidden = found.hidden(input_ids=ids)
        ours = found.scaling.apply_(found.head(hidden).float())
    assert float((ours - expected).norm() / expected.norm()) <= (1e-5 if dtype == torch.float32 else 0.01)


def test_a_cap_is_found_by_small_logits() -> None:
    """A cap that the model's own logits do not reach, and one that its configuration names but its code leaves out."""
    model = make(copy.deepcopy(PACKS["gemma2"]))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-4)
    found = find_head(model, packs=False)
    assert isinstance(found, OutputHead)
    assert found.scaling == Scaling(1.0, 30.0)
    uncapped = make_model("llama")
    uncapped.config.final_logit_softcapping = 30.0
    found = find_head(uncapped, packs=False)
    assert isinstance(found, OutputHead)
    assert found.scaling == PLAIN


def with_forward(change: Any) -> PreTrainedModel:
    """Return a llama whose code changes its logits."""
    model = make_model("llama")
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        output = own(*args, **kwargs)
        output.logits = change(model, output.logits)
        return output

    model.forward = forward
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda _, logits: logits * 1.001,
        lambda _, logits: logits + torch.arange(96) * 1e-2,
        lambda _, logits: torch.log_softmax(logits, -1),
        lambda _, logits: logits[..., :-1],
        lambda model, logits: logits + nn.functional.linear(torch.ones(32), model.lm_head.weight),
    ],
)
def test_a_model_that_does_more_is_told_of(change: Any) -> None:
    """A model whose code scales, shifts, normalises or cuts its logits keeps its own path, and the log says why."""
    lines: list[str] = []
    assert settle_head(with_forward(change), False, lines.append) is None
    (line,) = lines
    assert "from all logits of a pass" in line
    assert "llama: its logits are not the product of its last hidden states with its head" in line


def test_a_model_without_parts_is_told_of() -> None:
    """A model with no head, or a decoder that fails by itself, keeps its own path with a reason."""
    model = make_model("llama")
    assert find_head(model.model, packs=False) == "it has no decoder and head of their own"

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError("no states without logits\nsecond line")

    model.model.forward = fail
    assert find_head(model, packs=False) == "no states without logits"


def test_the_trial_leaves_no_trace() -> None:
    """Modes of training, hooks and gradients are after the trial what they were before it."""
    model = make(copy.deepcopy(LEAKS["sinks"][0]))
    model.train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert isinstance(find_head(model, packs=False), OutputHead)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())
