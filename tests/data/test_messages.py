"""Turns as users have them: OpenAI's messages and ShareGPT's, with calls, tools, parts and marks; and any row."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from read_rows import read, refused, row, said

from lora_cli.data.formats import FORMATS
from lora_cli.errors import InputError
from lora_cli.types import Message

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALLED = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


# OpenAI's messages


@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city": "Oslo"}'], ids=["object", "text"])
@pytest.mark.parametrize("as_text", [False, True], ids=["tools", "tools as text"])
def test_tool_calls(arguments, as_text):
    """A call keeps its id and name, its arguments become an object, and the tools become function descriptions."""
    tools: Any = [{"type": "function", "function": WEATHER}]
    call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
    found = read(
        messages=[
            U,
            {"role": "assistant", "content": None, "tool_calls": [call, call]},
            {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "rain"},
            {"role": "tool", "content": ""},
            A,
        ],
        tools=json.dumps(tools) if as_text else tools,
    )
    assert [dict(one) for one in found.tools] == tools
    assert found.messages[1] == Message("assistant", "", extra={"tool_calls": [CALL, CALL]})
    assert found.messages[2] == Message("tool", "rain", extra={"tool_call_id": "c1", "name": "weather"})
    assert said(found)[3:] == [("tool", ""), ("assistant", "a")]


def test_bare_functions_and_the_legacy_call():
    """`functions` and `function_call`, OpenAI's before tools, read as tools and a call; `function` answers it."""
    found = read(
        functions=[WEATHER],
        messages=[
            U,
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "weather", "arguments": '{"city": "Oslo"}'},
            },
            {"role": "function", "name": "weather", "content": "rain"},
            A,
        ],
    )
    assert [dict(one) for one in found.tools] == [{"type": "function", "function": WEATHER}]
    assert found.messages[1].extra["tool_calls"] == [CALLED]
    assert found.messages[2].role == "tool"


def test_parts_developer_and_reasoning():
    """Text parts are joined as they stand, developer is system, and reasoning goes under the name templates know."""
    parts = [{"type": "text", "text": "one "}, "two", {"type": "text", "text": "\nthree"}]
    found = read(
        messages=[
            {"role": "developer", "content": "s"},
            {"role": "user", "content": parts, "name": "ann"},
            {**A, "reasoning": "because"},
        ]
    )
    assert said(found) == [("system", "s"), ("user", "one two\nthree"), ("assistant", "a")]
    assert found.messages[1].extra == {"name": "ann"}
    assert found.messages[2].extra == {"reasoning_content": "because"}


@pytest.mark.parametrize(
    ("mark", "trained"),
    [({}, True), ({"weight": 1}, True), ({"weight": 0}, False), ({"train": True}, True), ({"train": False}, False),
     ({"weight": None}, True), ({"training": False}, False)],
)  # fmt: skip
def test_a_row_chooses_its_trained_answers(mark, trained):
    """`weight` and `train` of an answer say whether it is trained; none says that it is."""
    found = read(messages=[U, {**A, **mark}, U, A])
    assert [turn.trained for turn in found.messages if turn.role == "assistant"] == [trained, True]


DEEP: Any = "x"
for _ in range(70):
    DEEP = {"a": DEEP}


def calls(**function: Any) -> list[dict[str, Any]]:
    return [
        U,
        {"role": "assistant", "content": None, "tool_calls": [{"function": function}]},
        {"role": "tool", "content": "t"},
        A,
    ]


@pytest.mark.parametrize(
    ("message", "messages"),
    [
        ("messages[1].tool_calls[0].arguments is not valid JSON (Expecting", calls(name="f", arguments="{x")),
        ("arguments is not valid JSON (key 'a' occurs twice", calls(name="f", arguments='{"a": 1, "a": 2}')),
        ("messages[1].tool_calls[0].arguments is not valid JSON (NaN", calls(name="f", arguments='{"a": NaN}')),
        ("messages[1].tool_calls[0].arguments is list (an object", calls(name="f", arguments=[1])),
        ("messages[1].tool_calls[0] is no call", calls(arguments={})),
        ("function.arguments.a holds half a surrogate pair (U+D800)", calls(name="f", arguments={"a": "\ud800"})),
        ("function.arguments holds half a surrogate pair (U+DFFF)", calls(name="f", arguments={"\udfff": 1})),
        ("arguments.a[1] holds half a surrogate pair", calls(name="f", arguments='{"a": [1, "\\ud83d"]}')),
        ("is nested deeper than 64 levels", calls(name="f", arguments=DEEP)),
        ("is not valid JSON", calls(name="f", arguments='{"a":' * 3000 + "1" + "}" * 3000)),
        ("messages[0]: user calls a function", [{**U, "tool_calls": [CALL]}, A]),
        ("messages[0].weight is 1 (only an assistant", [{**U, "weight": 1}, A]),
        ("messages[1].weight is 0.5 (write 1 or 0)", [U, {**A, "weight": 0.5}]),
        ("messages[1].weight is True (write 1 or 0)", [U, {**A, "weight": True}]),
        ("messages[1].train is 'no' (write true or false)", [U, {**A, "train": "no"}]),
        ("messages[1].refusal is not supported", [U, {**A, "refusal": "no"}]),
        ("messages[0].content[1] is input_audio (only text", [{**U, "content": ["a", {"type": "input_audio"}]}, A]),
        ("messages[0].name is int", [{**U, "name": 3}, A]),
        ("messages[0].role is 'xxxxx", [{**U, "role": "x" * 10**6}, A]),
        ("messages[0].content is empty", [{**U, "content": []}, A]),
    ],
)  # fmt: skip
def test_faults_of_messages(message, messages):
    """Each fault is one short line with the row, the path within it, and what is there."""
    refused(message, messages=messages)
    with pytest.raises(InputError) as caught:
        read(messages=messages)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("message", "tools"),
    [
        ("tools is dict (a list of functions", {"name": "f"}),
        ("tools[0] is no function", ["f"]),
        ("tools[0] is no function", [{"type": "function", "function": {"description": "f"}}]),
        ("tools is not valid JSON", "[{"),
        ("is nested deeper than 64 levels", [{"name": "f", "parameters": DEEP}]),
        ("holds half a surrogate pair", [{"name": "f", "description": "\ud800"}]),
    ],
)
def test_faults_of_tools(message, tools):
    """Tools that no template could write are named."""
    refused(message, messages=[U, A], tools=tools)


