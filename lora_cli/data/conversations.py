"""Turns and answers of a row -> a `Conversation` or a `Pair`, with what all formats of them have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lora_cli.data.columns import column, quoted, text_of
from lora_cli.data.messages import check_order, functions, message, transcript, turns
from lora_cli.data.read import RawRow
from lora_cli.errors import InputError
from lora_cli.types import Conversation, Message, Pair

_REFUSED = ("documents", "images", "videos", "audios", "image", "video", "audio")
"""Columns that would change what the model is given."""


def answered(row: RawRow, before: Sequence[Message], answer: str) -> Conversation:
    """Return the conversation of a prompt and its answer."""
    _refuse_context(row)
    tools = functions(row.values.get("tools"), "tools", row.where)
    return Conversation((*before, Message("assistant", answer)), row.where, tools, prompt_turns=len(before))


def conversation(
    messages: tuple[Message, ...],
    field: str,
    row: RawRow,
    prompt_turns: int | None = None,
) -> Conversation:
    """Return the conversation of these turns, of which the last must be the assistant's.

    Raises:
        InputError: the turns are out of order, or the row has columns that cannot be passed on.
    """
    _refuse_context(row)
    check_order(messages, field, row.where)
    name = "tools" if row.values.get("tools") else "functions"
    return Conversation(messages, row.where, functions(row.values.get(name), name, row.where), prompt_turns)


def _refuse_context(row: RawRow) -> None:
    for name in _REFUSED:
        if row.values.get(name):
            raise InputError(f"{row.where}: column {name!r} is not supported (remove it, or the row)")


def history(row: RawRow) -> list[Message]:
    """Return the turns before the instruction, pairs of question and answer."""
    pairs = row.values.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(one, list) and len(one) == 2 for one in pairs):
        raise InputError(f"{row.where}: history is no list of pairs [question, answer]")
    return [
        Message(role, text_of(said, f"history[{index}]", row.where))
        for index, one in enumerate(pairs)
        for role, said in zip(("user", "assistant"), one, strict=True)
    ]


def sharegpt_turns(row: RawRow) -> tuple[Message, ...]:
    """Return the turns of `conversations`, with those of a `system` column before them."""
    messages = turns(column(row, "conversations"), "conversations", row.where)
    system = row.values.get("system")
    if system is not None and text_of(system, "system", row.where, empty=True).strip():
        messages = (Message("system", system), *messages)
    return messages


def half(value: Any, field: str, row: RawRow, before: Sequence[Message]) -> tuple[Message, ...]:
    """Return the turns of one half of a pair, with those of the prompt `before` it."""
    if isinstance(value, str) and not before:
        return transcript(value, field, row.where)
    if not isinstance(value, list):
        return (*before, message(value, field, row.where))
    messages = turns(value, field, row.where)
    # Some data sets give the prompt and repeat it in both halves, there with a system turn before it or without.
    for start in range(0, 1 + any(one.role == "system" for one in messages[:1])):
        repeated = messages[start : start + len(before)]
        if before and repeated == tuple(before) and len(messages) > start + len(before):
            return messages
    return (*before, *messages)


def pair(row: RawRow, chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> Pair:
    """Return the pair of two conversations; what both begin with is the prompt.

    Raises:
        InputError: the two are the same, or do not answer one prompt.
    """
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        raise InputError(f"{row.where}: chosen and rejected are the same (there is nothing to prefer)")
    prompt = chosen[:shared]
    if not prompt or prompt[-1].role not in ("user", "tool"):
        what = f"which ends with {prompt[-1].role}'s" if prompt else "and there is no prompt"
        raise InputError(
            f"{row.where}: chosen and rejected share {shared} turns, {what} (both must answer one prompt)"
        )
    found = [
        conversation(whole, name, row, shared) for name, whole in (("chosen", chosen), ("rejected", rejected))
    ]
    return Pair(found[0], found[1], row.where, _margin(row))


def _margin(row: RawRow) -> float | None:
    """Return by how much the chosen answer is preferred; None where the row does not say.

    Raises:
        InputError: what it says is no number.
    """
    for names in (("margin",), ("score_chosen", "score_rejected")):
        given = [row.values.get(name) for name in names]
        if any(one is None for one in given):
            continue
        for name, one in zip(names, given, strict=True):
            if isinstance(one, bool) or not isinstance(one, int | float) or not math.isfinite(one):
                raise InputError(f"{row.where}: {name} is {quoted(one)} (write a number, or leave it out)")
        first, *second = (float(one) for one in given if one is not None)
        return first - second[0] if second else first
    return None
