"""A row's columns: taken by name, checked to be text, and named in messages as the user wrote them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from lora_cli.data.json_rows import STRICT_JSON
from lora_cli.data.read import RawRow
from lora_cli.errors import InputError

MAX_DEPTH = 64
"""Deepest nesting of a function's description or arguments; JSON schemas of real functions have under 20."""
_LISTED = 20


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
    found = difflib.get_close_matches(name, [one for one in row.values if len(one) <= 60], n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def listed(names: Iterable[Any]) -> str:
    """Return the names with commas between, the first of many, and no more of one than a line holds."""
    shown = [str(name) for name in names]
    more = [f"{len(shown) - _LISTED:,} more"] if len(shown) > _LISTED else []
    return (
        ", ".join([name if len(name) <= 60 else f"{name[:60]}..." for name in shown[:_LISTED]] + more)
        or "none"
    )


def quoted(value: Any) -> str:
    """Return a value as a message shows it: as it was written, but for the rest of a long one."""
    text = repr(value if not isinstance(value, str) else value[:60])
    return f"{text[:60]}..." if len(text) > 70 or (isinstance(value, str) and len(value) > 60) else text


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
            value = STRICT_JSON.decode(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: {field} is not valid JSON ({error})") from error
    _require_text(value, field, where)
    return value


def _require_text(value: Any, field: str, where: str, depth: int = 0) -> None:
    """Refuse a JSON value with text in it that cannot be tokenized, or that is too deep for a template to write."""
    if depth > MAX_DEPTH:
        raise InputError(
            f"{where}: {field[:60]}... is nested deeper than {MAX_DEPTH} levels (make it flatter)"
        )
    if isinstance(value, str):
        text_of(value, field, where, empty=True)
    elif isinstance(value, dict):
        for key, inner in value.items():
            text_of(key, field, where, empty=True)
            _require_text(inner, f"{field}.{key}", where, depth + 1)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _require_text(inner, f"{field}[{index}]", where, depth + 1)
