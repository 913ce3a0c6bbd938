"""One row of each format, the faults each names, and how a format is detected."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.data.fields import fields_reader
from lora_cli.data.formats import FORMATS, choose_format, detect
from lora_cli.data.read import RawRow
from lora_cli.errors import InputError
from lora_cli.recipe.schema import Fields
from lora_cli.types import Conversation, Text

U = {"role": "user", "content": "q"}
A = {"role": "assistant", "content": "a"}
S = {"role": "system", "content": "s"}
T = {"role": "tool", "content": "t"}


def row(**values: Any) -> RawRow:
    return RawRow(values, "f.jsonl:7", 7)


def turns(found: object) -> list[tuple[str, str]]:
    assert isinstance(found, Conversation)
    assert found.where == "f.jsonl:7"
    return [(message.role, message.content) for message in found.messages]


QA = [("user", "q"), ("assistant", "a")]
CONVERSATIONS: list[tuple[str, dict[str, Any], list[tuple[str, str]]]] = [
    ("prompt_completion", {"prompt": "q", "completion": "a"}, QA),
    ("prompt_completion", {"prompt": [U], "completion": [A]}, QA),
    ("prompt_completion", {"prompt": [S, U, A, U], "completion": [A]}, [("system", "s"), *QA, *QA]),
    ("alpaca", {"instruction": "q", "output": "a"}, QA),
    ("alpaca", {"instruction": "q", "input": "", "output": "a", "system": ""}, QA),
    ("alpaca", {"instruction": "q", "input": None, "output": "a"}, QA),
    ("alpaca", {"instruction": "q", "input": "x", "output": "a"}, [("user", "q\n\nx"), ("assistant", "a")]),
    ("alpaca", {"instruction": "q", "output": "a", "system": "s"}, [("system", "s"), *QA]),
    ("chat", {"messages": [U, A]}, QA),
    ("chat", {"messages": [S, U, A, U, A]}, [("system", "s"), *QA, *QA]),
    ("chat", {"messages": [U, A, T, T, A]}, [*QA, ("tool", "t"), ("tool", "t"), ("assistant", "a")]),
    ("chat", {"messages": [{**U, "name": "x"}, A], "id": 3, "images": []}, QA),
]


@pytest.mark.parametrize(("name", "values", "expected"), CONVERSATIONS)
def test_conversations(name, values, expected):
    """Each format gives the turns its columns hold, unchanged, and is detected from them."""
    assert turns(FORMATS[name].read(row(**values))) == expected
    assert detect([row(**values)]) == name


def test_text():
    """A document is taken as written."""
    assert FORMATS["text"].read(row(text=" a\n", n=1)) == Text(" a\n", "f.jsonl:7")
    assert detect([row(text="a"), row(text="b", extra=1)]) == "text"


FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("text", {}, "column 'text' is missing (found: none)"),
    ("text", {"texts": "a"}, "did you mean 'texts'?"),
    ("text", {"text": None}, "text is null"),
    ("text", {"text": 3}, "text is int"),
    ("text", {"text": ["a"]}, "text is list"),
    ("text", {"text": ""}, "text is empty"),
    ("text", {"text": " \n"}, "text is empty"),
    ("text", {"text": "a\ud800"}, "half a surrogate pair (U+D800)"),
    ("prompt_completion", {"prompt": "q"}, "column 'completion' is missing"),
    ("prompt_completion", {"prompt": "q", "completion": None}, "completion is null"),
    ("prompt_completion", {"prompt": "", "completion": "a"}, "prompt is empty"),
    ("prompt_completion", {"prompt": "q", "completion": ""}, "completion is empty"),
    ("prompt_completion", {"prompt": [U], "completion": "a"}, "one of prompt and completion is a list"),
    ("prompt_completion", {"prompt": [U], "completion": []}, "no assistant turn"),
    ("alpaca", {"instruction": "q"}, "column 'output' is missing"),
    ("alpaca", {"instruction": "q", "output": " "}, "output is empty"),
    ("alpaca", {"instruction": "q", "input": 4, "output": "a"}, "input is int"),
    ("chat", {"messages": None}, "messages is null"),
    ("chat", {"messages": "hi"}, "messages is str"),
    ("chat", {"messages": []}, "no assistant turn"),
    ("chat", {"messages": [U]}, "no assistant turn"),
    ("chat", {"messages": [U, "hi"]}, "messages[1] is str"),
    ("chat", {"messages": [{"content": "q"}]}, "messages[0].role is missing"),
    ("chat", {"messages": [{"role": "user"}, A]}, "messages[0].content is missing"),
    ("chat", {"messages": [{**U, "role": "ghost"}, A]}, "messages[0].role is 'ghost' (one of system, user"),
    ("chat", {"messages": [{**U, "role": ["user"]}, A]}, "messages[0].role is ['user']"),
    ("chat", {"messages": [U, {**A, "content": None}]}, "messages[1].content is null"),
    ("chat", {"messages": [U, {**A, "content": 3}]}, "messages[1].content is int"),
    (
        "chat",
        {"messages": [U, {**A, "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[1].content[0] is image_url (only text parts",
    ),
    ("chat", {"messages": [U, {**A, "content": " "}]}, "messages[1].content is empty"),
    ("chat", {"messages": [{**U, "content": ""}, A]}, "messages[0].content is empty"),
    ("chat", {"messages": [A, U]}, "messages[0]: role assistant comes first"),
    ("chat", {"messages": [U, U, A]}, "messages[1]: role user follows user"),
    ("chat", {"messages": [U, A, A]}, "messages[2]: role assistant follows assistant"),
    ("chat", {"messages": [U, S, A]}, "messages[1]: role system follows user"),
    ("chat", {"messages": [U, T, A]}, "messages[1]: role tool follows user"),
    ("chat", {"messages": [U, A, U]}, "the last turn is user's"),
    ("chat", {"messages": [U, {**A, "tool_calls": [{}]}]}, "messages[1].tool_calls[0] is no call"),
    ("chat", {"messages": [U, A], "images": ["x.jpg"]}, "column 'images' is not supported"),
    ("chat", {"messages": [U, A], "tools": [{}]}, "tools[0] is no function"),
]


@pytest.mark.parametrize(("name", "values", "message"), FAULTS)
def test_faults(name, values, message):
    """A bad row is named by file and line, its field, and what was found there."""
    with pytest.raises(InputError) as caught:
        FORMATS[name].read(row(**values))
    assert str(caught.value).startswith("f.jsonl:7: ")
    assert message in str(caught.value)


def test_fields():
    """Templates take columns, numbers among them, and doubled braces are braces."""
    fields = Fields(prompt="{{Q}}: {question}\nA:", completion=" {answer}", system="{topic}!")
    found = fields_reader(fields)(row(question="q", answer=42, topic="math", other=None))
    assert turns(found) == [("system", "math!"), ("user", "{Q}: q\nA:"), ("assistant", " 42")]


@given(text=st.text(min_size=1).filter(str.strip))
def test_fields_insert_text_literally(text):
    """Braces, percent signs and Jinja marks inside a column are never interpreted."""
    text = text.encode("utf-8", "ignore").decode() + "{x} {{y}} %s {% z %}"
    found = fields_reader(Fields(prompt="{q}", completion="{q}"))(row(q=text))
    assert turns(found) == [("user", text), ("assistant", text)]


@pytest.mark.parametrize(
    ("template", "values", "message"),
    [
        (
            "{qestion}",
            {"question": "q"},
            r"data.fields.prompt names column 'qestion', .*did you mean 'question'\?",
        ),
        ("{question", {"question": "q"}, "data.fields.prompt: '{question': "),
        ("question}", {"question": "q"}, "data.fields.prompt: 'question}': "),
        ("{}", {"question": "q"}, "only {column} is understood"),
        ("{question:>10}", {"question": "q"}, "only {column} is understood"),
        ("{question!r}", {"question": "q"}, "only {column} is understood"),
        ("{question.__class__}", {"question": "q"}, "names column 'question.__class__'"),
        ("{question[0]}", {"question": "q"}, r"names column 'question\[0\]'"),
        ("{question}", {"question": None}, "column 'question' is null"),
        ("{question}", {"question": ["q"]}, "column 'question' is list"),
        ("{question}", {"question": True}, "column 'question' is bool"),
        ("{question}", {"question": " "}, "data.fields.prompt is empty"),
    ],
)
def test_faults_of_fields(template, values, message):
    """A template that is not valid, or a column that is missing or no text, is named by its key."""
    with pytest.raises(InputError, match=message):
        fields_reader(Fields(prompt=template, completion="x"))(row(**values))


def test_no_format_fits():
    """Unknown columns are listed beside the formats, with the way out."""
    with pytest.raises(
        InputError, match=r"f\.jsonl:7: .*question, answer .*alpaca: instruction, output.*data\.fields"
    ):
        detect([row(question="q", answer="a")])


def test_a_row_unlike_the_others_is_the_one_named():
    """Among mixed rows the first that breaks the common format is named."""
    rows = [RawRow({"text": "a"}, f"f.jsonl:{n}", n) for n in (1, 2)] + [RawRow({"txt": "a"}, "f.jsonl:3", 3)]
    with pytest.raises(InputError, match=r"f\.jsonl:3: .*columns found: txt, unlike the rows before it"):
        detect(rows)


def test_an_ambiguous_row():
    """Columns of two formats are not guessed between; data.format decides."""
    rows = [row(text="a", messages=[U, A])]
    with pytest.raises(InputError, match=r"ambiguous: .*text and chat \(set data.format"):
        detect(rows)
    assert choose_format("chat", None, rows)[0] == "chat"
    assert choose_format("auto", Fields(prompt="{text}", completion="{text}"), rows)[0] == "fields"
