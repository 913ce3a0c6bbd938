"""Numbers of every row of a data set, taken from the memory maps in blocks, so that memory does not grow with it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from lora_cli.data.cache import TokenCache
from lora_cli.data.dataset import Dataset

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]
_BLOCK = 2**22
"""Tokens that are looked at together."""


def count(dataset: Dataset, mark: Callable[[Ids, Mask], Mask]) -> Counts:
    """Return how many tokens of each row are marked, (R,); `mark` takes tokens and trained of a block, (T,) -> (T,)."""
    return np.concatenate([_count(part.cache, mark) for part in dataset.parts])[dataset.rows]


def _count(cache: TokenCache, mark: Callable[[Ids, Mask], Mask]) -> Counts:
    tokens, trained, offsets = cache.flat()
    counts = np.zeros(len(cache), dtype=np.int64)
    row = 0
    while row < len(cache):
        end = max(row + 1, int(np.searchsorted(offsets, offsets[row] + _BLOCK, side="right")) - 1)
        block = slice(int(offsets[row]), int(offsets[end]))
        marked = mark(np.asarray(tokens[block]), np.asarray(trained[block]))
        # No row is empty: each has a token to train, and one before it.
        counts[row:end] = np.add.reduceat(marked, offsets[row:end] - offsets[row], dtype=np.int64)
        row = end
    return counts


def begins_twice(dataset: Dataset, token: int) -> npt.NDArray[np.bool_]:
    """Return which rows begin with a token two times, (R,)."""
    found = []
    for part in dataset.parts:
        tokens, _, offsets = part.cache.flat()
        first = offsets[:-1]
        found.append((tokens[first] == token) & (tokens[first + 1] == token))
    return np.concatenate(found)[dataset.rows]


def as_written(dataset: Dataset, *, split: bool) -> npt.NDArray[np.int64]:
    """Return one index for each row that stands in a file: repeated ones and a pair's second half left out.

    With `split` a row may have become several, which stand side by side with its line and its identity.
    """
    _, once = np.unique(dataset.rows, return_index=True)
    part, place = (one[once] for one in dataset.origins)
    first = np.ones(len(once), dtype=np.bool_)
    if split:
        lines = np.concatenate([one.cache.lines for one in dataset.parts])[dataset.rows[once]]
        said = dataset.identities[once]
        same = (part[1:] == part[:-1]) & (place[1:] == place[:-1] + 1)
        first[1:] = ~(same & (lines[1:] == lines[:-1]) & (said[1:] == said[:-1]))
    pairs = np.array([one.pairs for one in dataset.parts])[part]
    first[pairs] = place[pairs] % 2 == 0
    return once[first]
