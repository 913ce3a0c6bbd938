"""Rows of .jsonl and .json files, stricter than Python's own reader.

A key that occurs twice, NaN and Infinity are refused: Python keeps the last of equal keys and reads NaN,
other readers do otherwise, so such a file means different things to different programs.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from lora_cli.data.faults import Faults
from lora_cli.data.lines import MAX_LINE_BYTES, WHOLE, Part, numbered_lines, opened
from lora_cli.errors import InputError

Values = dict[str, Any]


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


_SPACE = re.compile(r"\s*")
_BLOCK = 2**20
"""Bytes of a .json file that are read at a time."""
STRICT_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_not_a_number)
"""Refuses by a ValueError what other readers read otherwise."""
_JSON_TYPES = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "a boolean"}


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _BadRow(f"the row is {_JSON_TYPES.get(type(value), 'null')} (an object is needed)")
    return value


def jsonl(name: str, path: Path, faults: Faults, part: Part) -> Iterator[tuple[int, Values]]:
    """Yield (line, object) for each line that is not blank.

    Raises:
        InputError: if the file is one JSON array.
    """
    first = not part.start
    for number, line in numbered_lines(name, path, faults, part):
        line = line.strip()
        if not line:
            continue
        where = f"{name}:{number}"
        if first and line.startswith("["):
            raise InputError(
                f"{where}: begins a JSON array (name the file .json, or write one object per line)"
            )
        first = False
        try:
            yield number, _object(STRICT_JSON.decode(line))
        except json.JSONDecodeError as error:
            hint = " (one whole object per line is needed)" if line == "{" else ""
            faults.add(f"{where}: invalid JSON: {error.msg} at column {error.colno}{hint}")
        except _BadRow as error:
            faults.add(f"{where}: {error}")
        except (
            RecursionError,
            ValueError,
        ) as error:  # nested too deeply, or an integer of thousands of digits
            faults.add(f"{where}: invalid JSON: {error}")


def json_array(name: str, path: Path, faults: Faults, part: Part) -> Iterator[tuple[int, Values]]:
    """Yield (line, object) for each element, decoded one by one as the file is read, so that each knows its line.

    Raises:
        InputError: if the file is not one JSON array.
    """
    assert part == WHOLE
    with opened(name, path) as file:
        text = _Text(name, file)
        if text.skip() != "[":
            raise InputError(
                f"{name}:1: not a JSON array of objects (one object per line belongs in a .jsonl file)"
            )
        text.position += 1
        following = text.skip()
        while following != "]":
            line = text.line()
            try:
                yield line, _object(text.decode())
            except _BadRow as error:
                faults.add(f"{name}:{line}: {error}")
            following = text.skip()
            if following == ",":
                text.position += 1
                following = text.skip()
                if following != "]":
                    continue
            elif following == "]":
                continue
            raise InputError(
                f"{name}:{text.line()}: invalid JSON: the array is not closed, or a comma is missing or too many"
            )
        text.position += 1
        if text.skip():
            raise InputError(f"{name}:{text.line()}: invalid JSON: text after the end of the array")


class _Text:
    """The text of a JSON file around `position`, as far as it has been read and not forgotten."""

    def __init__(self, name: str, file: IO[bytes]) -> None:
        self.position = 0
        self._name, self._file = name, file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._buffer, self._counted, self._line = "", 0, 1

    def line(self) -> int:
        """Return the line of the position."""
        self._line += self._buffer.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._line

    def skip(self) -> str:
        """Move past white space and return the character there, nothing at the end."""
        while True:
            self.position = _SPACE.match(self._buffer, self.position).end()  # type: ignore[union-attr]
            if self.position < len(self._buffer) or not self._read(_BLOCK):
                return self._buffer[self.position : self.position + 1]

    def decode(self) -> Any:
        """Return the value at the position and move past it.

        Raises:
            _BadRow: the value is well-formed, but none that this tool reads.
            InputError: it is no JSON value, or longer than MAX_LINE_BYTES.
        """
        while True:
            try:
                try:
                    value, self.position = STRICT_JSON.raw_decode(self._buffer, self.position)
                    return value
                except _BadRow:  # may be known before the value was read to its end
                    self.position = json.JSONDecoder().raw_decode(self._buffer, self.position)[1]
                    raise
            except _BadRow:
                raise
            except json.JSONDecodeError as error:
                # What was read may end within the value: as much again is read before it counts as a fault.
                length = len(self._buffer) - self.position
                if length <= MAX_LINE_BYTES and self._read(max(length, _BLOCK)):
                    continue
                before = self._buffer.rfind("\n", 0, error.pos)
                line = self.line() + self._buffer.count("\n", self.position, error.pos)
                reason = f"invalid JSON: {error.msg} at column {error.pos - before}"
                raise InputError(f"{self._name}:{line}: {reason}") from error
            except (RecursionError, ValueError) as error:
                raise InputError(f"{self._name}:{self.line()}: invalid JSON: {error}") from error

    def _read(self, size: int) -> bool:
        """Read about as many bytes more, and say whether there were any; what stands before the position goes."""
        line = self.line()
        self._buffer, self.position, self._counted = self._buffer[self.position :], 0, 0
        raw = self._file.read(size)
        try:
            more = self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            line += self._buffer.count("\n") + raw.count(b"\n", 0, error.start)
            reason = f"not UTF-8: byte {error.object[error.start]:#04x}"
            raise InputError(f"{self._name}:{line}: {reason} (save the file as UTF-8)") from error
        if "\0" in more:
            line += self._buffer.count("\n") + more.count("\n", 0, more.index("\0"))
            raise InputError(f"{self._name}:{line}: NUL byte (the file is damaged, or not UTF-8 text)")
        self._buffer += more
        return bool(raw)
