"""One function per row format: the row as written -> `Conversation`, `Text`, `Pair` or `Labelled`.

`FORMATS` is the closed table of them; a new format is one function and one line there. `fields:` of the recipe
describes any other shape, see `fields.py`. Content is taken as written: no stripping, no added preamble. Columns that
no format asks for are ignored, except those that would change what the model is given (`images`): these are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora_cli.data.columns import column, listed, quoted, text_of
from lora_cli.data.conversations import answered, conversation, half, history, pair, sharegpt_turns
from lora_cli.data.fields import fields_reader
from lora_cli.data.messages import message, turns
from lora_cli.data.read import RawRow
from lora_cli.errors import InputError
from lora_cli.recipe.schema import Fields
from lora_cli.types import Conversation, Labelled, Message, Pair, Row, Text


def text(row: RawRow) -> Text:
    """Read `text`: one document, trained from its first to its last token.

    Raises:
        InputError: if the column is missing, not text, or empty.
    """
    return Text(text_of(column(row, "text"), "text", row.where), row.where)


def prompt_completion(row: RawRow) -> Conversation:
    """Read `prompt` and `completion`: two texts, or two lists of messages that make one conversation.

    Raises:
        InputError: if a column is missing or empty, only one is a list, or the messages are no conversation.
    """
    prompt, completion = column(row, "prompt"), column(row, "completion")
    if isinstance(prompt, list) is not isinstance(completion, list):
        raise InputError(
            f"{row.where}: one of prompt and completion is a list (both texts, or both lists of messages)"
        )
    if isinstance(prompt, list):
        before = turns(prompt, "prompt", row.where)
        return conversation(
            before + turns(completion, "completion", row.where), "prompt + completion", row, len(before)
        )
    asked = Message("user", text_of(prompt, "prompt", row.where))
    return answered(row, [asked], text_of(completion, "completion", row.where))


def alpaca(row: RawRow) -> Conversation:
    """Read `instruction`, `output`, and if present `input` (joined by a blank line), `system` and `history`.

    Raises:
        InputError: if a required column is missing, not text, or empty.
    """
    instruction = text_of(column(row, "instruction"), "instruction", row.where)
    output = text_of(column(row, "output"), "output", row.where)
    given = {
        name: text_of(row.values[name], name, row.where, empty=True)
        for name in ("input", "system")
        if row.values.get(name) is not None
    }
    if given.get("input", "").strip():
        instruction = f"{instruction}\n\n{given['input']}"
    system = [Message("system", given["system"])] if given.get("system", "").strip() else []
    return answered(row, [*system, *history(row), Message("user", instruction)], output)


def chat(row: RawRow) -> Conversation:
    """Read `messages`: objects with `role` and `content`, and if present `tools`, the functions that may be called.

    Raises:
        InputError: if it is no such list, a role is unknown or out of order, or the last turn is not the
            assistant's.
    """
    return conversation(turns(column(row, "messages"), "messages", row.where), "messages", row)


def sharegpt(row: RawRow) -> Conversation:
    """Read `conversations`: objects with `from` and `value` (or `role` and `content`); `system` and `tools` if present.

    Raises:
        InputError: as `chat`.
    """
    return conversation(sharegpt_turns(row), "conversations", row)


def preference(row: RawRow) -> Pair:
    """Read `chosen` and `rejected`, with the prompt in `prompt`, or as what both begin with.

    Both are texts (answers to `prompt`, or two transcripts in the manner of HH-RLHF), messages, or one message each.
    How much the first is preferred stands in `margin`, or is `score_chosen` less `score_rejected`, if present.

    Raises:
        InputError: if a column is missing, the two do not share a prompt, or are the same.
    """
    chosen, rejected, prompt = column(row, "chosen"), column(row, "rejected"), row.values.get("prompt")
    if isinstance(prompt, list):
        before = turns(prompt, "prompt", row.where)
    else:
        before = () if prompt is None else (Message("user", text_of(prompt, "prompt", row.where)),)
    return pair(row, half(chosen, "chosen", row, before), half(rejected, "rejected", row, before))


def sharegpt_preference(row: RawRow) -> Pair:
    """Read `conversations`, which end with the user's turn, and the answers `chosen` and `rejected`.

    Raises:
        InputError: as `preference`.
    """
    before = sharegpt_turns(row)
    halves = [(*before, message(column(row, name), name, row.where)) for name in ("chosen", "rejected")]
    return pair(row, halves[0], halves[1])


def labelled(row: RawRow) -> Labelled:
    """Read `label`, true for a wanted answer, with `prompt` and `completion`, or with `messages`.

    Raises:
        InputError: if the label is neither true nor false, or the rest is no conversation.
    """
    label = column(row, "label")
    if not isinstance(label, bool):
        raise InputError(f"{row.where}: label is {quoted(label)} (write true or false)")
    if "messages" in row.values:
        found = chat(row)
        found = Conversation(found.messages, found.where, found.tools, len(found.messages) - 1)
    else:
        found = prompt_completion(row)
    return Labelled(found, label, row.where)


@dataclass(frozen=True, slots=True)
class Format:
    """One way to read a row, the columns it cannot do without, and what it makes."""

    read: Callable[[RawRow], Row]
    required: tuple[str, ...]
    makes: type[Row]
    fits: Callable[[RawRow], bool] = lambda row: True
    """Whether the columns' values can be meant so, where their names alone do not tell."""


