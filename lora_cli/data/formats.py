"""One function per row format: the row as written -> `Conversation` or `Text`.

`FORMATS` is the closed table of them; a new format is one function and one line there. `fields:` of the
recipe describes any other shape by templates, `{name}` standing for a column; `{{` and `}}` are braces.
Content is taken as written: no stripping, no added preamble. Columns that no format asks for are ignored,
except those that would change what the model is given (`tools`, `images`, ...): these are refused.
"""

from __future__ import annotations

import difflib
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_cli.data.read import RawRow
from lora_cli.errors import InputError
from lora_cli.recipe.schema import Data, Fields
from lora_cli.types import Conversation, Message, Row, Text

ROLES = ("system", "user", "assistant", "tool")
_FOLLOWS = {
    "user": ("", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
    "system": ("",),
}
_CONTEXT = ("tools", "functions", "documents", "images", "videos", "audios")
_UNSUPPORTED = ("tool_calls", "function_call", "weight")


def _text(value: Any, field: str, where: str, *, empty: bool = False) -> str:
    """Return `value` if it is text that can be tokenized, else raise with the field's name."""
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise InputError(f"{where}: {field} is {kind} (text is needed)")
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


def _column(row: RawRow, name: str) -> Any:
    if name not in row.values:
        raise InputError(
            f"{row.where}: column {name!r} is missing (found: {_listed(row.values)}{_near(name, row)})"
        )
    return row.values[name]


def _near(name: str, row: RawRow) -> str:
    near = difflib.get_close_matches(name, list(row.values), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _listed(names: Any) -> str:
    return ", ".join(str(name) for name in names) or "none"


def text(row: RawRow) -> Text:
    """Read `text`: one document, trained from its first to its last token.

    Raises:
        InputError: if the column is missing, not text, or empty.
    """
    return Text(_text(_column(row, "text"), "text", row.where), row.where)


def prompt_completion(row: RawRow) -> Conversation:
    """Read `prompt` and `completion`: two texts, or two lists of messages that make one conversation.

    Raises:
        InputError: if a column is missing or empty, only one is a list, or the messages are no conversation.
    """
    prompt, completion = _column(row, "prompt"), _column(row, "completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation([*prompt, *completion], "prompt + completion", row.where)
    if isinstance(prompt, list) or isinstance(completion, list):
        raise InputError(
            f"{row.where}: one of prompt and completion is a list (both texts, or both lists of messages)"
        )
    return Conversation(
        (
            Message("user", _text(prompt, "prompt", row.where)),
            Message("assistant", _text(completion, "completion", row.where)),
        ),
        row.where,
    )


def alpaca(row: RawRow) -> Conversation:
    """Read `instruction`, `output`, and if present `input` (joined by a blank line) and `system`.

    Raises:
        InputError: if a required column is missing, not text, or empty.
    """
    instruction = _text(_column(row, "instruction"), "instruction", row.where)
    output = _text(_column(row, "output"), "output", row.where)
    extra = {name: row.values.get(name) for name in ("input", "system")}
    given = {
        name: _text(value, name, row.where, empty=True) for name, value in extra.items() if value is not None
    }
    if given.get("input", "").strip():
        instruction = f"{instruction}\n\n{given['input']}"
    turns = [Message("user", instruction), Message("assistant", output)]
    if given.get("system", "").strip():
        turns.insert(0, Message("system", given["system"]))
    return Conversation(tuple(turns), row.where)


def chat(row: RawRow) -> Conversation:
    """Read `messages`: a list of objects with `role` (system, user, assistant, tool) and `content`.

    Raises:
        InputError: if it is no such list, a role is unknown or out of order, or the last turn is not the
            assistant's.
    """
    for name in _CONTEXT:
        if row.values.get(name):
            raise InputError(f"{row.where}: column {name!r} is not supported (remove it, or the row)")
    return _conversation(_column(row, "messages"), "messages", row.where)


def _conversation(value: Any, field: str, where: str) -> Conversation:
    if not isinstance(value, list):
        kind = "null" if value is None else type(value).__name__
        raise InputError(f"{where}: {field} is {kind} (a list of messages is needed)")
    messages: list[Message] = []
    before = ""
    for index, item in enumerate(value):
        message = _message(item, f"{field}[{index}]", where)
        if before not in _FOLLOWS[message.role]:
            place = f"follows {before}" if before else "comes first"
            raise InputError(
                f"{where}: {field}[{index}]: role {message.role} {place}: turns are out of order"
            )
        messages.append(message)
        before = message.role
    if not any(message.role == "assistant" for message in messages):
        raise InputError(f"{where}: {field}: no assistant turn (there is nothing to learn)")
    if before != "assistant":
        raise InputError(f"{where}: {field}: the last turn is {before}'s (end with the assistant's answer)")
    return Conversation(tuple(messages), where)


def _message(item: Any, field: str, where: str) -> Message:
    if not isinstance(item, dict):
        raise InputError(
            f"{where}: {field} is {type(item).__name__} (an object with role and content is needed)"
        )
    for key in ("role", "content"):
        if key not in item:
            hint = " (ShareGPT's from and value: rename them to role and content)" if "from" in item else ""
            raise InputError(f"{where}: {field}.{key} is missing{hint}")
    for key in _UNSUPPORTED:
        if item.get(key) is not None:
            raise InputError(f"{where}: {field}.{key} is not supported (remove it, or the row)")
    role = item["role"]
    if role not in ROLES:
        raise InputError(f"{where}: {field}.role is {role!r} (one of {', '.join(ROLES)})")
    return Message(role, _text(item["content"], f"{field}.content", where, empty=role in ("system", "tool")))


@dataclass(frozen=True, slots=True)
class Format:
    """One way to read a row, and the columns it cannot do without."""

    read: Callable[[RawRow], Row]
    required: tuple[str, ...]


FORMATS = {
    "text": Format(text, ("text",)),
    "prompt_completion": Format(prompt_completion, ("prompt", "completion")),
    "alpaca": Format(alpaca, ("instruction", "output")),
    "chat": Format(chat, ("messages",)),
}


def detect(rows: Sequence[RawRow], key: str = "data.train") -> str:
    """Return the only format whose columns stand in every one of `rows`; `key` names the split in messages.

    Raises:
        InputError: if no format fits, or more than one.
    """
    assert rows
    names = [
        name
        for name, known in FORMATS.items()
        if all(set(known.required) <= row.values.keys() for row in rows)
    ]
    if len(names) == 1:
        return names[0]
    if names:
        raise InputError(
            f"{rows[0].where}: the format is ambiguous: the columns fit {' and '.join(names)} "
            "(set data.format to one of them)"
        )
    # Of mixed rows, the first that fits no format of its predecessors says most.
    fitting = set(FORMATS)
    for row in rows:
        now = {name for name in fitting if set(FORMATS[name].required) <= row.values.keys()}
        if not now:
            break
        fitting = now
    known_columns = "; ".join(f"{name}: {_listed(known.required)}" for name, known in FORMATS.items())
    mixed = (
        f", unlike the rows before it, which are {_listed(sorted(fitting))}"
        if len(fitting) < len(FORMATS)
        else ""
    )
    raise InputError(
        f"{row.where}: no format fits {key}: columns found: {_listed(row.values)}{mixed} "
        f"(formats are {known_columns}; "
        "for other columns write data.fields, e.g. {prompt: '{question}', completion: '{answer}'})"
    )


def _compile(template: str, key: str) -> Callable[[RawRow], str]:
    """Turn `{name}` templates into a function of the row; only plain names, no format specifications."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"{key}: {template!r}: {error} (write {{{{ and }}}} for braces)") from error
    for _, name, spec, conversion in parts:
        if name is not None and (spec or conversion or not name.strip()):
            raise InputError(
                f"{key}: {template!r}: only {{column}} is understood (write {{{{ and }}}} for braces)"
            )

    def fill(row: RawRow) -> str:
        filled = []
        for literal, name, _, _ in parts:
            filled.append(literal)
            if name is not None:
                if name not in row.values:
                    found = f"found: {_listed(row.values)}{_near(name, row)}"
                    raise InputError(f"{row.where}: {key} names column {name!r}, which is missing ({found})")
                value = row.values[name]
                # Numbers are common answers; any other type written into a text is a mistake.
                number = isinstance(value, int | float) and not isinstance(value, bool)
                filled.append(
                    str(value) if number else _text(value, f"column {name!r}", row.where, empty=True)
                )
        return "".join(filled)

    return fill


def fields_reader(fields: Fields) -> Callable[[RawRow], Conversation]:
    """Return the reader that `data.fields` describes.

    Raises:
        InputError: if a template is not valid; by the reader, if a column is missing or no text, or a turn
            is empty.
    """
    written = {"system": fields.system, "user": fields.prompt, "assistant": fields.completion}
    keys = {
        "system": "data.fields.system",
        "user": "data.fields.prompt",
        "assistant": "data.fields.completion",
    }
    fills = {
        role: _compile(template, keys[role]) for role, template in written.items() if template is not None
    }

    def read(row: RawRow) -> Conversation:
        return Conversation(
            tuple(Message(role, _text(fill(row), keys[role], row.where)) for role, fill in fills.items()),
            row.where,
        )

    return read


def choose_format(
    data: Data, rows: Sequence[RawRow], key: str = "data.train"
) -> tuple[str, Callable[[RawRow], Row]]:
    """Return the format's name and its reader for a split whose first rows are `rows`.

    Raises:
        InputError: if the rows fit no format, or more than one, or `data.fields` is not valid.
    """
    if data.fields is not None:
        return "fields", fields_reader(data.fields)
    name = data.format if data.format != "auto" else detect(rows, key)
    return name, FORMATS[name].read
