"""Strict YAML: text becomes a tree of values that know where they were written, or a list of problems.

A subset of YAML 1.2 (core schema): `1e-4` is a number; `yes`, `010`, `12:30`, `2024-01-01` are text. PyYAML
only supplies the events. The tree is built here, because its constructors keep the last of two equal keys,
call what a tag names, recurse without a limit and lose the position of a value. Size, depth and nodes are
bounded, aliases counted as often as they are used: 429 bytes can otherwise stand for 10^9 values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import yaml

from lora_cli.errors import InputError
from lora_cli.recipe.nodes import MappingNode, Node, ScalarNode, SequenceNode, resolve

MAX_BYTES = 1_000_000
MAX_NODES = 10_000
MAX_DEPTH = 32

_TAG = "tag:yaml.org,2002:"
_TYPE_OF_TAG: dict[str, type | None] = {"int": int, "float": float, "bool": bool, "null": None, "str": str}
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


class _Mark(Protocol):
    """A position in the text, counted from 0; the C parser and the Python parser have a class each."""

    line: int
    column: int


def read_file(path: Path, problems: list[str]) -> MappingNode:
    """Return the tree of a YAML file; what is wrong but can be read past is added to `problems`.

    Raises:
        InputError: the file cannot be read, is larger than 1 MB, not UTF-8, not YAML, empty or not a mapping.
    """
    place = f"{path}:1:1"
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a folder (give a recipe file)")
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is not a plain file (give a recipe file)")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file (give a recipe file)") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{str(path)!r}: cannot be read: {reason}") from None
    if len(content) > MAX_BYTES:
        raise InputError(f"{place}: the file is larger than 1 MB (data goes to data.train)")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise InputError(f"{path}:{line}:{column}: the file is not UTF-8 text (save it as UTF-8)") from None
    node = read_text(text, problems, name=str(path))
    if isinstance(node, ScalarNode) and node.value is None:
        raise InputError(f"{place}: the recipe is empty (write at least data.train)")
    if not isinstance(node, MappingNode):
        kind = "a list" if isinstance(node, SequenceNode) else "a single value"
        raise InputError(f"{node.place}: found {kind} (a recipe is a mapping: model, data, ...)")
    return node


def read_text(text: str, problems: list[str], *, name: str = "", place: str | None = None) -> Node:
    """Return the tree of YAML text; its places are `name:line:column`, or `place` for all of it where given.

    Raises:
        InputError: not YAML, several documents, a self reference, or beyond the bounds on depth and nodes.
    """
    if match := _CONTROL.search(text):
        line = text.count("\n", 0, match.start()) + 1
        column = match.start() - text.rfind("\n", 0, match.start())
        where = place or f"{name}:{line}:{column}"
        raise InputError(f"{where}: found the control character {match.group()!r} (remove it)")
    builder = _Builder(name, place, problems)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C parser is 10 times faster
    try:
        builder.feed(yaml.parse(text, Loader=loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        lines = text.splitlines()
        written = lines[mark.line] if mark and mark.line < len(lines) else ""
        if "\t" in written[: len(written) - len(written.lstrip())]:
            fault = "found a tab in the indentation (use spaces)"
        else:
            fault = f"not valid YAML: {error.problem or error.context} (check quotes, colons and indentation)"
        raise InputError(f"{builder.at(mark)}: {fault}") from None
    except yaml.YAMLError as error:
        detail = " ".join(str(error).split())
        raise InputError(f"{place or name + ':1:1'}: not valid YAML: {detail}") from None
    return builder.root or ScalarNode(builder.at(None), None)


@dataclass(slots=True)
class _Open:
    """A mapping or sequence whose end has not been read; `key` waits for its value."""

    node: MappingNode | SequenceNode
    anchor: str | None
    first_node: int
    height: int = 1
    key: tuple[str, str] | None = None


class _Builder:
    """Builds the tree from parser events with a stack of its own: Python's would end at 1,000 levels."""

    def __init__(self, name: str, place: str | None, problems: list[str]) -> None:
        self.root: Node | None = None
        self._name, self._place, self._problems = name, place, problems
        self._stack: list[_Open] = []
        self._anchors: dict[
            str, tuple[Node, int, int] | None
        ] = {}  # node, nodes in it, height; None: not closed
        self._nodes = 0
        self._documents = 0

    def at(self, mark: _Mark | None) -> str:
        """Return the place of a mark."""
        if self._place is not None:
            return self._place
        return f"{self._name}:{mark.line + 1}:{mark.column + 1}" if mark else f"{self._name}:1:1"

    def feed(self, events: Iterable[yaml.Event]) -> None:
        """Read all events.

        Raises:
            InputError: see `read_text`.
        """
        for event in events:
            place = self.at(event.start_mark)
            if isinstance(event, yaml.DocumentStartEvent):
                self._documents += 1
                if self._documents > 1:
                    raise InputError(f"{place}: found a second document (one recipe per file)")
            elif isinstance(event, yaml.ScalarEvent):
                self._count(place, 1, 1)
                self._close(self._scalar(event, place), event.anchor, self._nodes - 1, 1)
            elif isinstance(event, yaml.AliasEvent):
                self._alias(str(event.anchor), place)
            elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
                self._open(event, place)
            elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
                done = self._stack.pop()
                self._close(done.node, done.anchor, done.first_node, done.height)

    def _count(self, place: str, nodes: int, height: int) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            raise InputError(f"{place}: more than {MAX_NODES} values, aliases expanded (a recipe has dozens)")
        if len(self._stack) + height > MAX_DEPTH:
            raise InputError(f"{place}: nested deeper than {MAX_DEPTH} levels (a recipe has three)")

    def _open(self, event: yaml.MappingStartEvent | yaml.SequenceStartEvent, place: str) -> None:
        self._count(place, 1, 1)
        is_mapping = isinstance(event, yaml.MappingStartEvent)
        faulty = event.tag not in (None, "!", _TAG + ("map" if is_mapping else "seq"))
        if faulty:
            self._problems.append(f"{place}: found the tag {_shown(str(event.tag))} (remove it)")
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        node = MappingNode(place, faulty=faulty) if is_mapping else SequenceNode(place, faulty=faulty)
        self._stack.append(_Open(node, event.anchor, self._nodes - 1))

    def _alias(self, anchor: str, place: str) -> None:
        if anchor not in self._anchors:
            raise InputError(
                f"{place}: the alias *{anchor} has no anchor &{anchor} before it (define it first)"
            )
        target = self._anchors[anchor]
        if target is None:
            raise InputError(f"{place}: the alias *{anchor} stands inside its own anchor (remove it)")
        node, nodes, height = target
        self._count(place, nodes, height)
        self._attach(node, height, place)

    def _close(self, node: Node, anchor: str | None, first_node: int, height: int) -> None:
        if anchor is not None:
            self._anchors[anchor] = (node, self._nodes - first_node, height)
        self._attach(node, height, node.place)

    def _attach(self, node: Node, height: int, place: str) -> None:
        if not self._stack:
            self.root = node
            return
        parent = self._stack[-1]
        parent.height = max(parent.height, height + 1)
        if isinstance(parent.node, SequenceNode):
            parent.node.items.append(node)
        elif parent.key is None:
            parent.key = (self._key(node, place), place)
        else:
            (key, key_place), parent.key = parent.key, None
            self._enter(parent.node, key, key_place, node)

    def _key(self, node: Node, place: str) -> str:
        if isinstance(node, ScalarNode) and isinstance(node.value, str):
            return node.value
        written = str(node.value) if isinstance(node, ScalarNode) else "a list or mapping"
        self._problems.append(f"{place}: found {written} as a key (keys are names)")
        return f"\x00{len(self._problems)}"  # kept apart from every real key, and skipped by `_enter`

    def _enter(self, mapping: MappingNode, key: str, place: str, node: Node) -> None:
        if key.startswith("\x00"):
            return
        if key == "<<":
            self._merge(mapping, place, node)
        elif key in mapping.entries and key not in mapping.merged:
            first = mapping.entries[key][0]
            self._problems.append(f"{place}: {key}: the key is written twice, first at {first} (remove one)")
        else:
            mapping.entries[key] = (place, node)
            mapping.merged.discard(key)

    def _merge(self, mapping: MappingNode, place: str, node: Node) -> None:
        """`<<: *anchor`: keys that are not written here come from there."""
        for source in node.items if isinstance(node, SequenceNode) else [node]:
            if not isinstance(source, MappingNode):
                self._problems.append(
                    f"{place}: `<<` needs a mapping or a list of mappings (write <<: *name)"
                )
                continue
            new = {key: entry for key, entry in source.entries.items() if key not in mapping.entries}
            mapping.entries.update(new)
            mapping.merged.update(new)

    def _scalar(self, event: yaml.ScalarEvent, place: str) -> ScalarNode:
        text, noted = event.value, len(self._problems)
        if match := _CONTROL.search(text):  # reached by escapes: "\0", "\uD800"
            self._problems.append(f"{place}: found the control character {match.group()!r} (remove it)")
        kind = (event.tag or "").removeprefix(_TAG)
        is_text = not event.implicit[0] if event.tag is None else event.tag in ("!", _TAG + "str")
        value = text if is_text else resolve(text)
        if event.tag is not None and not is_text:
            if event.tag == kind or kind not in _TYPE_OF_TAG:
                self._problems.append(f"{place}: found the tag {_shown(event.tag)} (remove it)")
            elif type(value) is not (_TYPE_OF_TAG[kind] or type(None)):
                self._problems.append(
                    f"{place}: found the tag {_shown(event.tag)} before another type (remove it)"
                )
        return ScalarNode(place, value, faulty=len(self._problems) > noted)


def _shown(tag: str) -> str:
    return repr(tag.replace(_TAG, "!!")[:80])
