"""Random models of known shapes: weights from N(0, 0.02^2), seed 0, as safetensors, with a tokenizer beside them.

Speed and memory depend on the shape alone, and no weights have to be fetched. The losses of two sides on random
weights differ as much as on trained ones.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

SMOLLM: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "tie_word_embeddings": True,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "smollm-135m": SMOLLM,
    "llama-3.1-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "qwen3-8b": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    },
    "smallest": SMOLLM | {
        "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    },
}  # fmt: skip
"""Published configurations; `smallest` is for trying the comparison out. Its rows are whole blocks of 64 weights, as
bitsandbytes 0.50 dequantizes others wrongly on a CPU, and the losses of QLoRA would differ."""


def make_model(shape: dict[str, Any], dtype: str, folder: Path, tokenizer: Path) -> Path:
    """Return a folder with a random model of this shape, made where it is not there yet."""
    if (folder / "config.json").is_file():
        return folder
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(shape)
    config = AutoConfig.for_model(values.pop("model_type"), **values, bos_token_id=0, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.empty(parameter.shape).normal_(std=0.02, generator=generator))
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    aside = folder.with_name(folder.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    for path in tokenizer.glob("*token*"):
        shutil.copy(path, aside)
    aside.rename(folder)
    return folder


def sizes(folder: Path) -> dict[str, Any]:
    """Return a model's config.json."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def linear_shapes(config: dict[str, Any]) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Return (in, out) of the linear layers of one decoder layer, and of the output head."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    width = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = width * config["num_attention_heads"], width * config["num_key_value_heads"]
    layer = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    return [*layer, (hidden, inner), (hidden, inner), (inner, hidden)], (hidden, config["vocab_size"])
