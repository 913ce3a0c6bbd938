"""Rows that know the line they stand on, from files and from the hub.

Local files never pass through the `datasets` library: it infers one type per column from the first rows and
fails far from the row that differs, and importing it takes longer than reading most files. Hub data sets do;
a hub id always has an owner (`owner/name`), so that no name can select one of that library's file builders.

A fault of the file raises at once. A fault of one row goes to `Faults`, so that the first five are told
together.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lora_cli.data.faults import Faults
from lora_cli.data.hub import HUB_ID, load_hub
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


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it was written; `where` is `file:line` (`name: row n` for parquet and the hub)."""

    values: dict[str, Any]
    where: str
    number: int


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows come from: a local file, or a hub data set (`path` is None) and its split."""

    name: str
    path: Path | None
    split: str

    def rows(self, faults: Faults) -> Iterator[RawRow]:
        """Yield the rows in order; bad ones are added to `faults` and left out.

        Raises:
            InputError: if the source as a whole cannot be read, or holds no rows.
        """
        if self.path is None:
            for index, values in enumerate(load_hub(self.name, self.split), start=1):
                yield RawRow(dict(values), f"{self.name}: row {index}", index)
            return
        reader, magic = _READERS[self.path.suffix.lower()]
        try:
            _check_start(self.name, self.path, magic)
            empty = True
            for row in reader(self.name, self.path, faults):
                empty = False
                yield row
        except OSError as error:
            raise InputError(f"{self.name}: cannot be read: {error.strerror or error}") from error
        if empty and not faults.count:
            raise InputError(f"{self.name}: holds no rows (only blank lines or a header)")


def find_source(name: str, key: str, split: str) -> Source:
    """Decide whether `name` is a local file or a hub id; `key` is the recipe's key, for messages.

    Raises:
        InputError: if it is neither, or the file is missing, not a regular file, or of an unknown type.
    """
    path = Path(name).expanduser()
    known = ", ".join(_READERS)
    if path.is_dir():
        raise InputError(f"{key}: {name} is a directory (name one file: {known})")
    if path.exists():
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{key}: {name} is not a regular file")
        if path.suffix.lower() not in _READERS:
            raise InputError(f"{key}: {name}: unknown file type {path.suffix!r} (known: {known})")
        return Source(name, path, split)
    if path.is_symlink():
        raise InputError(f"{key}: {name} is a broken symbolic link")
    if path.suffix.lower() not in _READERS and HUB_ID.fullmatch(name):
        return Source(name, None, split)
    hint = f"a file that ends in {known}, or a hub id `owner/name`"
    raise InputError(f"{key}: {name}: no such file (write {hint})")


def _check_start(name: str, path: Path, magic: bytes | None) -> None:
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


def _lines(name: str, path: Path, faults: Faults) -> Iterator[tuple[int, str]]:
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


class _BadRow(ValueError):
    """A row that is well-formed JSON, but not one this tool reads."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _BadRow(f"key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice in one object")
    return result


def _not_a_number(constant: str) -> NoReturn:
    raise _BadRow(f"{constant} is not valid JSON (use null or a string)")


_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_not_a_number)
_JSON_TYPES = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "a boolean"}


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _BadRow(f"the row is {_JSON_TYPES.get(type(value), 'null')} (an object is needed)")
    return value


def _jsonl(name: str, path: Path, faults: Faults) -> Iterator[RawRow]:
    for number, line in _lines(name, path, faults):
        line = line.strip()
        if not line:
            continue
        where = f"{name}:{number}"
        try:
            yield RawRow(_object(_JSON.decode(line)), where, number)
        except json.JSONDecodeError as error:
            hint = " (a JSON array over several lines belongs in a .json file)" if line in "[{" else ""
            faults.add(f"{where}: invalid JSON: {error.msg} at column {error.colno}{hint}")
        except _BadRow as error:
            faults.add(f"{where}: {error}")
        except (
            RecursionError,
            ValueError,
        ) as error:  # nested too deeply, or an integer of thousands of digits
            faults.add(f"{where}: invalid JSON: {error}")


def _json(name: str, path: Path, faults: Faults) -> Iterator[RawRow]:
    """Decode the array element by element: each row then knows its line, and only one is in memory."""
    text = "".join(line for _, line in _lines(name, path, faults))
    faults.raise_if_any()
    space = re.compile(r"\s*")

    def skip(position: int) -> int:
        return space.match(text, position).end()  # type: ignore[union-attr]

    position, line, counted = skip(0), 1, 0
    if text[position : position + 1] != "[":
        raise InputError(
            f"{name}:1: not a JSON array of objects (one object per line belongs in a .jsonl file)"
        )
    position = skip(position + 1)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        where = f"{name}:{line}"
        try:
            value, position = _JSON.raw_decode(text, position)
            yield RawRow(_object(value), where, line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{name}:{error.lineno}: invalid JSON: {error.msg} at column {error.colno}"
            ) from error
        except _BadRow as error:
            faults.add(f"{where}: {error}")
            position = json.JSONDecoder().raw_decode(text, counted)[1]
        except (RecursionError, ValueError) as error:
            raise InputError(f"{where}: invalid JSON: {error}") from error
        position = skip(position)
        if text[position : position + 1] == ",":
            position = skip(position + 1)
            if text[position : position + 1] != "]":
                continue
        elif text[position : position + 1] == "]":
            continue
        line += text.count("\n", counted, position)
        raise InputError(
            f"{name}:{line}: invalid JSON: the array is not closed, or a comma is missing or too many"
        )
    end = skip(position + 1)
    if end != len(text):
        line += text.count("\n", counted, end)
        raise InputError(f"{name}:{line}: invalid JSON: text after the end of the array")


def _csv(name: str, path: Path, faults: Faults) -> Iterator[RawRow]:
    last = 0

    def text() -> Iterator[str]:
        nonlocal last
        for number, line in _lines(name, path, faults):
            last = number
            yield line

    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(text(), strict=True)
    header: list[str] | None = None
    while True:
        number = last + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(f"{name}:{number}: invalid CSV: {error}") from error
        if not cells:
            continue
        if header is None:
            header = cells
            twice = next((cell for cell in cells if cells.count(cell) > 1), None)
            if twice is not None:
                raise InputError(f"{name}:{number}: column {twice!r} occurs twice in the header")
        elif len(cells) != len(header):
            faults.add(f"{name}:{number}: {len(cells)} cells, the header has {len(header)}")
        else:
            yield RawRow(dict(zip(header, cells, strict=True)), f"{name}:{number}", number)


def _txt(name: str, path: Path, faults: Faults) -> Iterator[RawRow]:
    for number, line in _lines(name, path, faults):
        line = line.rstrip("\r\n")
        if line.strip():
            yield RawRow({"text": line}, f"{name}:{number}", number)


def _parquet(name: str, path: Path, _faults: Faults) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield RawRow(values, f"{name}: row {number}", number)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"{name}: damaged parquet file after row {number}: {reason}") from error


_Reader = Callable[[str, Path, Faults], Iterator[RawRow]]
_READERS: dict[str, tuple[_Reader, bytes | None]] = {
    ".jsonl": (_jsonl, None),
    ".json": (_json, None),
    ".csv": (_csv, None),
    ".parquet": (_parquet, b"PAR1"),
    ".txt": (_txt, None),
}
