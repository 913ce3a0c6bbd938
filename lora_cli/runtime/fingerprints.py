"""What a run is made of besides its recipe, as sha256: what a continued run must find unchanged.

Everything that the recipe names is known by its content, never by its name: rows by the bytes of their files, a base by
its config and samples of its weights, a chat template by its text. So each change is told by its own name, and what was
only moved is no change.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lora_cli.models.load import base_fingerprint
from lora_cli.runtime.dist import Runtime
from lora_cli.types import Prepared

CONTENTS = (
    "data.train",
    "data.eval",
    "data.template",
    "model.base",
    "model.base.tokenizer",
    "adapter.init_from",
    "objective.rewards",
)
"""What is compared by content: keys, of rewards the models that they name, and the tokenizer, which has no key."""
TOKENS = ("data.train.tokens", "data.eval.tokens")
"""What rows, template, tokenizer and recipe make together; differs alone where another version reads rows otherwise."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def fingerprints(prepared: Prepared, base: Path, start: str | None) -> dict[str, str]:
    """Return the fingerprints of `CONTENTS` and `TOKENS`; `base` is the model's folder, `start` the adapter's own.

    A split that the run does not have, and a start from no adapter, have none.
    """
    used = None if prepared.template == "plain" else prepared.tokenizer.chat_template
    found = {f"data.{split}": content for split, content in prepared.contents.items()}
    found["data.template"] = _sha256(json.dumps(used, sort_keys=True))
    found["model.base"] = base_fingerprint(base)
    found["model.base.tokenizer"] = tokenizer_fingerprint(base)
    if start is not None:
        found["adapter.init_from"] = start
    for split, examples in (("train", prepared.train), ("eval", prepared.eval)):
        if examples is not None:
            found[f"data.{split}.tokens"] = examples.fingerprint
    return found


def tokenizer_fingerprint(folder: Path) -> str:
    """Return a sha256 of the files that make a model folder's tokenizer, its chat template apart."""
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            digest.update(name.encode() + hashlib.sha256((folder / name).read_bytes()).digest())
    config = folder / "tokenizer_config.json"
    if config.is_file():
        settings = json.loads(config.read_text(encoding="utf-8"))
        settings.pop("chat_template", None)
        digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()


def versions() -> dict[str, str | int]:
    """Return the versions of what decides a run's bits."""
    return {name: version(name) for name in ("lora-cli", "torch", "transformers", "safetensors")}


def machine(rt: Runtime) -> dict[str, str | int]:
    """Return what bit-identical results hang on besides `versions`: processor, device, processes and threads."""
    return {
        "processor": platform.machine(),
        "device": torch.cuda.get_device_name(rt.device) if rt.device.type == "cuda" else "cpu",
        "processes": rt.world_size,
        "threads": torch.get_num_threads(),
    }


def changed_contents(before: Mapping[str, Any], now: Mapping[str, str]) -> list[str]:
    """Return `name: content OLD -> NEW` for each of `CONTENTS` that differs; what there is none of is `none`."""
    return [_line(name, before, now) for name in CONTENTS if before.get(name) != now.get(name)]


def changed_tokens(before: Mapping[str, Any], now: Mapping[str, str]) -> list[str]:
    """Return `name: content OLD -> NEW` for each of `TOKENS` that differs."""
    return [_line(name, before, now) for name in TOKENS if before.get(name) != now.get(name)]


def _line(name: str, before: Mapping[str, Any], now: Mapping[str, str]) -> str:
    old, new = (str(facts.get(name, "none"))[:12] for facts in (before, now))
    return f"{name}: content {old} -> {new}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
