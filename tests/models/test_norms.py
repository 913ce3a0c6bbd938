"""Norms that are computed in one pass equal the model's own, and only such norms are taken."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small import make_model
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from lora_cli.models.norms import speed_up

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True,
}  # fmt: skip
MODELS: dict[str, tuple[Callable[[], PreTrainedModel], int]] = {
    "llama": (lambda: make_model("llama"), 5),
    "qwen3": (lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)), 9),
    "gemma2": (lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES)), 9),
}
"""Models, and how many norms each has."""


def drawn(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a model whose norms have weights of all sizes."""
    torch.manual_seed(0)
    model = MODELS[name][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn(parameter.shape))
    return model.to(dtype).train()


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the logits and every parameter's gradient."""
    logits = model(input_ids=torch.arange(1, 41).view(2, 20), use_cache=False).logits
    logits.float().square().mean().backward()
    return {"logits": logits.detach()} | {
        key: value.grad for key, value in model.named_parameters() if value.grad is not None
    }


@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_the_models_own(name: str) -> None:
    """In float32 logits and the gradients of all parameters, norms included, equal the plain model's to 1e-5."""
    plain, fast = drawn(name), drawn(name)
    assert speed_up(fast) == MODELS[name][1]
    expected, found = gradients(plain), gradients(fast)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert float((found[key] - value).norm()) <= 1e-5 * float(value.norm()), key


def test_it_is_in_use_while_training() -> None:
    """A norm's output in training was made by the one pass, and in evaluation it was not."""
    model = drawn("llama")
    speed_up(model)
    norm, x = model.get_submodule("model.norm"), torch.randn(3, 32, requires_grad=True)
    assert "RmsNorm" in str(norm(x).grad_fn)
    assert "RmsNorm" not in str(norm.eval()(x).grad_fn)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_no_further_from_float32(name: str) -> None:
    """In bfloat16 the logits are as near to float32's as the plain model's are, within a fifth."""
    exact = drawn(name, torch.bfloat16).float()  # the same weights, computed exactly
    ids = torch.arange(1, 41).view(2, 20)
    plain, fast = drawn(name, torch.bfloat16), drawn(name, torch.bfloat16)
    speed_up(fast)
    wanted, theirs, mine = (
        one(input_ids=ids, use_cache=False).logits.detach().float() for one in (exact, plain, fast)
    )
    assert float((mine - wanted).norm()) <= 1.2 * float((theirs - wanted).norm())


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_is_left_alone(name: str) -> None:
    """In evaluation, and where no gradient is recorded, the logits have the bits of the model's own code."""
    plain, fast = drawn(name, torch.bfloat16), drawn(name, torch.bfloat16)
    speed_up(fast)
    ids = torch.arange(1, 41).view(2, 20)
    for training in (False, True):
        with torch.set_grad_enabled(not training):
            mine, own = (one.train(training)(input_ids=ids, use_cache=False).logits for one in (fast, plain))
        assert torch.equal(mine, own)


def test_other_norms_are_not_taken() -> None:
    """Layer norms, and what takes more than rows, keep their own code; no weight is touched by the trial."""
    before = {key: value.clone() for key, value in make_model("gpt2").state_dict().items()}
    model = make_model("gpt2")
    assert speed_up(model) == 0
    assert speed_up(nn.Sequential(nn.LayerNorm(8, bias=False), nn.LayerNorm(8), nn.Linear(8, 8))) == 0  # type: ignore[arg-type]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    llama = make_model("llama")
    kept = {key: value.clone() for key, value in llama.state_dict().items()}
    assert speed_up(llama) == 5
    assert all(torch.equal(value, kept[key]) for key, value in llama.state_dict().items())
    assert speed_up(llama) == 0  # once
