"""What a model cannot take is refused before anything is written."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small import make_model
from transformers import AutoModelForCausalLM, MambaConfig, OPTConfig, PreTrainedModel

from lora_cli.adapters.lora import Lora
from lora_cli.errors import InputError
from lora_cli.stages import inject


def prepared(longest: int, max_token: int = 50) -> Any:
    """Return as much of prepared data as the check reads."""
    examples = SimpleNamespace(lengths=np.array([5, longest]), max_token=max_token)
    return SimpleNamespace(train=examples, eval=None)


def opt() -> PreTrainedModel:
    """Return an OPT, whose table of positions begins with two rows that stand for none."""
    config = OPTConfig(
        vocab_size=96, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(("model", "limit"), [(make_model("gpt2"), 256), (opt(), 64)], ids=["gpt2", "opt"])
def test_rows_beyond_learned_positions_are_refused(model: PreTrainedModel, limit: int) -> None:
    """The longest row let through is the longest the model can compute; the next is refused with both numbers."""
    inject.check_rows_fit(model, prepared(limit), max_generated=0)
    model(input_ids=torch.zeros(1, limit, dtype=torch.int64))
    with pytest.raises(InputError, match=f"needs {limit + 1} positions, but the model has {limit}"):
        inject.check_rows_fit(model, prepared(limit + 1), max_generated=0)
    with pytest.raises(IndexError):
        model(input_ids=torch.zeros(1, limit + 1, dtype=torch.int64))


def test_rotary_positions_have_no_limit() -> None:
    """A model that computes its positions takes longer rows than it was made for."""
    inject.check_rows_fit(make_model("llama"), prepared(10_000), max_generated=0)


def test_tokens_beyond_the_embedding_are_refused() -> None:
    """A token that the embedding has no row for is refused with both numbers."""
    inject.check_rows_fit(make_model("llama"), prepared(10, max_token=95), max_generated=0)
    with pytest.raises(InputError, match="holds token 96, but the model's embedding ends at 95"):
        inject.check_rows_fit(make_model("llama"), prepared(10, max_token=96), max_generated=0)


def test_a_layer_that_is_not_called_is_refused() -> None:
    """A model whose code reads a layer's weight past the layer is refused, not trained without effect."""
    config = MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, state_size=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    Lora(rank=2, alpha=2.0).inject(model)
    with pytest.raises(InputError, match=r"adapter\.targets"):
        inject._check_forward(model)
