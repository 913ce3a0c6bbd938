"""The tree of a YAML text: values that know their place, and what an unquoted scalar stands for."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,4000})")  # int() of more digits takes quadratic time
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **{sign + dot: float(sign + "inf") for sign in ("", "+", "-") for dot in (".inf", ".Inf", ".INF")},
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}

Scalar = str | int | float | bool | None


@dataclass(slots=True)
class ScalarNode:
    """A value and where it was written; `faulty` nodes have a problem noted and are not looked at further."""

    place: str
    value: Scalar
    faulty: bool = False


@dataclass(slots=True)
class SequenceNode:
    """A list and where it begins."""

    place: str
    items: list[Node] = field(default_factory=list)
    faulty: bool = False


@dataclass(slots=True)
class MappingNode:
    """A block of keys, each with the place of the key and its value."""

    place: str
    entries: dict[str, tuple[str, Node]] = field(default_factory=dict)
    merged: set[str] = field(default_factory=set)
    """Keys that came by `<<: *anchor`; writing one of them here is not a duplicate."""
    faulty: bool = False


Node = ScalarNode | SequenceNode | MappingNode


def resolve(text: str) -> Scalar:
    """Return what an unquoted scalar stands for: null, true or false, a number, else the text itself."""
    if text in _SPECIAL:
        return _SPECIAL[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text) and not re.match(r"[-+]?0[0-9]", text):  # 010: 8 in YAML 1.1, 10 in 1.2
        return float(text)
    return text
