"""A JSONL file that is written row by row and gone on with at the next one, wherever its writer was killed.

Every line is one row and holds its number as `row`, from 0 on. A line that a kill cut short is cut off when the file is
opened again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Self

from lora_cli.disk import writing
from lora_cli.errors import InputError

CRITIQUES_FILE, SFT_FILE = "critiques.jsonl", "sft.jsonl"
JUDGEMENTS_FILE, PAIRS_FILE = "judgements.jsonl", "pairs.jsonl"
ENDPOINT_FILE = "endpoint.jsonl"


class Journal:
    """The rows of a file, in order; `done` of them are there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done = 0
        with writing(path):
            self._file: IO[bytes] = path.open("a+b")
        whole = cut_torn_line(self._file, path)
        self._file.seek(0)
        for number, line in enumerate(self._file, start=1):
            if parse(line, f"{path}:{number}").get("row") != self.done:
                raise InputError(f"{path}:{number}: is not row {self.done} (--overwrite makes all anew)")
            self.done += 1
        assert self._file.tell() == whole

    def append(self, values: Mapping[str, Any]) -> None:
        """Write the next row.

        Raises:
            ResourceError: it cannot be written.
        """
        with writing(self.path):
            self._file.write(dumped({"row": self.done, **values}))
            self._file.flush()
        self.done += 1

    def close(self) -> None:
        """Flush the rows to disk and close the file."""
        with writing(self.path):
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: object) -> None:
        self.close()


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file; a last line that was cut short is left out.

    Raises:
        InputError: it cannot be read, or a line is no JSON object.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    yield parse(line, f"{path}:{number}")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def parse(line: bytes, where: str) -> dict[str, Any]:
    """Return the object of a line.

    Raises:
        InputError: it is none.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{where}: is damaged: no JSON object (--overwrite makes all anew)")
    return value


def dumped(values: Mapping[str, Any]) -> bytes:
    """Return an object as a line of JSON; half surrogate pairs become question marks."""
    return (json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "replace")


def cut_torn_line(file: IO[bytes], path: Path) -> int:
    """Cut off what follows the last line break of an open file, and return its size."""
    end = file.seek(0, os.SEEK_END)
    with writing(path):
        whole = end
        while whole:
            start = max(0, whole - 65536)
            file.seek(start)
            at = file.read(whole - start).rfind(b"\n")
            if at >= 0:
                whole = start + at + 1
                break
            whole = start
        file.truncate(whole)
        file.seek(whole)
    return whole
