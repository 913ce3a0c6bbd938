"""Rows of .jsonl and .json files, stricter than Python's own reader.

A key that occurs twice, NaN and Infinity are refused: Python keeps the last of equal keys and reads NaN,
other readers do otherwise, so such a file means different things to different programs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from lora_cli.data.faults import Faults
from lora_cli.data.lines import numbered_lines
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


_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_not_a_number)
_JSON_TYPES = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "a boolean"}


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _BadRow(f"the row is {_JSON_TYPES.get(type(value), 'null')} (an object is needed)")
    return value


def jsonl(name: str, path: Path, faults: Faults) -> Iterator[tuple[int, Values]]:
    """Yield (line, object) for each line that is not blank.

    Raises:
        InputError: if the file is one JSON array.
    """
    first = True
    for number, line in numbered_lines(name, path, faults):
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
            yield number, _object(_JSON.decode(line))
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


def json_array(name: str, path: Path, faults: Faults) -> Iterator[tuple[int, Values]]:
    """Yield (line, object) for each element, decoded one by one, so that each knows its line.

    Raises:
        InputError: if the file is not one JSON array.
    """
    text = "".join(line for _, line in numbered_lines(name, path, faults))
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
            yield line, _object(value)
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