def _is_labelled(row: RawRow) -> bool:
    answered = {"prompt", "completion"} <= row.values.keys() or "messages" in row.values
    return answered and isinstance(row.values["label"], bool)


FORMATS = {
    "text": Format(text, ("text",), Text),
    "prompt_completion": Format(prompt_completion, ("prompt", "completion"), Conversation),
    "alpaca": Format(alpaca, ("instruction", "output"), Conversation),
    "chat": Format(chat, ("messages",), Conversation),
    "sharegpt": Format(sharegpt, ("conversations",), Conversation),
    "preference": Format(preference, ("chosen", "rejected"), Pair),
    "sharegpt_preference": Format(sharegpt_preference, ("conversations", "chosen", "rejected"), Pair),
    "labelled": Format(labelled, ("label",), Labelled, _is_labelled),
}
_NARROWER = {
    "sharegpt_preference": ("sharegpt", "preference"),
    "labelled": ("prompt_completion", "chat"),
}
"""Formats that say all that the others do, and more: where they fit, the others are not meant."""


def _fitting(row: RawRow) -> set[str]:
    return {name for name, one in FORMATS.items() if set(one.required) <= row.values.keys() and one.fits(row)}


def detect(rows: Sequence[RawRow], key: str = "data.train") -> str:
    """Return the only format that fits every one of `rows`; `key` names the split in messages.

    Raises:
        InputError: if no format fits, or more than one.
    """
    assert rows
    common = set.intersection(*map(_fitting, rows))
    common -= {wider for name in common for wider in _NARROWER.get(name, ())}
    names = [name for name in FORMATS if name in common]
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
        now = fitting & _fitting(row)
        if not now:
            break
        fitting = now
    known_columns = "; ".join(f"{name}: {listed(known.required)}" for name, known in FORMATS.items())
    mixed = (
        f", unlike the rows before it, which are {listed(sorted(fitting))}"
        if len(fitting) < len(FORMATS)
        else ""
    )
    raise InputError(
        f"{row.where}: no format fits {key}: columns found: {listed(row.values)}{mixed} "
        f"(formats are {known_columns}; "
        "for other columns write data.fields, e.g. {prompt: '{question}', completion: '{answer}'})"
    )


def choose_format(
    name: str, fields: Fields | None, rows: Sequence[RawRow], key: str = "data.train", *, skips: bool = False
) -> tuple[str, Callable[[RawRow], Row]]:
    """Return the format's name and its reader, where `rows` are the first: as `name` or `fields` says, or detected.

    With `skips`, rows that fit no format are bad ones, and do not count.

    Raises:
        InputError: if the rows fit no format, or more than one, or `fields` is not valid.
    """
    if fields is not None:
        return "fields", fields_reader(fields)
    if skips:
        rows = [row for row in rows if _fitting(row)] or rows
    name = name if name != "auto" else detect(rows, key)
    return name, FORMATS[name].read
