"""Rows that know the line they stand on, from files and from the hub.

Local files never pass through the `datasets` library: it infers one type per column from the first rows and
fails far from the row that differs, and importing it takes longer than reading most files. Hub data sets do;
a hub id always has an owner (`owner/name`), so that no name can select one of that library's file builders.

A fault of the file raises at once. A fault of one row goes to `Faults`, so that the first five are told
together.
"""

from __future__ import annotations

import csv
import glob
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.data.faults import Faults
from lora_cli.data.hub import HUB_ID, load_hub
from lora_cli.data.json_rows import Values, json_array, jsonl
from lora_cli.data.lines import COMPRESSED, MAX_LINE_BYTES, WHOLE, Part, check_start, numbered_lines
from lora_cli.errors import InputError


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it was written; `where` is `file:line` (`name: row n` for parquet and the hub)."""

    values: dict[str, Any]
    where: str
    number: int


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows come from: a local file, or a hub data set (`path` is None) with its split and revision."""

    name: str
    path: Path | None
    split: str
    revision: str | None = None

    @property
    def separator(self) -> str:
        """What stands between the name and the number of a row."""
        return ": row " if self.path is None or _kind(self.path) == ".parquet" else ":"

    def rows(self, faults: Faults, part: Part = WHOLE) -> Iterator[RawRow]:
        """Yield the rows of a part in order; bad ones are added to `faults` and left out.

        Raises:
            InputError: if the source as a whole cannot be read, or is whole and holds no rows.
        """
        if self.path is None:
            index = 0
            for index, values in enumerate(load_hub(self.name, self.split, self.revision), start=1):
                yield RawRow(dict(values), f"{self.name}{self.separator}{index}", index)
            if not index:
                raise InputError(f"{self.name}: holds no rows in split {self.split}")
            return
        reader, magic = _READERS[_kind(self.path)]
        try:
            if not part.start:
                check_start(self.name, self.path, magic)
            empty = True
            for number, values in reader(self.name, self.path, faults, part):
                empty = False
                yield RawRow(values, f"{self.name}{self.separator}{number}", number)
        except OSError as error:
            raise InputError(f"{self.name}: cannot be read: {error.strerror or error}") from error
        if empty and part == WHOLE and not faults.count:
            raise InputError(f"{self.name}: holds no rows (only blank lines or a header)")

    def can_be_parted(self) -> bool:
        """Say whether rows can be read from the middle of the file: one a line, and not compressed."""
        return self.path is not None and self.path.suffix.lower() in (".jsonl", ".txt")


def find_sources(names: str | list[str], key: str, split: str, revision: str | None = None) -> list[Source]:
    """Return the files and hub data sets that `names` names, in its order; `key` is the recipe's, for messages.

    Raises:
        InputError: if one is neither, or a file is missing, not a regular file, of an unknown type, or named twice.
    """
    found: list[Source] = []
    for name in [names] if isinstance(names, str) else names:
        found += _find(name, key, split, revision)
    if not found:
        raise InputError(f"{key}: names no file or data set (name one)")
    twice = next((one.name for index, one in enumerate(found) if one in found[:index]), None)
    if twice is not None:
        raise InputError(
            f"{key}: {twice} is named twice (leave one out; a weight in data.sources repeats rows)"
        )
    return found


def _find(name: str, key: str, split: str, revision: str | None) -> list[Source]:
    path = Path(name).expanduser()
    if path.is_dir():
        inside = sorted(one for one in path.rglob("*") if not _hidden(one.relative_to(path)))
        files = _readable(inside, key)
        if not files:
            raise InputError(f"{key}: {name} is a folder without rows (its files must end in {_KNOWN})")
        return [Source(str(one), one, split) for one in files]
    if path.exists():
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{key}: {name} is not a regular file")
        if _kind(path) not in _READERS:
            raise InputError(f"{key}: {name}: unknown file type {path.suffix!r} (known: {_KNOWN})")
        return [Source(name, path, split)]
    if path.is_symlink():
        raise InputError(f"{key}: {name} is a broken symbolic link")
    if any(character in name for character in "*?["):
        files = _readable(sorted(Path(one) for one in glob.glob(str(path), recursive=True)), key)
        if not files:
            raise InputError(f"{key}: {name}: no file matches this pattern (files must end in {_KNOWN})")
        return [Source(str(one), one, split) for one in files]
    if _kind(path) not in _READERS and HUB_ID.fullmatch(name):
        return [Source(name, None, split, revision)]
    hint = f"a file that ends in {_KNOWN}, a folder of such files, or a hub id `owner/name`"
    raise InputError(f"{key}: {name}: no such file (write {hint})")


def _readable(paths: Sequence[Path], key: str) -> list[Path]:
    """Return the files among them that hold rows, by their endings.

    Raises:
        InputError: one is a link to a file that is not there, or no file at all.
    """
    named = [path for path in paths if _kind(path) in _READERS]
    gone = next((path for path in named if path.is_symlink() and not path.exists()), None)
    if gone is not None:
        raise InputError(f"{key}: {gone} is a broken symbolic link")
    special = next((path for path in named if not path.is_file() and not path.is_dir()), None)
    if special is not None:
        raise InputError(f"{key}: {special} is not a regular file")
    return [path for path in named if path.is_file()]


def _kind(path: Path) -> str:
    """Return the ending that says how a file is read, that of a compressed one without the compression's."""
    ending = path.suffix.lower()
    inner = Path(path.stem).suffix.lower() if ending in COMPRESSED else ending
    return ending if ending in COMPRESSED and inner == ".parquet" else inner


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _csv(name: str, path: Path, faults: Faults, part: Part) -> Iterator[tuple[int, Values]]:
    assert part == WHOLE
    first, last, torn = 0, 0, False
    """Of the row being read: its lines, and whether one between them is missing, since it was no text."""

    def text() -> Iterator[str]:
        nonlocal first, last, torn
        for number, line in numbered_lines(name, path, faults):
            torn = torn or (first > 0 and number != last + 1)
            first, last = first or number, number
            yield line

    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(text(), strict=True)
    header: list[str] | None = None
    while True:
        first, torn = 0, False
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(f"{name}:{first}: invalid CSV: {error}") from error
        number = first
        if not cells or torn:
            continue
        if header is None:
            faults.raise_if_any()  # without its line the first row would be taken for the header
            header = cells
            twice = next((cell for cell in cells if cells.count(cell) > 1), None)
            if twice is not None:
                raise InputError(f"{name}:{number}: column {twice!r} occurs twice in the header")
        elif len(cells) != len(header):
            faults.add(f"{name}:{number}: {len(cells)} cells, the header has {len(header)}")
        else:
            yield number, dict(zip(header, cells, strict=True))


def _txt(name: str, path: Path, faults: Faults, part: Part) -> Iterator[tuple[int, Values]]:
    for number, line in numbered_lines(name, path, faults, part):
        line = line.rstrip("\r\n")
        if line.strip():
            yield number, {"text": line}


def _parquet(name: str, path: Path, _faults: Faults, part: Part) -> Iterator[tuple[int, Values]]:
    assert part == WHOLE
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


_Reader = Callable[[str, Path, Faults, Part], Iterator[tuple[int, Values]]]
_READERS: dict[str, tuple[_Reader, bytes | None]] = {
    ".jsonl": (jsonl, None),
    ".json": (json_array, None),
    ".csv": (_csv, None),
    ".parquet": (_parquet, b"PAR1"),
    ".txt": (_txt, None),
}
"""How files of each ending are read, and what a binary one begins with; only .jsonl and .txt can be read in parts."""
_KNOWN = ", ".join(_READERS)
