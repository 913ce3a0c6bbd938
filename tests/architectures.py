"""Small random models of the decoder families, written as a user has them on disk."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
from toy import write_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_HEADS = {"head_dim": 8}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA, "tie_word_embeddings": True},
    # Keys and values of one window of positions
    "mistral": {**_LLAMA, "sliding_window": 16, "tie_word_embeddings": False},
    # Biases on q, k, v
    "qwen2": {**_LLAMA, "tie_word_embeddings": False},
    # Norms of each head's queries and keys
    "qwen3": {**_LLAMA, **_HEADS, "tie_word_embeddings": True},
    # Embedding scaled by sqrt(width), logits and scores soft-capped; a head always tied
    "gemma2": {**_LLAMA, **_HEADS, "sliding_window": 16, "query_pre_attn_scalar": 8},
    # One layer of a window and one of the whole; two rotary bases
    "gemma3_text": {**_LLAMA, **_HEADS, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    # Conv1D: weights stored (in, out)
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    # One layer for q, k and v, one for gate and up
    "phi3": {**_LLAMA, "tie_word_embeddings": False},
    # Learned positions, biases everywhere
    "opt": {
        "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 256, "word_embed_proj_dim": 32,
    },
    # One layer for q, k and v, interleaved by head; attention and mlp side by side
    "gpt_neox": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 256,
    },
    # Mixtures: the experts of a layer in two 3-D parameters
    "mixtral": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **_LLAMA, **_HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    # A router that is a linear layer by its class and returns a pair; an expert that all tokens share
    "llama4_text": {
        **_LLAMA, **_HEADS, "num_local_experts": 2, "intermediate_size_mlp": 48, "num_experts_per_tok": 1,
    },
    # A linear layer of a class of its own
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    # No attention at all: a state space
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "tie_word_embeddings": True},
}  # fmt: skip
"""Settings by transformers' `model_type`."""

_NO_DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "attention_dropout", "hidden_dropout")


def write_family(folder: Path, family: str, **changes: Any) -> Path:
    """Write a random model of the family with its tokenizer."""
    folder.mkdir(parents=True)
    settings: dict[str, Any] = {**FAMILIES[family], **changes}
    settings |= {"vocab_size": write_tokenizer(folder), "eos_token_id": 2, "pad_token_id": 3}
    config = AutoConfig.for_model(family, **settings, bos_token_id=None)
    for name in _NO_DROPOUT:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    torch.manual_seed(zlib.crc32(family.encode()))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() > 1:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    return folder
