"""The prepare stage run alone on rows that a test wrote, and what is found in its result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_cli.recipe.schema import Data
from lora_cli.stages import prepare
from lora_cli.types import Examples, Prepared


class Alone:
    """The only process of a run."""

    def in_main(self, work: Any) -> None:
        work()


def lines_of(rows: list[str]) -> bytes:
    return "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()


def write(path: Path, rows: list[str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lines_of(rows))
    return str(path)


def run(tokenizer: Any, **data: Any) -> tuple[Prepared, list[str]]:
    said: list[str] = []
    more = {name: data.pop(name) for name in ("consumes", "need_train") if name in data}
    return prepare.run(Data(**data), "assistant", tokenizer, Alone(), said.append, **more), said


def texts(tokenizer: Any, examples: Examples | None) -> list[str]:
    """Return what each row says, without the end token."""
    assert examples is not None
    found = [tokenizer.decode(examples[row].input_ids) for row in range(len(examples))]
    return [one.removesuffix(tokenizer.eos_token) for one in found]


def places(examples: Examples | None) -> list[str]:
    assert examples is not None
    return [examples.where(row) for row in range(len(examples))]
