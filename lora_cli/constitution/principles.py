"""The constitution file: principles by which answers are criticised, revised and judged; read as strictly as a recipe.

    principles:
      - name: privacy
        weight: 2.0                        how often it is drawn beside the others; 1.0 where it is not written
        critique: |                        asked of the critic, after the answer
        revision: |                        asked of it next, after its critique
        judge: |                           asked of the judge, about two answers
        forbidden: ['(?i)password']        an answer in which one of these is found breaks the principle
        not_repeated: ['\\b\\S+@\\S+']     what these find in the last message must not come back in the answer

The last two are optional: they are for counting, nothing is made by them. Which principle is drawn is a function of the
seed, the row and the round (section 3.1 of the paper draws one for each step of revision, 4.1 one for each pair).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_cli.errors import InputError
from lora_cli.recipe.nodes import MappingNode, Node, ScalarNode, SequenceNode
from lora_cli.recipe.section import regex_fault
from lora_cli.recipe.suggest import nearest
from lora_cli.recipe.yaml_reader import MAX_BYTES, read_text
from lora_cli.seeding import stream_seed

_TEXTS = ("name", "critique", "revision", "judge")
_PATTERNS = ("forbidden", "not_repeated")
_KEYS = (*_TEXTS, "weight", *_PATTERNS)


@dataclass(frozen=True, slots=True)
class Principle:
    """One principle; `weight` is relative to the others'."""

    name: str
    critique: str
    revision: str
    judge: str
    weight: float = 1.0
    forbidden: tuple[re.Pattern[str], ...] = ()
    not_repeated: tuple[re.Pattern[str], ...] = ()

    @property
    def has_rule(self) -> bool:
        """Whether a break of it can be counted."""
        return bool(self.forbidden or self.not_repeated)


@dataclass(frozen=True, slots=True)
class Principles:
    """All principles of a file, in its order, and the file's text."""

    every: tuple[Principle, ...]
    text: str

    @property
    def sha256(self) -> str:
        """Identifies the file's content."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def drawn(self, seed: int, step: str, row: int, index: int) -> Principle:
        """Return the principle of a step (`revise`, `judge`) at a row and a round or pair of it; weights decide."""
        whole = math.fsum(one.weight for one in self.every)
        left = stream_seed(seed, "principle", step, row, index) / 2**63 * whole
        for one in self.every:
            left -= one.weight
            if left < 0:
                return one
        return self.every[-1]  # the sum above was rounded up


def read_principles(path: Path) -> Principles:
    """Return the principles of a file.

    Raises:
        InputError: it cannot be read or is not sound; with one line for each fault, `file:line:column: key: ...`.
    """
    text = _text_of(path)
    problems: list[str] = []
    node = read_text(text, problems, name=str(path))
    every = _principles(node, str(path), problems)
    if problems:
        raise InputError(dict.fromkeys(problems))
    return Principles(tuple(every), text)


def _text_of(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is no plain file (give a YAML file with principles)")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise InputError(f"{path}: is larger than 1 MB (a constitution has some principles)")
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file (give a YAML file with principles)") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: the file is not UTF-8 text (save it as UTF-8)") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _principles(root: Node, path: str, problems: list[str]) -> list[Principle]:
    if not isinstance(root, MappingNode) or "principles" not in root.entries:
        raise InputError(f"{root.place}: has no principles (write principles: and a list of them)")
    for key, (place, _) in root.entries.items():
        if key != "principles":
            problems.append(f"{place}: {key}: unknown key (there is principles)")
    place, listed = root.entries["principles"]
    if not isinstance(listed, SequenceNode) or not listed.items:
        raise InputError(f"{place}: principles: found no list (write at least one principle)")
    found: list[Principle] = []
    first: dict[str, str] = {}
    for index, node in enumerate(listed.items):
        known = len(problems)
        principle = _principle(node, f"principles[{index}]", problems)
        if principle is None or len(problems) > known:
            continue
        if principle.name in first:
            problems.append(
                f"{node.place}: principles[{index}].name: {principle.name!r} is the name of the one at"
                f" {first[principle.name]} too (choose another)"
            )
        first[principle.name] = node.place
        found.append(principle)
    return found


def _principle(node: Node, key: str, problems: list[str]) -> Principle | None:
    if not isinstance(node, MappingNode):
        problems.append(f"{node.place}: {key}: is no principle (write {', '.join(_TEXTS)})")
        return None
    for name, (place, _) in node.entries.items():
        if name not in _KEYS:
            near = nearest(name, _KEYS)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(_KEYS)}"
            problems.append(f"{place}: {key}.{name}: unknown key ({hint})")
    name, critique, revision, judge = (_text(node, one, key, problems) for one in _TEXTS)
    weight = _weight(node.entries, key, problems)
    forbidden, repeated = (_patterns(node.entries, one, key, problems) for one in _PATTERNS)
    return Principle(name, critique, revision, judge, weight, forbidden, repeated)


def _text(node: MappingNode, name: str, key: str, problems: list[str]) -> str:
    if name not in node.entries:
        problems.append(f"{node.place}: {key}.{name}: is missing (write a text)")
        return ""
    place, value = node.entries[name]
    text = value.value if isinstance(value, ScalarNode) else None
    if not isinstance(text, str) or not text.strip():
        problems.append(f"{place}: {key}.{name}: is no text (write one; a number needs quotes)")
        return ""
    if name == "name" and "\n" in text.strip():
        problems.append(f"{place}: {key}.name: has several lines (use one)")
    return text.strip()


def _weight(entries: Mapping[str, tuple[str, Node]], key: str, problems: list[str]) -> float:
    if "weight" not in entries:
        return 1.0
    place, node = entries["weight"]
    value = node.value if isinstance(node, ScalarNode) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e6:
        problems.append(f"{place}: {key}.weight: is no number above 0 and up to 1000000 (correct it)")
        return 1.0
    return float(value)


def _patterns(
    entries: Mapping[str, tuple[str, Node]], name: str, key: str, problems: list[str]
) -> tuple[re.Pattern[str], ...]:
    if name not in entries:
        return ()
    place, node = entries[name]
    if not isinstance(node, SequenceNode) or not node.items:
        problems.append(f"{place}: {key}.{name}: is no list of regular expressions (write ['...'])")
        return ()
    found = []
    for item in node.items:
        text = item.value if isinstance(item, ScalarNode) else None
        if not isinstance(text, str) or not text:
            problems.append(f"{item.place}: {key}.{name}: holds what is no text (put it in quotes)")
        elif fault := regex_fault(text):
            problems.append(f"{item.place}: {key}.{name}: {fault} (correct it)")
        else:
            found.append(re.compile(text))
    return tuple(found)
