"""Preferences in the shapes they come in, answers with a label, and columns that fit no format or two."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from read_rows import read, refused, row, said

from lora_cli.data.formats import detect
from lora_cli.errors import InputError
from lora_cli.types import Labelled, Pair

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


PROMPT = [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r")]


def turns_of(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


def answer(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def both(yes: Any, no: Any, **more: Any) -> dict[str, Any]:
    return {**more, "chosen": yes, "rejected": no}


SHAPES: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "transcripts": (
        both(*(f"\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: {one}" for one in ("yes", "no"))),
        PROMPT[1:],
    ),
    "lists with the prompt": (both(*([*turns_of(PROMPT), answer(one)] for one in ("yes", "no"))), PROMPT),
    "the prompt repeated": (
        both(*([*turns_of([("user", "q")]), answer(one)] for one in ("yes", "no")), prompt="q"),
        [("user", "q")],
    ),
    "the prompt repeated after a system turn": (
        both(*([*turns_of([("system", "s"), ("user", "q")]), answer(one)] for one in ("yes", "no")), prompt="q"),
        [("system", "s"), ("user", "q")],
    ),
    "a list of prompt turns repeated": (
        both(*([*turns_of(PROMPT), answer(one)] for one in ("yes", "no")), prompt=turns_of(PROMPT)),
        PROMPT,
    ),
    "prompt and texts": (both("yes", "no", prompt="q"), [("user", "q")]),
    "prompt and lists": (both([answer("yes")], [answer("no")], prompt=turns_of(PROMPT)), PROMPT),
    "prompt and objects": (both(answer("yes"), answer("no"), prompt="q"), [("user", "q")]),
    "sharegpt": (
        both(
            {"from": "gpt", "value": "yes"},
            {"from": "gpt", "value": "no"},
            conversations=[{"from": {"assistant": "gpt"}.get(role, role), "value": one} for role, one in PROMPT],
        ),
        PROMPT,
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_preferences(shape):
    """Every shape gives two conversations with one prompt, kept whole, and the answers after it."""
    values, prompt = SHAPES[shape]
    found = read(**values)
    assert isinstance(found, Pair)
    for half, said_so in ((found.chosen, "yes"), (found.rejected, "no")):
        assert said(half) == [*prompt, ("assistant", said_so)]
        assert half.prompt_turns == len(prompt)


@pytest.mark.parametrize(
    ("message", "values"),
    [
        ("chosen and rejected are the same", both("a", "a", prompt="q")),
        ("share 0 turns, and there is no prompt", both([U, A], [{**U, "content": "other"}, A])),
        ("chosen is no transcript", both("yes", "no")),
        ("rejected is empty", both("yes", "", prompt="q")),
        ("chosen is null", both(None, "no", prompt="q")),
        ("chosen is int", both(1, "no", prompt="q")),
        ("prompt is int", both("yes", "no", prompt=1)),
        ("prompt is empty", both("yes", "no", prompt=" ")),
        ("role assistant follows assistant", both([A, A], [answer("b")], prompt="q")),
        ("chosen, turn 2 is empty", both("\n\nHuman: q\n\nAssistant: ", "\n\nHuman: q\n\nAssistant: no")),
        ("rejected is empty", both({"from": "gpt", "value": "a"}, "", conversations=[{"from": "human", "value": "q"}])),
    ],
)  # fmt: skip
def test_faults_of_preferences(message, values):
    """Pairs without a common prompt, a difference or an answer are named."""
    refused(message, **values)


@given(before=st.integers(1, 4), after=st.integers(0, 2), differ=st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_common_prefix_is_the_prompt(before, after, differ):
    """Two transcripts that part at any user turn share exactly what stands before, however long the rest is."""
    common = "".join(f"\n\nHuman: q{n}\n\nAssistant: a{n}" for n in range(before - 1)) + "\n\nHuman: last"
    rest = "".join(f"\n\nHuman: r{n}\n\nAssistant: b{n}" for n in range(after))
    found = read(
        chosen=f"{common}\n\nAssistant: yes{rest}",
        rejected=f"{common}\n\nAssistant: no{rest if differ else ''}",
    )
    assert found.chosen.prompt_turns == found.rejected.prompt_turns == 2 * before - 1
    assert len(found.chosen.messages) == 2 * before + 2 * after


def test_labelled_answers():
    """A label beside prompt and completion or messages marks the last answer; 0 and 1 are no labels."""
    for values in ({"prompt": "q", "completion": "a"}, {"messages": [U, A]}):
        for label in (True, False):
            found = read(**values, label=label)
            assert isinstance(found, Labelled)
            assert found.wanted is label
            assert said(found.conversation) == [("user", "q"), ("assistant", "a")]
            assert found.conversation.prompt_turns == 1
    refused("label is 1 (write true or false)", "labelled", prompt="q", completion="a", label=1)
    refused("column 'label' is missing", "labelled", prompt="q", completion="a")
    assert detect([row(text="a", label=3)]) == "text"


def test_columns_of_two_formats_are_an_error_that_names_both():
    """No guess is made where the columns fit two formats; columns of no format list them all."""
    with pytest.raises(InputError, match="fit prompt_completion and alpaca"):
        detect([row(prompt="q", completion="a", instruction="q", output="a")])
    with pytest.raises(InputError, match="no format fits") as caught:
        detect([row(**{f"column {index} " + "x" * 1000: 1 for index in range(5000)})])
    assert "4,980 more" in str(caught.value)
    assert len(str(caught.value)) < 3000
