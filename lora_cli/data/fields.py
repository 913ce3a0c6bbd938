"""`data.fields`: templates that describe a row of any shape; `{name}` stands for a column, `{{` and `}}` for braces."""

from __future__ import annotations

import string
from collections.abc import Callable

from lora_cli.data.columns import listed, near, text_of
from lora_cli.data.read import RawRow
from lora_cli.errors import InputError
from lora_cli.recipe.schema import Fields
from lora_cli.types import Conversation, Message


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
                    found = f"found: {listed(row.values)}{near(name, row)}"
                    raise InputError(f"{row.where}: {key} names column {name!r}, which is missing ({found})")
                value = row.values[name]
                # Numbers are common answers; any other type written into a text is a mistake.
                number = isinstance(value, int | float) and not isinstance(value, bool)
                filled.append(
                    str(value) if number else text_of(value, f"column {name!r}", row.where, empty=True)
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
        turns = [Message(role, text_of(fill(row), keys[role], row.where)) for role, fill in fills.items()]
        return Conversation(tuple(turns), row.where, prompt_turns=len(turns) - 1)

    return read
