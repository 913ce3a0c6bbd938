"""Prompts of rows of any format: what stands before the last answer, or a row that has no answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

from lora_cli.data.columns import text_of
from lora_cli.data.faults import Faults
from lora_cli.data.formats import choose_format
from lora_cli.data.head import HEAD_ROWS, Origin, origins
from lora_cli.data.messages import turns
from lora_cli.data.read import RawRow, find_sources
from lora_cli.errors import InputError
from lora_cli.recipe.schema import Constitution, Data
from lora_cli.types import Conversation, Labelled, Message, Pair, Row, Text

_ANSWERS = ("completion", "chosen", "rejected")


def read_prompts(settings: Constitution, data: Data, most: int | None = None) -> list[Conversation]:
    """Return the prompts that the recipe names, each a conversation that ends with the user's turn.

    `most` bounds how many are read, besides the recipe's own bound.

    Raises:
        InputError: there are none, a file cannot be read, or rows are bad; with a line for each of the first five.
    """
    key = "data.train" if settings.prompts is None else "constitution.prompts"
    if settings.prompts is None:
        found = origins(data, "train")
    else:
        sources = find_sources(settings.prompts, key, data.train_split, data.revision)
        found = [Origin(key, tuple(sources), "auto", None, None)]
    bounds = [bound for bound in (settings.max_prompts, most) if bound is not None]
    faults = Faults(key)
    prompts: list[Conversation] = []
    for origin in found:
        prompts += _of_origin(origin, faults, min(bounds) - len(prompts) if bounds else None)
    faults.raise_if_any()
    if not prompts:
        raise InputError(f"{key}: no prompts (name a file with some in constitution.prompts)")
    return prompts


def said_by_place(data: Data) -> dict[str, tuple[str, ...]]:
    """Return what the user says in each row that may be held out, by `file:line`; rows of local files that can be read.

    Raises:
        InputError: a file is not there.
    """
    found: dict[str, tuple[str, ...]] = {}
    for origin in origins(data, "eval") or origins(data, "train"):
        local = tuple(source for source in origin.sources if source.path is not None)
        for prompt in _of_origin(replace(origin, sources=local, max_rows=None), Faults(origin.key), None):
            found[prompt.where] = tuple(turn.content for turn in prompt.messages if turn.role == "user")
    return found


def contents(prompts: Sequence[Conversation]) -> str:
    """Return a sha256 of what the prompts say, wherever they lie."""
    digest = hashlib.sha256()
    for prompt in prompts:
        said = [[turn.role, turn.content] for turn in prompt.messages]
        digest.update(json.dumps(said).encode() + b"\n")
    return digest.hexdigest()


def _of_origin(origin: Origin, faults: Faults, most: int | None) -> list[Conversation]:
    bounds = [bound for bound in (origin.max_rows, most) if bound is not None]
    found: list[Conversation] = []
    for source in origin.sources:
        own = Faults(source.name)
        read: Callable[[RawRow], Row] | None = None
        left = min(bounds) - len(found) if bounds else None
        for row in islice(source.rows(own), left):
            try:
                prompt = _alone(row)
                if prompt is None:
                    read = (
                        read
                        or choose_format(
                            origin.format,
                            origin.fields,
                            list(islice(source.rows(own), HEAD_ROWS)),
                            origin.key,
                        )[1]
                    )
                    prompt = _before_answer(read(row))
                found.append(_checked(prompt, row.where))
            except InputError as fault:
                faults.add(fault)
        faults.join(own.count, own.lines)
    return found


def _alone(row: RawRow) -> tuple[Message, ...] | None:
    """Return the turns of a row that has no answer; None where it has one."""
    values = row.values
    if "prompt" in values and not any(name in values for name in _ANSWERS):
        prompt = values["prompt"]
        if isinstance(prompt, list):
            return turns(prompt, "prompt", row.where)
        return (Message("user", text_of(prompt, "prompt", row.where)),)
    messages = values.get("messages")
    if isinstance(messages, list) and not any(name in values for name in _ANSWERS):
        found = turns(messages, "messages", row.where)
        if found and found[-1].role == "user":
            return found
    return None


def _before_answer(row: Row) -> tuple[Message, ...]:
    if isinstance(row, Text):
        raise InputError(f"{row.where}: is a text without turns, which asks for no answer (give prompts)")
    one = row.chosen if isinstance(row, Pair) else row.conversation if isinstance(row, Labelled) else row
    if one.tools:
        raise InputError(f"{one.where}: offers functions, which are not judged by principles (leave it out)")
    if isinstance(row, Pair) and one.prompt_turns is not None:
        return one.messages[: one.prompt_turns]
    return one.messages[:-1]


def _checked(turns_: tuple[Message, ...], where: str) -> Conversation:
    if not turns_ or turns_[-1].role != "user":
        raise InputError(f"{where}: the prompt does not end with the user's turn (end it with one)")
    if any(turn.role == "tool" or turn.extra for turn in turns_):
        raise InputError(f"{where}: calls functions, which are not judged by principles (leave it out)")
    return Conversation(turns_, where)
