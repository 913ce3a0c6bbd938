"""`recipe/yaml_reader.py`: which YAML is read, as what, and what is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.errors import InputError
from lora_cli.recipe.nodes import MappingNode, Node, ScalarNode, SequenceNode, resolve
from lora_cli.recipe.yaml_reader import read_file, read_text


def plain(node: Node) -> Any:
    """Return a tree as plain values."""
    if isinstance(node, ScalarNode):
        return node.value
    if isinstance(node, SequenceNode):
        return [plain(item) for item in node.items]
    return {key: plain(value) for key, (_, value) in node.entries.items()}


def read(text: str) -> tuple[Any, list[str]]:
    """Return the values of YAML text and the problems found in it."""
    problems: list[str] = []
    return plain(read_text(text, problems, name="r.yaml")), problems


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("2.0e-4", 2e-4),
        ("-.5", -0.5),
        ("+3", 3),
        ("0", 0),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        *((text, text) for text in ("yes", "no", "on", "off", "Y", "n", "tRue", "nUll")),
        *(
            (text, text)
            for text in ("010", "0o10", "0x1F", "0b1", "1_000", "12:30:45", "2024-01-01", "1.2.3")
        ),
        *((text, text) for text in ("${HOME}", "${oc.env:USER}", "=", "<", "1e", "e5", ".", "-")),
    ],
)
def test_unquoted_scalars_mean_what_yaml_1_2_says(text: str, value: object) -> None:
    """Only null, true, false and decimal numbers are not text; nothing is interpolated."""
    assert resolve(text) == value
    assert type(resolve(text)) is type(value)


def test_infinity_and_nan_are_numbers_for_the_schema_to_refuse() -> None:
    """`.inf` and `.nan` are read as floats, so that the message can name the bounds."""
    assert resolve("-.inf") == float("-inf")
    assert resolve(".nan") != resolve(".nan")


def test_anchors_and_merge_keys_are_read() -> None:
    """An alias stands for its anchor; `<<` adds the keys that the block itself does not have."""
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {y: 4, <<: *a}\nd: {<<: [*a, {z: 5}]}\ne: *a\n"
    values, problems = read(text)
    assert problems == []
    assert values["b"] == {"x": 1, "y": 3}
    assert values["c"] == {"x": 1, "y": 4}
    assert values["d"] == {"x": 1, "y": 2, "z": 5}
    assert values["e"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", "r.yaml:3:1: a: the key is written twice, first at r.yaml:1:1"),
        ("a: {<<: {x: 1}, x: 2, x: 3}", "the key is written twice"),
        ("a: !!python/object/apply:os.system [ls]", "the tag '!!python/object/apply:os.system'"),
        ("a: !env HOME", "the tag '!env'"),
        ("a: !!binary aGk=", "the tag '!!binary'"),
        ("a: !!int x", "before another type"),
        ("1: x", "found 1 as a key"),
        ("? [a, b]\n: x", "found a list or mapping as a key"),
        ("a: {<<: 5}", "`<<` needs a mapping"),
        (r'a: "\0"', "control character"),
    ],
)
def test_what_can_be_read_past_is_a_problem(text: str, expected: str) -> None:
    """These faults are noted, with their place, and the rest of the file is still read."""
    values, problems = read(text + "\nlast: 1\n")
    assert len(problems) == 1
    assert expected in problems[0]
    assert values["last"] == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a:\n\tb: 1\n", "r.yaml:2:1: found a tab in the indentation"),
        ("a: 'x\n", "not valid YAML"),
        ("a: [1, 2\n", "not valid YAML"),
        ("a: b: c\n", "r.yaml:1:5: not valid YAML"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2:1: found a second document"),
        ("a: &a [*a]\n", "r.yaml:1:8: the alias *a stands inside its own anchor"),
        ("a: *b\n", "has no anchor &b"),
        ("a: 1\n\x00", "r.yaml:2:1: found the control character"),
        ("[" * 40 + "]" * 40, "nested deeper than 32"),
        ("[" * 100_000, "nested deeper than 32"),
        ("{a: " * 100_000, "nested deeper than 32"),
        ("a: [" + "1, " * 10_001 + "]", "more than 10000 values"),
    ],
)
def test_what_cannot_be_read_past_is_refused(text: str, expected: str) -> None:
    """These faults end the reading with one line that has a place."""
    with pytest.raises(InputError) as refusal:
        read(text)
    assert len(refusal.value.lines) == 1
    assert expected in refusal.value.lines[0]


def test_aliases_count_as_often_as_they_are_used() -> None:
    """A bomb of 9 levels is refused at once, by the number of nodes; one of 40 levels by its depth."""
    started = time.perf_counter()
    wide = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    wide += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))
    with pytest.raises(InputError, match="more than 10000 values"):
        read(wide)
    deep = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 41))
    with pytest.raises(InputError, match="nested deeper than 32"):
        read(deep)
    assert time.perf_counter() - started < 0.5


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the recipe is empty"),
        (b"# only a comment\n", "the recipe is empty"),
        (b"- a\n- b\n", "found a list"),
        (b"text\n", "found a single value"),
        (b"a: 1\nb: \xff\n", ":2:4: the file is not UTF-8"),
        ("a: 1".encode("utf-16"), ":1:1: the file is not UTF-8"),
        (b"a: " + b"x" * 10_000_000, "larger than 1 MB"),
    ],
)
def test_a_file_that_is_no_mapping_in_utf_8_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    """The line begins with the file's name and a place."""
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as refusal:
        read_file(path, [])
    assert expected in refusal.value.lines[0]
    assert refusal.value.lines[0].startswith(f"{path}:")


def test_a_byte_order_mark_and_crlf_are_read(tmp_path: Path) -> None:
    """Editors on Windows write both."""
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: x\r\n")
    assert plain(read_file(path, [])) == {"a": 1, "b": "x"}


def test_places_are_those_of_the_text() -> None:
    """Line and column count from 1 and point at the key."""
    tree = read_text("a: 1\nblock:\n  inner: [1,\n    2]\n", [], name="f")
    assert isinstance(tree, MappingNode)
    place, block = tree.entries["block"]
    assert place == "f:2:1"
    assert isinstance(block, MappingNode)
    place, items = block.entries["inner"]
    assert place == "f:3:3"
    assert isinstance(items, SequenceNode)
    assert [item.place for item in items.items] == ["f:3:11", "f:4:5"]


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab:{}[],&*!|>-?#'\"\\ \n\t01e.<%@`~é", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    """No text raises anything but InputError."""
    lines: list[str] = []
    try:
        read(text)
    except InputError as error:
        lines = error.lines
    assert all("\n" not in line for line in lines)


_visible = st.characters(codec="utf-8", exclude_categories=["Cc"])
_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(_visible, max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(_values)
def test_json_is_read_as_json_reads_it(value: Any) -> None:
    """JSON is YAML: numbers, texts, lists and objects keep their value and type."""
    text = json.dumps({"top": value}, ensure_ascii=False)
    values, problems = read(text)
    assert values == {"top": value}
    assert problems == []
