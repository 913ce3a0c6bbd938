"""Rows token by token: which are meant, what each token's text is, and what the collator makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lora_cli.data.dataset import Dataset
from lora_cli.data.faults import Faults
from lora_cli.data.head import origins
from lora_cli.data.read import Source
from lora_cli.data.tokenize import Reading, identity
from lora_cli.errors import InputError
from lora_cli.objectives._base import pad_batches
from lora_cli.recipe.schema import Data, Recipe
from lora_cli.types import IGNORED, Labelled, Pair, Prepared, Row, Text

AT_ONE_PLACE = 20
"""Most rows that are shown of one line: all rows of a JSON file may stand on its first."""

Wanted = list[tuple[str, list[int]]]
"""Split and rows of it that are shown together: one, or the two halves of a pair."""


class TokenTexts:
    """The text of single tokens, white space included, which decoding them alone would lose."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {int(i): token.content for i, token in tokenizer.added_tokens_decoder.items()}
        backend = tokenizer.backend_tokenizer
        self.byte_level = "ByteLevel(" in f"{backend.decoder!r} {backend.pre_tokenizer!r}"
        # A byte-level vocabulary writes each byte as a printable character of its own.
        self._bytes = {character: byte for byte, character in bytes_to_unicode().items()}

    def text(self, token: int) -> str:
        """Return a token's text; bytes that are part of a character are written as `\\xe6`."""
        if token in self._added:
            return self._added[token]
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return f"<{token}>"
        if self.byte_level and all(character in self._bytes for character in piece):
            return bytes(self._bytes[character] for character in piece).decode(errors="backslashreplace")
        return str(piece).replace("\u2581", " ")

    def is_control(self, token: int) -> bool:
        """Say whether a token is one of those that were added to the vocabulary."""
        return token in self._added

    def named(self, token: int) -> dict[str, Any]:
        """Return a token's id and text."""
        return {"id": int(token), "text": self.text(int(token))}


def texts_of(row: Row) -> Iterator[str]:
    """Yield all text that a row holds."""
    if isinstance(row, Text):
        yield row.text
    elif isinstance(row, Pair):
        yield from texts_of(row.chosen)
        yield from texts_of(row.rejected)
    else:
        conversation = row.conversation if isinstance(row, Labelled) else row
        yield from (turn.content for turn in conversation.messages)


def find_rows(splits: Mapping[str, Dataset], show: int, places: Sequence[str]) -> Wanted:
    """Return the first `show` training rows, and those at `places`.

    Raises:
        InputError: at one of the places stands no row that is used.
    """
    wanted: Wanted = []
    row = 0
    while len(wanted) < show and row < len(splits["train"]):
        wanted.append(("train", _whole(splits["train"], row)))
        row = wanted[-1][1][-1] + 1
    for place in places:
        found = [(name, rows) for name, split in splits.items() for rows in _at(split, place)]
        if not found:
            raise InputError(_nothing_at(place, splits))
        wanted += found[:AT_ONE_PLACE]
    return wanted


def _whole(split: Dataset, row: int) -> list[int]:
    """Return the row, with the other half where it is the first of a pair."""
    part, place = split.find(row)
    has_other = row + 1 < len(split) and int(split.rows[row + 1]) == int(split.rows[row]) + 1
    return [row, row + 1] if part.pairs and place % 2 == 0 and has_other else [row]


def _at(split: Dataset, place: str) -> Iterator[list[int]]:
    name, _, number = place.rpartition(":")
    digits = number.removeprefix(" row ").strip()
    if not digits.isdecimal():
        return
    parts, places = split.origins
    seen: set[int] = set()
    for index, part in enumerate(split.parts):
        if name not in (part.name, Path(part.name).name):
            continue
        kept = np.nonzero(part.cache.lines == int(digits) - part.lines_before)[0]
        for row in np.nonzero((parts == index) & np.isin(places, kept))[0]:
            if int(split.rows[row]) not in seen:
                rows = _whole(split, int(row))
                seen |= {int(split.rows[one]) for one in rows}
                yield rows


def _nothing_at(place: str, splits: Mapping[str, Dataset]) -> str:
    names = list(dict.fromkeys(part.name for split in splits.values() for part in split.parts))
    name = place.rpartition(":")[0]
    if not any(name in (one, Path(one).name) for one in names):
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        return f"--row {place}: not a row of this recipe (write FILE:LINE; its files are {listed})"
    return (
        f"--row {place}: no row that is used begins on this line (it is blank, bad, dropped, or not chosen)"
    )


def show_rows(
    recipe: Recipe, splits: Mapping[str, Dataset], wanted: Wanted, prepared: Prepared, texts: TokenTexts
) -> list[dict[str, Any]]:
    """Return what the collator makes of the rows: each token's id, its text, and whether it is trained."""
    sources = {source.key: source for source in prepared.sources}
    shown = []
    for name, rows in wanted:
        split = splits[name]
        source = sources[split.find(rows[0])[0].key]
        wanted_answer = None
        if source.kind == "labelled answers":
            row = read_back(recipe.data, prepared, split, rows).get(rows[0])
            wanted_answer = row.wanted if isinstance(row, Labelled) else None
        sides = ("chosen", "rejected") if len(rows) == 2 else (None,)
        shown.append(
            {
                "split": name,
                "row": rows[0],
                "where": split.where(rows[0]),
                "source": source.key,
                "kind": source.kind,
                "wanted": wanted_answer,
                "sides": [
                    {"name": side, "tokens": _tokens(split, row, prepared.pad_id, texts)}
                    for side, row in zip(sides, rows, strict=True)
                ],
            }
        )
    return shown


def _tokens(split: Dataset, row: int, pad_id: int, texts: TokenTexts) -> list[dict[str, Any]]:
    (batch,) = pad_batches([(row, split[row])], tokens=1, pad_id=pad_id, device=torch.device("cpu"))
    labels = batch.labels[0].tolist()
    return [
        {
            "id": token,
            "text": texts.text(token),
            "trained": label != IGNORED,
            "control": texts.is_control(token),
        }
        for token, label in zip(batch.input_ids[0].tolist(), labels, strict=True)
    ]


def read_back(data: Data, prepared: Prepared, split: Dataset, rows: Sequence[int]) -> dict[int, Row]:
    """Return rows of a split as they were written, read from their files again."""
    identities = split.identities
    groups: dict[tuple[str, str], dict[tuple[int, int], list[int]]] = {}
    for row in rows:
        part, index = split.find(row)
        line = part.lines_before + int(part.cache.lines[index])
        group = groups.setdefault((part.key, part.name), {})
        group.setdefault((line, int(identities[row])), []).append(row)
    known = {origin.key: origin for origin in (*origins(data, "train"), *origins(data, "eval"))}
    formats = {source.key: source.format for source in prepared.sources}
    found: dict[int, Row] = {}
    for (key, name), group in groups.items():
        source = next(one for one in known[key].sources if one.name == name)
        reading = Reading(formats[key], known[key].fields)
        for place, written in _read(source, reading, {line for line, _ in group}):
            found |= dict.fromkeys(group.get(place, ()), written)
    return found


def _read(source: Source, reading: Reading, lines: set[int]) -> Iterator[tuple[tuple[int, int], Row]]:
    """Yield rows on these lines of a source, each with its line and its identity."""
    reader, last = reading.reader(), max(lines)
    for raw in source.rows(Faults(source.name)):
        if raw.number > last:
            return
        if raw.number in lines:
            try:
                row = reader(raw)
            except InputError:
                continue
            yield (raw.number, identity(row)), row
