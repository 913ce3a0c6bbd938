"""A row's columns: taken by name, checked to be text, and named in messages as the user wrote them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any

from lora_cli.data.read import RawRow
from lora_cli.errors import InputError


def text_of(value: Any, field: str, where: str, *, empty: bool = False) -> str:
    """Return `value` if it is text that can be tokenized.

    Raises:
        InputError: it is no text, is empty where it may not be, or holds half a surrogate pair.
    """
    if not isinstance(value, str):
        raise InputError(f"{where}: {field} is {kind_of(value)} (text is needed)")
    if not empty and not value.strip():
        raise InputError(f"{where}: {field} is empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            code = f"U+{ord(value[error.start]):04X}"
            raise InputError(
                f"{where}: {field} holds half a surrogate pair ({code}): not valid text"
            ) from error
    return value


def column(row: RawRow, name: str) -> Any:
    """Return the value of a column.

    Raises:
        InputError: the row has none of this name.
    """
    if name not in row.values:
        raise InputError(
            f"{row.where}: column {name!r} is missing (found: {listed(row.values)}{near(name, row)})"
        )
    return row.values[name]


def near(name: str, row: RawRow) -> str:
    """Return `; did you mean ...?` where the row has a column that looks alike."""
    found = difflib.get_close_matches(name, list(row.values), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def listed(names: Iterable[Any]) -> str:
    """Return the names with commas between."""
    return ", ".join(str(name) for name in names) or "none"


def kind_of(value: Any) -> str:
    """Return the name of a JSON value's type."""
    return "null" if value is None else type(value).__name__


def parsed(value: Any, field: str, where: str) -> Any:
    """Return a JSON value, which may be written as a text: many data sets do so to keep a column of one type.

    Raises:
        InputError: it is a text that is not valid JSON, or holds half a surrogate pair.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: {field} is not valid JSON ({error})") from error
    _require_text(value, field, where)
    return value


def _require_text(value: Any, field: str, where: str) -> None:
    """Refuse a JSON value with text in it that cannot be tokenized."""
    if isinstance(value, str):
        text_of(value, field, where, empty=True)
    elif isinstance(value, dict):
        for key, inner in value.items():
            text_of(key, field, where, empty=True)
            _require_text(inner, f"{field}.{key}", where)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _require_text(inner, f"{field}[{index}]", where)
