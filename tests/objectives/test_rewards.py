"""Each reward on completions that a reader can judge, within the range that it states."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_cli.errors import InputError
from lora_cli.objectives._rewards import Answer, build
from lora_cli.recipe.rollout_blocks import Reward

TICKET = '{"product":"Brivo","severity":"high","open":true,"count":1}'


def value(name: str, text: str, reference: str = "", tokens: int = 1, **keys: object) -> float:
    """Return what a reward of the recipe makes of a completion."""
    (term,) = build([Reward.model_validate({"name": name, **keys})], allow_code=True)
    return term.judge([Answer(text, "a prompt", reference, tokens)])[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("the cat", 1.0), (" the cat\n", 1.0), ("the  cat", 0.0), ("The cat", 0.0), ("", 0.0)],
)
def test_exact_match(text: str, expected: float) -> None:
    """The reference with white space around it is right, anything else is wrong."""
    assert value("exact_match", text, "the cat") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so 3 + 4 = 7\n#### 1,000", 1.0),
        ("#### 1000.00", 1.0),
        ("#### 5\n#### 1000", 1.0),
        ("#### 1000\n#### 5", 0.0),
        ("1000", 0.0),
        ("#### -1000", 0.0),
        ("#### 1000.", 1.0),
        ("#### ", 0.0),
        ("", 0.0),
    ],
)
def test_numeric_answer(text: str, expected: float) -> None:
    """The last number behind #### is compared as a number."""
    assert value("numeric_answer", text, "it is 1000\n#### 1000") == expected


def test_numeric_answer_with_a_pattern() -> None:
    """A pattern's first group is the number; a reference without one is a fault of the row."""
    assert value("numeric_answer", "I get 12 apples", "= 12 apples", pattern=r"(\d+) apples") == 1.0
    with pytest.raises(InputError, match="no number in the reference 'none'"):
        value("numeric_answer", "#### 1", "none")


def test_regex() -> None:
    """The pattern may be found anywhere."""
    assert value("regex", "well, yes!", pattern=r"\byes\b") == 1.0
    assert value("regex", "yesterday", pattern=r"\byes\b") == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", 1.0),
        (" [1, 2]\n", 1.0),
        ("NaN", 0.0),
        ("{'a': 1}", 0.0),
        ('{"a": 1', 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_json_valid(text: str, expected: float) -> None:
    """What the JSON standard allows is valid, and nothing that only Python reads, however deep."""
    assert value("json_valid", text) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, 1.0),
        ({"product": "Brevo"}, 0.75),
        ({"open": 1}, 0.75),
        ({"count": True}, 0.75),
        ({"more": 0}, 0.8),
        ({"product": None, "severity": [], "open": False, "count": 2}, 0.0),
    ],
)
def test_json_fields(change: dict[str, object], expected: float) -> None:
    """Each field that is right counts, each that is wrong or too much counts against; all or nothing if not partial."""
    text = json.dumps(json.loads(TICKET) | change)
    assert value("json_fields", text, TICKET) == expected
    assert value("json_fields", text, TICKET, partial=False) == float(expected == 1.0)


def test_json_fields_of_what_is_no_object() -> None:
    """A completion that is no object has no field; a reference that is none is a fault of the row."""
    for text in ("", "[]", "Brivo", TICKET[:-1], "null"):
        assert value("json_fields", text, TICKET) == 0.0
    for reference in ("[]", "{}", "Brivo"):
        with pytest.raises(InputError, match="is no JSON object"):
            value("json_fields", TICKET, reference)


@pytest.mark.parametrize(("tokens", "expected"), [(1, 0.0), (10, 0.0), (15, -0.5), (20, -1.0), (500, -1.0)])
def test_length(tokens: int, expected: float) -> None:
    """Up to the limit nothing is lost, from twice the limit on all."""
    assert value("length", "x", tokens=tokens, limit=10) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", 0.0), ("a b", 0.0), ("a b c d", 0.0), ("a a a a", -0.5), ("a b c a b c", -0.25)],
)
def test_no_repeat(text: str, expected: float) -> None:
    """Each run of three words that was there before counts against it."""
    assert value("no_repeat", text) == expected


def test_two_of_a_name_are_told_apart() -> None:
    """Metrics have a name for each reward."""
    terms = build([Reward(name="regex", pattern=one) for one in "abc"], allow_code=False)
    assert [term.name for term in terms] == ["regex", "regex_2", "regex_3"]


def test_code_runs_only_where_it_may(tmp_path: Path) -> None:
    """A file of Python is neither opened nor run without leave; with it, its function judges."""
    path = tmp_path / "mine.py"
    path.write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef short(completion, prompt, reference):\n"
        "    return -len(completion) if reference else 'nothing'\n"
        "def no(completion, prompt, reference):\n    return 1e999\n"
    )
    reward = Reward(name="python", file=str(path), function="short")
    with pytest.raises(InputError, match=r"set run.allow_code: true"):
        build([reward], allow_code=False)
    assert not (tmp_path / "ran").exists()
    assert value("python", "four", "x", file=str(path), function="short") == -4.0
    assert (tmp_path / "ran").exists()
    for function, text in [
        ("short", "ValueError"),
        ("no", "returned inf"),
        ("absent", "has no function absent"),
    ]:
        with pytest.raises(InputError, match=text):
            value("python", "four", "", file=str(path), function=function)
