"""The constitution file: read strictly, and its principles drawn as a function."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from lora_cli.constitution.principles import Principles, read_principles
from lora_cli.errors import InputError

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs/constitutions"
GOOD = "principles:\n  - {name: one, critique: c, revision: r, judge: j}\n"


def written(folder: Path, text: str) -> Path:
    """Write a constitution file."""
    path = folder / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_the_constitutions_of_the_project_are_sound(path: Path) -> None:
    """Each can be read, and its header says where its principles come from."""
    assert read_principles(path).every
    assert re.search(r"arXiv|Regulation", path.read_text(encoding="utf-8").split("principles:")[0])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("principles: []", r"c\.yaml:1:1: principles: found no list"),
        ("about: x", r"c\.yaml:1:1: has no principles"),
        (GOOD + "more: 1\n", r"c\.yaml:3:1: more: unknown key"),
        (GOOD.replace("judge: j", "judges: j, judge: j"), r"principles\[0\]\.judges: unknown key \(did you mean judge"),
        (GOOD.replace(", judge: j", ""), r"c\.yaml:2:5: principles\[0\]\.judge: is missing"),
        (GOOD.replace("judge: j", "judge: 3"), r"c\.yaml:2:\d+: principles\[0\]\.judge: is no text"),
        (GOOD.replace("judge: j", "judge: ''"), r"c\.yaml:2:\d+: principles\[0\]\.judge: is no text"),
        (GOOD.replace("judge: j", "judge: j, weight: 0"), r"c\.yaml:2:\d+: principles\[0\]\.weight: is no number"),
        (GOOD.replace("judge: j", "judge: j, weight: .nan"), r"c\.yaml:2:\d+: principles\[0\]\.weight: is no number"),
        (GOOD.replace("judge: j", "judge: j, weight: true"), r"c\.yaml:2:\d+: principles\[0\]\.weight: is no number"),
        (GOOD.replace("judge: j", "judge: j, forbidden: ['(']"), r"c\.yaml:2:\d+: .*forbidden: .* is not a regular"),
        (GOOD.replace("judge: j", "judge: j, forbidden: x"), r"c\.yaml:2:\d+: principles\[0\]\.forbidden: is no list"),
        (GOOD + GOOD.split("\n", 1)[1], r"c\.yaml:3:5: principles\[1\]\.name: 'one' is .*c\.yaml:2:5"),
        (GOOD.replace("name: one", "name: one, name: two"), r"c\.yaml:2:\d+: name: the key is written twice"),
        ("principles: [a", r"c\.yaml:\d+:\d+: not valid YAML"),
        ("principles:\n  - text\n", r"c\.yaml:2:5: principles\[0\]: is no principle"),
    ],
)  # fmt: skip
def test_a_fault_is_told_with_its_line(tmp_path: Path, text: str, line: str) -> None:
    """A file that is not sound is refused by file, line and key, and with what to do in brackets."""
    with pytest.raises(InputError) as caught:
        read_principles(written(tmp_path, text))
    (told,) = caught.value.lines
    assert re.search(line, told), told
    assert told.endswith(")")


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    """A file with three faults needs one look."""
    text = "principles:\n  - {name: one, critique: c, revision: 4}\n  - {}\n"
    with pytest.raises(InputError) as caught:
        read_principles(written(tmp_path, text))
    assert len(caught.value.lines) == 6


def drawn(principles: Principles, rows: int, seed: int = 0) -> list[str]:
    """Return the names that are drawn for the first rows."""
    return [principles.drawn(seed, "revise", row, 0).name for row in range(rows)]


def test_a_principle_is_drawn_as_a_function(tmp_path: Path) -> None:
    """Equal arguments give equal principles; seed, step, row and round each change them; weights are kept to."""
    text = GOOD.replace("judge: j", "judge: j, weight: 3") + GOOD.split("\n", 1)[1].replace("one", "two")
    principles = read_principles(written(tmp_path, text))
    assert drawn(principles, 50) == drawn(principles, 50)
    assert drawn(principles, 50)[:20] == drawn(principles, 20)
    assert drawn(principles, 50) != drawn(principles, 50, seed=1)
    assert drawn(principles, 50) != [principles.drawn(0, "judge", row, 0).name for row in range(50)]
    assert drawn(principles, 50) != [principles.drawn(0, "revise", row, 1).name for row in range(50)]
    counts = Counter(drawn(principles, 4000))
    assert abs(counts["one"] - 3000) < 150  # 5.5 standard deviations
