"""Small random models of three architectures, and rows to train them on."""

from __future__ import annotations

import copy

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from lora_cli.adapters._base import replace_module
from lora_cli.models.nf4 import Quantization, QuantizedLinear, quantizable
from lora_cli.types import Example

CONFIGS: dict[str, PretrainedConfig] = {
    # Linear without bias, tied head
    "llama": LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    ),
    # Linear with bias on q, k, v; untied head
    "qwen2": Qwen2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    ),
    # Conv1D with bias: weights stored (in, out)
    "gpt2": GPT2Config(
        vocab_size=96,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    ),
}


def make_model(
    name: str, dtype: torch.dtype = torch.float32, seed: int = 0, quantize: str | None = None
) -> PreTrainedModel:
    """Return a random model of the named architecture whose biases are not zero; with `quantize` in that form."""
    torch.manual_seed(seed)
    # Made in its dtype, not cast: a cast would round the rotary frequencies, which stay float32 in a loaded model.
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=dtype)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() > 1:
                parameter.normal_(std=0.15)
    for path, linear in quantizable(model).items() if quantize else ():
        replace_module(model, path, QuantizedLinear.of(linear, Quantization(quantize or "")))
    return model.eval()


def make_rows(number: int, seed: int = 0, vocabulary: int = 96) -> list[Example]:
    """Return rows of unequal lengths, each with an untrained head and a trained tail."""
    generator = np.random.Generator(np.random.PCG64(seed))
    rows = []
    for _ in range(number):
        length = int(generator.integers(6, 40))
        trained = np.zeros(length, dtype=np.bool_)
        trained[int(generator.integers(1, length - 2)) :] = True
        rows.append(Example(generator.integers(1, vocabulary, length).astype(np.int32), trained))
    return rows
