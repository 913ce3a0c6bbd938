"""Small random models whose attention differs: windows, caps, shared heads, learned positions; and some that leak."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": None,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA: dict[str, Any] = SIZES | {
    "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 0,
    "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
GEMMA: dict[str, Any] = LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}

PACKS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**LLAMA),
    "qwen2": Qwen2Config(**LLAMA),
    "qwen2-window": Qwen2Config(**LLAMA, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "gpt2": GPT2Config(**GPT2),
    "mistral-window": MistralConfig(**LLAMA, sliding_window=8),
    "gemma2": Gemma2Config(**GEMMA, attn_logit_softcapping=5.0),
    "gemma3": Gemma3TextConfig(**GEMMA, layer_types=["sliding_attention", "full_attention"]),
    "phi3": Phi3Config(**LLAMA, sliding_window=8),
    "gpt-neox": GPTNeoXConfig(**SIZES, intermediate_size=48, max_position_embeddings=256),
    "opt": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=256),
    "mixtral": MixtralConfig(**LLAMA, num_local_experts=4),
}
LEAKS: dict[str, tuple[PretrainedConfig, str]] = {
    "state space": (
        MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, state_size=4),
        "layers do not call",
    ),
    "convolution": (
        Lfm2Config(**LLAMA, layer_types=["conv", "full_attention"]),
        "logits of a document change",
    ),
    "ALiBi": (BloomConfig(vocab_size=96, hidden_size=32, n_layer=1, n_head=4), "does not go through"),
    "sinks": (GptOssConfig(**LLAMA, head_dim=8, num_local_experts=4), "its attention takes s_aux"),
    "chunks": (
        Llama4TextConfig(
            **LLAMA, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=8
        ),
        "not told of the windows",
    ),
}
"""What does not keep documents apart, and what is said of it."""


def make(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a model of random weights large enough that attention matters."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model.eval()
