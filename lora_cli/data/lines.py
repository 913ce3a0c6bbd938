"""Lines of a text file with their numbers; what is no UTF-8 text is named before it is taken for bad rows.

A file may be compressed, as its name says. It is read as a stream, so memory does not grow with it, and a file that
unpacks to more than a text can is refused: text shrinks by a factor of 3 to 20, and deflate's limit is 1,032.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lora_cli.data.faults import Faults
from lora_cli.errors import InputError

MAX_LINE_BYTES = 64 * 2**20
"""Longest line. A file with a longer one is not made of lines, and would fill the memory before it fails."""

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
MAX_RATIO = 200
"""Most bytes that one compressed byte may stand for, beyond the first UNPACKED_FREELY."""
UNPACKED_FREELY = 4 * 2**20
_LOOKED_AT = 32 * 2**20
"""Unpacked bytes that are looked at before any row: enough to know a bomb by, and 0.1 s."""

_MAGIC = (
    (b"\x1f\x8b", "a gzip archive", "let its name end in .gz, e.g. .jsonl.gz"),
    (b"PK\x03\x04", "a zip archive", "extract it first"),
    (b"\x28\xb5\x2f\xfd", "a zstandard archive", "let its name end in .zst, e.g. .jsonl.zst"),
    (b"BZh", "a bzip2 archive", "decompress it first"),
    (b"\xfd7zXZ\x00", "an xz archive", "decompress it first"),
    (b"PAR1", "a parquet file", "name it .parquet"),
    (b"version https://git-lfs", "a Git LFS pointer, not the data", "run `git lfs pull`"),
    (codecs.BOM_UTF16_LE, "UTF-16 text", "save it as UTF-8"),
    (codecs.BOM_UTF16_BE, "UTF-16 text", "save it as UTF-8"),
)


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes [start, end) of a file, which begin with a line of this number; `end` is None for all that follows."""

    start: int = 0
    end: int | None = None
    first_line: int = 1


WHOLE = Part()


@contextmanager
def opened(name: str, path: Path) -> Iterator[IO[bytes]]:
    """Yield the file's content as a stream, unpacked where its name says that it is compressed.

    Raises:
        InputError: if it is compressed and damaged.
    """
    compression = COMPRESSED.get(path.suffix.lower())
    if compression is None:
        with path.open("rb") as file:
            yield file
        return
    import pyarrow as pa  # 0.1 s, which files as they are need not wait for

    path.open("rb").close()  # so that a file that cannot be opened is not taken for a damaged one
    try:
        with (
            path.open("rb") as packed,
            pa.CompressedInputStream(pa.PythonFile(packed), compression) as stream,
        ):
            yield io.BufferedReader(_Unpacked(name, packed, stream), 2**20)
    except OSError as error:
        raise InputError(f"{name}: damaged {compression} file: {error}") from error


class _Unpacked(io.RawIOBase):
    """What a compressed file unpacks to; more of it than text can be is refused when it is met."""

    def __init__(self, name: str, packed: IO[bytes], stream: Any) -> None:
        self._name, self._packed, self._stream, self._count = name, packed, stream, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer and return how many bytes there were.

        Raises:
            InputError: if the file unpacks to more than text can.
        """
        block = self._stream.read(len(buffer))
        buffer[: len(block)] = block
        self._count += len(block)
        if self._count > UNPACKED_FREELY + MAX_RATIO * self._packed.tell():
            raise InputError(
                f"{self._name}: unpacks to more than {MAX_RATIO} times its size (unpack it yourself)"
            )
        return len(block)


def check_start(name: str, path: Path, magic: bytes | None) -> None:
    """Look at the first bytes; `magic` is what a binary file must begin with, None means text.

    Raises:
        InputError: if the file is empty, or is not what its name says.
    """
    with opened(name, path) as file:
        start = file.read(32)
        if path.suffix.lower() in COMPRESSED:
            for _ in range(_LOOKED_AT // 2**20):
                file.read(2**20)
    if not start:
        raise InputError(f"{name}: the file is empty")
    if magic is not None:
        if not start.startswith(magic):
            raise InputError(f"{name}: not a parquet file (it does not begin with {magic.decode()})")
        return
    for prefix, what, remedy in _MAGIC:
        if start.startswith(prefix):
            raise InputError(f"{name}: is {what} ({remedy})")


def numbered_lines(name: str, path: Path, faults: Faults, part: Part = WHOLE) -> Iterator[tuple[int, str]]:
    """Yield (line number, text with its line ending) of a part; the byte order mark is dropped.

    Raises:
        InputError: if a line is too long, or a compressed file is damaged or unpacks to too much.
    """
    with opened(name, path) as file:
        if part.start:
            file.seek(part.start)
        number, position = part.first_line - 1, part.start
        while (part.end is None or position < part.end) and (raw := file.readline(MAX_LINE_BYTES + 1)):
            number += 1
            position += len(raw)
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
