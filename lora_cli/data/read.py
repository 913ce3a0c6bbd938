"""Rows that know the line they stand on, from files and from the hub.

Local files never pass through the `datasets` library: it infers one type per column from the first rows and
fails far from the row that differs, and importing it takes longer than reading most files. Hub data sets do;
a hub id always has an owner (`owner/name`), so that no name can select one of that library's file builders.

A fault of the file raises at once. A fault of one row goes to `Faults`, so that the first five are told
together.
"""

from __future__ import annotations

import csv
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.data.faults import Faults
from lora_cli.data.hub import HUB_ID, load_hub
from lora_cli.data.json_rows import Values, json_array, jsonl
from lora_cli.data.lines import MAX_LINE_BYTES, check_start, numbered_lines
from lora_cli.errors import InputError


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
        separator = ":" if self.path.suffix.lower() != ".parquet" else ": row "
        reader, magic = _READERS[self.path.suffix.lower()]
        try:
            check_start(self.name, self.path, magic)
            empty = True
            for number, values in reader(self.name, self.path, faults):
                empty = False
                yield RawRow(values, f"{self.name}{separator}{number}", number)
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


def _csv(name: str, path: Path, faults: Faults) -> Iterator[tuple[int, Values]]:
    last = 0

    def text() -> Iterator[str]:
        nonlocal last
        for number, line in numbered_lines(name, path, faults):
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
            yield number, dict(zip(header, cells, strict=True))


def _txt(name: str, path: Path, faults: Faults) -> Iterator[tuple[int, Values]]:
    for number, line in numbered_lines(name, path, faults):
        line = line.rstrip("\r\n")
        if line.strip():
            yield number, {"text": line}


def _parquet(name: str, path: Path, _faults: Faults) -> Iterator[tuple[int, Values]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield number, values
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: text that is no UTF-8
        reason = str(error).split("\n")[0]
        raise InputError(f"{name}: damaged parquet file after row {number}: {reason}") from error


_Reader = Callable[[str, Path, Faults], Iterator[tuple[int, Values]]]
_READERS: dict[str, tuple[_Reader, bytes | None]] = {
    ".jsonl": (jsonl, None),
    ".json": (json_array, None),
    ".csv": (_csv, None),
    ".parquet": (_parquet, b"PAR1"),
    ".txt": (_txt, None),
}
