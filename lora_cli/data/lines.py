"""Lines of a text file with their numbers; what is no UTF-8 text is named before it is taken for bad rows."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from lora_cli.data.faults import Faults
from lora_cli.errors import InputError

MAX_LINE_BYTES = 64 * 2**20
"""Longest line. A file with a longer one is not made of lines, and would fill the memory before it fails."""

_MAGIC = (
    (b"\x1f\x8b", "a gzip archive", "decompress it first"),
    (b"PK\x03\x04", "a zip archive", "extract it first"),
    (b"\x28\xb5\x2f\xfd", "a zstandard archive", "decompress it first"),
    (b"BZh", "a bzip2 archive", "decompress it first"),
    (b"\xfd7zXZ\x00", "an xz archive", "decompress it first"),
    (b"PAR1", "a parquet file", "name it .parquet"),
    (b"version https://git-lfs", "a Git LFS pointer, not the data", "run `git lfs pull`"),
    (codecs.BOM_UTF16_LE, "UTF-16 text", "save it as UTF-8"),
    (codecs.BOM_UTF16_BE, "UTF-16 text", "save it as UTF-8"),
)


def check_start(name: str, path: Path, magic: bytes | None) -> None:
    """Look at the first bytes; `magic` is what a binary file must begin with, None means text.

    Raises:
        InputError: if the file is empty, or is not what its name says.
    """
    with path.open("rb") as file:
        start = file.read(32)
    if not start:
        raise InputError(f"{name}: the file is empty")
    if magic is not None:
        if not start.startswith(magic):
            raise InputError(f"{name}: not a parquet file (it does not begin with {magic.decode()})")
        return
    for prefix, what, remedy in _MAGIC:
        if start.startswith(prefix):
            raise InputError(f"{name}: is {what} ({remedy})")


def numbered_lines(name: str, path: Path, faults: Faults) -> Iterator[tuple[int, str]]:
    """Yield (line number, text with its line ending); the byte order mark is dropped."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES:
                limit = MAX_LINE_BYTES // 2**20
                raise InputError(
                    f"{name}:{number}: the line is longer than {limit} MiB (one row per line is needed)"
                )
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if b"\0" in raw:
                faults.add(f"{name}:{number}: NUL byte in the line (the file is damaged, or not UTF-8 text)")
                continue
            try:
                yield number, raw.decode()
            except UnicodeDecodeError as error:
                byte = f"byte {raw[error.start]:#04x} at byte {error.start + 1} of the line"
                faults.add(f"{name}:{number}: not UTF-8: {byte} (save the file as UTF-8)")