# ShareGPT

ASKED = {"from": "human", "value": "q"}
USERS, ASSISTANTS = (
    ["human", "user", "prompter"],
    ["gpt", "chatgpt", "bing", "bard", "model", "bot", "assistant"],
)


@given(
    asked=st.lists(st.sampled_from(USERS), min_size=1, max_size=4),
    data=st.data(),
    system=st.sampled_from([None, "", "be kind"]),
)
@settings(max_examples=100, deadline=None)
def test_sharegpt(asked, data, system):
    """Whatever the role names, turns keep their order and text; a system column goes first, an empty one nowhere."""
    names = [one for user in asked for one in (user, data.draw(st.sampled_from(ASSISTANTS)))]
    turns = [{"from": name, "value": f"{index} {name}"} for index, name in enumerate(names)]
    found = read(conversations=turns, system=system)
    expected = [("assistant" if i % 2 else "user", turn["value"]) for i, turn in enumerate(turns)]
    assert said(found) == ([("system", system)] if system else []) + expected


@pytest.mark.parametrize("answer", ["observation", "tool", "function_response", "tool_response", "ipython"])
@pytest.mark.parametrize("calling", ["function_call", "tool_call"])
def test_sharegpt_calls(calling, answer):
    """A turn from function_call is a call of the assistant, whose answer is a tool's; tools may be a JSON text."""
    written = json.dumps({"name": "weather", "arguments": {"city": "Oslo"}})
    turns = [
        {"from": "human", "value": "q"},
        {"from": calling, "value": written},
        {"from": answer, "value": "rain"},
        {"from": "gpt", "value": "a"},
    ]
    found = read(conversations=turns, tools=json.dumps([WEATHER]))
    assert found.messages[1] == Message("assistant", "", extra={"tool_calls": [CALLED]})
    assert said(found)[2:] == [("tool", "rain"), ("assistant", "a")]
    assert found.tools[0]["function"] == WEATHER


@pytest.mark.parametrize(
    ("message", "turns"),
    [
        ("conversations[0].from is 'ghost'", [{"from": "ghost", "value": "q"}]),
        ("conversations[0].value is missing", [{"from": "human"}]),
        ("conversations[0]: role assistant comes first", [{"from": "gpt", "value": "a"}]),
        ("conversations[1].value is not valid JSON", [ASKED, {"from": "function_call", "value": "f()"}]),
        ("the last turn is tool's", [ASKED, {"from": "gpt", "value": "a"}, {"from": "tool", "value": "t"}]),
        ("conversations[1]: role system follows system", [{"from": "system", "value": "x"}]),
    ],
)  # fmt: skip
def test_faults_of_sharegpt(message, turns):
    """Faults name the turn by ShareGPT's own keys."""
    system = {"system": "s"} if "system follows" in message else {}
    refused(message, conversations=turns, **system)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(
            "role content from value name function arguments tool_calls weight type text".split()
        ),
        inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip
COLUMNS = [
    "text", "prompt", "completion", "instruction", "output", "input", "history", "system", "messages", "tools",
    "conversations", "chosen", "rejected", "label", "images", "functions",
]  # fmt: skip


@given(
    values=st.dictionaries(st.sampled_from(COLUMNS), JSON, max_size=6), name=st.sampled_from(list(FORMATS))
)
@settings(max_examples=250, deadline=None)
def test_any_row_is_read_or_named(values, name):
    """No row makes a format fail otherwise than by one line that begins with its place."""
    try:
        found = FORMATS[name].read(row(**values))
    except InputError as fault:
        (line,) = fault.lines
        assert line.startswith("f.jsonl:7: ")
    else:
        assert found.where == "f.jsonl:7"
