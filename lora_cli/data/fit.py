"""Rows that are too long, and rows with nothing to train: kept, cut or left out, and always counted."""

from __future__ import annotations

from dataclasses import dataclass

from lora_cli.data.faults import Faults
from lora_cli.recipe.schema import Data
from lora_cli.types import Example, SplitCounts


@dataclass(slots=True)
class Tally:
    """What became of the rows so far; `longest` is the longest row as written, in tokens."""

    rows: int = 0
    kept: int = 0
    truncated: int = 0
    too_long: int = 0
    untrained: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    lost_trained_tokens: int = 0
    longest: int = 0

    def counts(self) -> SplitCounts:
        """Return the counts that a run reports."""
        return SplitCounts(
            rows=self.rows,
            kept=self.kept,
            dropped=self.too_long + self.untrained,
            truncated=self.truncated,
            tokens=self.tokens,
            trained_tokens=self.trained_tokens,
            lost_trained_tokens=self.lost_trained_tokens,
        )


def fit(example: Example, where: str, data: Data, tally: Tally, faults: Faults) -> Example | None:
    """Apply `max_length` and `overlong` to one row, (T,) -> at most (max_length,); None: left out."""
    length, limit = len(example.input_ids), data.max_length
    targets = int(example.trained.sum())
    tally.rows += 1
    tally.longest = max(tally.longest, length)
    if length > limit:
        if data.overlong == "error":
            faults.add(
                f"{where}: {length} tokens, data.max_length is {limit} (raise it, or change data.overlong)"
            )
            return None
        if data.overlong == "drop":
            tally.too_long += 1
            tally.lost_trained_tokens += targets
            return None
        example = Example(example.input_ids[:limit], example.trained[:limit])
        left = int(example.trained.sum())
        tally.lost_trained_tokens += targets - left
        tally.truncated += left > 0
        targets = left
    if not targets:
        tally.untrained += 1
        return None
    tally.kept += 1
    tally.tokens += len(example.input_ids)
    tally.trained_tokens += targets
    return example
