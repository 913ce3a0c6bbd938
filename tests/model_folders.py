"""Model folders written with the standard library alone, so that a damaged one has exactly one fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "vocab_size": 6,
    "tie_word_embeddings": True,
}


def safetensors_bytes(shapes: dict[str, list[int]]) -> bytes:
    """Return a valid safetensors file of float32 zeros with these shapes."""
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(offset)


def write_model(folder: Path, **config: Any) -> Path:
    """Write a sound model folder; keywords are added to its config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "model.safetensors").write_bytes(safetensors_bytes({"embed": [6, 4], "proj": [4, 4]}))
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"type": "BPE"}}))
    return folder


def shard(folder: Path, weight_map: dict[str, str]) -> None:
    """Replace the weights of a folder by two shards and an index that says `weight_map`."""
    (folder / "model.safetensors").unlink()
    (folder / "a.safetensors").write_bytes(safetensors_bytes({"embed": [6, 4]}))
    (folder / "b.safetensors").write_bytes(safetensors_bytes({"proj": [4, 4]}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
