"""Characters that the tokenizer has no token for: written as the unknown token, or byte by byte."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np

from lora_cli.data.dataset import Dataset
from lora_cli.data.measure import count
from lora_cli.recipe.schema import Data
from lora_cli.stages._rows_shown import TokenTexts, read_back, texts_of
from lora_cli.types import Prepared

SAMPLE = 200
"""Rows whose unknown characters are named."""
NAMED = 8
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def unknown(data: Data, split: Dataset, prepared: Prepared, texts: TokenTexts) -> dict[str, Any]:
    """Return how many tokens of a split stand for a character the tokenizer does not know, where, and which ones.

    A byte below 128 is a character of its own, such as the line break, which some vocabularies have only so.
    """
    tokenizer = prepared.tokenizer
    token = tokenizer.unk_token_id
    # Byte-level vocabularies know every byte; what they call unknown is their end token.
    no_token = token is None or texts.byte_level or token in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    lost = np.zeros(len(split), np.int64) if no_token else count(split, lambda ids, _: ids == token)
    values = {
        i: int(found[1], 16)
        for word, i in tokenizer.get_vocab().items()
        if (found := _BYTE.fullmatch(word)) and int(found[1], 16) >= 128
    }
    by_byte = (
        count(split, lambda ids, _: np.isin(ids, list(values))) if values else np.zeros(len(split), np.int64)
    )
    rows = np.nonzero(lost + by_byte)[0]
    found_in: dict[str, Any] = {
        "tokens": int(lost.sum()),
        "byte_tokens": int(by_byte.sum()),
        "rows": len(rows),
        "first": split.where(int(rows[0])) if len(rows) else None,
        "characters": [],
    }
    if len(rows):
        named = Counter(_of_bytes(split, rows[:SAMPLE], values))
        for row in read_back(data, prepared, split, rows[lost[rows] > 0][:SAMPLE].tolist()).values():
            named.update(_of_text("".join(texts_of(row)), tokenizer, token))
        found_in["characters"] = [character for character, _ in named.most_common(NAMED)]
    return found_in


def _of_bytes(split: Dataset, rows: Any, values: dict[int, int]) -> list[str]:
    found: list[str] = []
    for row in map(int, rows):
        ids = split[row].input_ids.tolist()
        run = bytes(values.get(i, 0) for i in ids)
        for piece in run.split(b"\0"):
            found += [one for one in piece.decode(errors="ignore") if one.isprintable()]
    return found


def _of_text(text: str, tokenizer: Any, token: int) -> list[str]:
    """Return the characters of a text that are the unknown token where they stand alone."""
    seen = {one: tokenizer(one, add_special_tokens=False)["input_ids"] for one in set(text) if one.strip()}
    return [one for one in text if token in seen.get(one, ())]
