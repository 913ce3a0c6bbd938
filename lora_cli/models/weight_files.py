"""The JSON files and tensor headers of a model folder, read with the standard library: no weight is loaded.

A safetensors file is 8 bytes header length (little endian), the header in JSON, then the tensors, each at
the `data_offsets` of its entry. Pickled weights (.bin, .pt) can run code when read and are never opened.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from lora_cli.errors import InputError

MAX_JSON_BYTES = 100_000_000
"""Largest tokenizer.json seen is 33 MB; the safetensors format bounds its header at the same 100 MB."""

_DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}

Tensors = dict[str, tuple[str, int, int]]
"""Tensor name -> (dtype, number of values, bytes)."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        InputError: it cannot be read, is larger than 100 MB, not UTF-8, not JSON, or not an object.
    """
    try:
        if not path.is_file():
            raise InputError(f"{path}: is not a plain file")
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > MAX_JSON_BYTES:
        raise InputError(f"{path}: larger than 100 MB (is it the right file?)")
    return _parsed(content, str(path))


def read_header(path: Path) -> Tensors:
    """Return the tensors that the header of a safetensors file names.

    Raises:
        InputError: the header is damaged, or the file is shorter or longer than its header says.
    """
    try:
        if not path.is_file():
            raise InputError(f"{path}: is not a plain file")
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_JSON_BYTES):
                raise InputError(
                    f"{path}: not a safetensors file, or cut off in its header (download it again)"
                )
            content = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    header = _parsed(content, f"{path}: header")
    header.pop("__metadata__", None)
    tensors: Tensors = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(item[1])):
        begin, stop = _offsets(entry)
        count = _count(entry)
        width = _DTYPE_BYTES.get(str(entry.get("dtype"))) if isinstance(entry, dict) else None
        # F4 and F6 types are packed: their size in bytes cannot be checked this way.
        if count < 0 or begin != end or stop < begin or (width is not None and stop - begin != count * width):
            raise InputError(f"{path}: the header entry of {name[:80]!r} is damaged (download it again)")
        tensors[name] = (str(entry["dtype"]), count, stop - begin)
        end = stop
    if size != 8 + length + end:
        raise InputError(f"{path}: {size} bytes, its header says {8 + length + end} (download it again)")
    return tensors


def _parsed(content: bytes, place: str) -> dict[str, Any]:
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        detail = str(error).splitlines()[0]
        raise InputError(f"{place}: not valid JSON: {detail} (download it again)") from None
    if not isinstance(value, dict):
        raise InputError(f"{place}: not a JSON object (download it again)")
    return value


def _offsets(entry: Any) -> tuple[int, int]:
    match entry:
        case {"data_offsets": [int() as begin, int() as end]}:
            return begin, end
    return -1, -1


def _count(entry: Any) -> int:
    match entry:
        case {"shape": list() as shape, "dtype": str()} if all(isinstance(n, int) and n >= 0 for n in shape):
            return math.prod(shape)
    return -1


def read_headers(path: Path) -> Tensors:
    """Return the tensors of all weight files of a model folder.

    Raises:
        InputError: with a line per problem: no weights, pickled ones, files missing or damaged.
    """
    tensors: Tensors = {}
    problems: list[str] = []
    for name in _weight_files(path):
        try:
            tensors.update(read_header(path / name))
        except InputError as error:
            problems.extend(error.lines)
    if problems:
        raise InputError(problems)
    if not tensors:
        raise InputError(f"{path}: the safetensors files hold no tensor")
    return tensors


def stored_names(path: Path) -> dict[str, str]:
    """Return the name of every tensor of a model folder and the file that holds it, file by file.

    Raises:
        InputError: as `read_headers`.
    """
    return {tensor: name for name in _weight_files(path) for tensor in read_header(path / name)}


def _weight_files(path: Path) -> list[str]:
    # transformers asks in this order: of a folder with both it never reads the shards.
    if (path / "model.safetensors").exists():
        return ["model.safetensors"]
    index = path / "model.safetensors.index.json"
    if index.exists():
        return _indexed_files(path, index)
    if found := sorted(file.name for file in path.glob("*.safetensors")):
        if len(found) > 1:
            raise InputError(
                f"{path}: {len(found)} weight files, but no model.safetensors.index.json (download it)"
            )
        raise InputError(
            f"{path}: there is no model.safetensors, only {found[0]} (rename it, or add the index)"
        )
    pickled = sorted(
        file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(pattern)
    )
    if pickled:
        raise InputError(
            f"{path}: only pickled weights ({pickled[0]}), which can run code (convert to safetensors)"
        )
    raise InputError(f"{path}: there are no weights (*.safetensors)")


def _indexed_files(path: Path, index: Path) -> list[str]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{index}: weight_map does not map tensors to files (download it again)")
    files = sorted(set(names.values()))
    problems: list[str] = []
    for name in files:
        if len(problems) == 5:
            problems.append(f"{index}: names more files that cannot be read")
            break
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            problems.append(
                f"{index}: names {name[:80]!r}, which is not a plain file name (do not use this folder)"
            )
        elif not name.endswith(".safetensors"):
            problems.append(
                f"{index}: names {name[:80]!r}, which is not a safetensors file (convert to safetensors)"
            )
        elif not os.path.exists(path / name):  # False for a name that no file can have, too
            problems.append(f"{index}: names {name[:80]!r}, which is not there (download it)")
    if problems:
        raise InputError(problems)
    return files
