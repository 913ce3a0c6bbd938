"""A row read by the format that its columns tell, for the tests of formats."""

from __future__ import annotations

from typing import Any

import pytest

from lora_cli.data.formats import FORMATS, detect
from lora_cli.data.read import RawRow
from lora_cli.errors import InputError
from lora_cli.types import Conversation


def row(**values: Any) -> RawRow:
    return RawRow(values, "f.jsonl:7", 7)


def read(**values: Any) -> Any:
    """Read a row by the format that its columns tell."""
    return FORMATS[detect([row(**values)])].read(row(**values))


def said(conversation: Conversation) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in conversation.messages]


def refused(message: str, name: str | None = None, **values: Any) -> None:
    with pytest.raises(InputError) as caught:
        FORMATS[name].read(row(**values)) if name else read(**values)
    (line,) = caught.value.lines
    assert line.startswith("f.jsonl:7: ")
    assert message in line
