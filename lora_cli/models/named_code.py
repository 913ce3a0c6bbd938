"""What the JSON files of a model folder name that is not in the files that were judged: code, kernels, other files.

transformers takes most keys of config.json and tokenizer_config.json as arguments. Some of these have it import Python
files, fetch a kernel from the hub (CVE-2026-4372), or read another file than the one of the usual name, at which nobody
has looked. Such keys are refused, not skipped: without them the model would be another one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CODE = (
    "auto_map",
    "auto_mapping",
    "custom_generate",
    "trust_remote_code",
    "_attn_implementation_internal",
    "_experts_implementation_internal",
)
_IMPLEMENTATIONS = (
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
)
"""What may be `sdpa`, which is passed over, or the name of a repository with a kernel, which is code."""
_FILES = (
    "configuration_files",
    "extra_files",
    "fast_tokenizer_files",
    "gguf_file",
    "init_inputs",
    "tokenizer_object",
    "transformers_weights",
)
_PLAIN = re.compile(r"[\w-]+")
_CLASS = re.compile(r"[A-Za-z_]\w*\.[A-Za-z_]\w*")
_ADVICE = "use a model that transformers knows"


def faults(place: Path, content: dict[str, Any], *, runs_code: bool = False) -> Iterator[str]:
    """Yield a line for each key that names code or another file; a stack, as JSON nests deeper than Python recurses.

    With `runs_code` an `auto_map` at the top may name classes in files of the folder itself, and nowhere else.
    """
    stack: list[tuple[str, Any]] = [("", content)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, list):
            stack.extend((path, inner) for inner in value)
        elif isinstance(value, dict):
            for key, inner in value.items():
                name = f"{path}.{key}"[-120:] if path else key[:120]
                if runs_code and name == "auto_map":
                    yield from _other_code(place, inner)
                elif key in _CODE and inner not in (None, False):
                    yield f"{place}: {name} names code to run, which is never done {_remedy(name, place)}"
                elif key in _IMPLEMENTATIONS and not _is_plain(inner):
                    yield f"{place}: {name} names code to run, a kernel of another repository (remove the entry)"
                elif key in _FILES and inner not in (None, [], {}, ""):
                    yield f"{place}: {name} names other files than the usual ones (remove the entry)"
                else:
                    stack.append((name, inner))


def _remedy(name: str, place: Path) -> str:
    if name == "auto_map" and place.name == "config.json":
        return f"unless the recipe says model.trust_remote_code: true ({_ADVICE}, or set that after reading the code)"
    return f"({_ADVICE}, or remove the entry)"


def _is_plain(value: Any) -> bool:
    """Say whether every text of an implementation, which may be one for each part of a model, is a plain name."""
    values = list(value.values()) if isinstance(value, dict) else [value]
    return all(one is None or (isinstance(one, str) and _PLAIN.fullmatch(one)) for one in values)


def _other_code(place: Path, references: Any) -> Iterator[str]:
    values = list(references.values()) if isinstance(references, dict) else [references]
    for value in values:
        for one in value if isinstance(value, list) else [value]:
            if one is not None and not (isinstance(one, str) and _CLASS.fullmatch(one)):
                found = str(one)[:80]
                yield f"{place}: auto_map names {found!r}, which is no class in a file of this folder (correct it)"
