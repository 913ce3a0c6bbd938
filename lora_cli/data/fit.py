"""Rows that are too long, and rows with nothing to train: kept, cut or left out, and always counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from lora_cli.data.faults import Faults
from lora_cli.recipe.schema import Data
from lora_cli.types import Example, SplitCounts


@dataclass(slots=True)
class Tally:
    """What became of the rows so far; `longest` is the longest row as written, in tokens."""

    rows: int = 0
    kept: int = 0
    bad: int = 0
    truncated: int = 0
    too_long: int = 0
    untrained: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    lost_trained_tokens: int = 0
    longest: int = 0

    def __add__(self, other: Tally) -> Tally:
        """Return the tally of both."""
        sums = {name: value + getattr(other, name) for name, value in asdict(self).items()}
        return Tally(**{**sums, "longest": max(self.longest, other.longest)})

    def counts(self) -> SplitCounts:
        """Return the counts that a run reports."""
        return SplitCounts(
            rows=self.rows,
            kept=self.kept,
            dropped=self.too_long + self.untrained,
            bad=self.bad,
            truncated=self.truncated,
            tokens=self.tokens,
            trained_tokens=self.trained_tokens,
            lost_trained_tokens=self.lost_trained_tokens,
        )


def fit(examples: Sequence[Example], where: str, data: Data, tally: Tally, faults: Faults) -> list[Example]:
    """Apply `max_length` and `overlong` to what one row became, each (T,) -> at most (max_length,).

    A pair is two examples, which are kept or left out together. With `split` a row can become several.
    """
    tally.rows += 1
    lengths = [len(one.input_ids) for one in examples]
    trained = [int(np.count_nonzero(one.trained)) for one in examples]
    tally.longest = max(tally.longest, *lengths)
    limit = data.max_length
    kept = list(examples)
    if max(lengths) > limit:
        if data.overlong == "error":
            faults.add(
                f"{where}: {max(lengths)} tokens, data.max_length is {limit} (raise it, or change data.overlong)"
            )
            return []
        targets = sum(trained)
        if data.overlong == "drop":
            tally.too_long += 1
            tally.lost_trained_tokens += targets
            return []
        kept = [piece for one in examples for piece in _cut(one, limit, data.overlong)]
        lengths = [len(one.input_ids) for one in kept]
        trained = [int(np.count_nonzero(one.trained)) for one in kept]
        tally.lost_trained_tokens += targets - sum(trained)
        tally.truncated += sum(trained) > 0
    if not all(trained):
        tally.untrained += 1
        return []
    tally.kept += len(kept) if data.overlong == "split" else 1
    tally.tokens += sum(lengths)
    tally.trained_tokens += sum(trained)
    return kept


def _cut(example: Example, limit: int, how: str) -> list[Example]:
    ids, trained = example.input_ids, example.trained
    if how == "truncate_right":
        return [Example(ids[:limit], trained[:limit])]
    starts = [max(0, len(ids) - limit)] if how == "truncate_left" else range(0, len(ids), limit)
    pieces = []
    for start in starts:
        piece = trained[start : start + limit].copy()
        piece[:1] = False  # nothing stands before a piece's first token to predict it from
        if how == "truncate_left" or piece.any():  # a single token at the end of a split row
            pieces.append(Example(ids[start : start + limit], piece))
    return pieces
