"""The rows of a split: token caches one after the other, and which of their rows are used, and how often."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_cli.data.cache import TokenCache
from lora_cli.types import Example, LabelledExample, PairExample

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CachedPart:
    """A cache, and what its rows are called: `name`, `separator`, and the line added to `lines_before`.

    `key` is where the recipe names the source. With `pairs` rows 2k and 2k + 1 are the chosen and the rejected answer.
    """

    cache: TokenCache
    name: str
    separator: str
    lines_before: int
    key: str = ""
    pairs: bool = False

    def where(self, line: int) -> str:
        """Return what a line is called that is counted from the beginning of the part."""
        return f"{self.name}{self.separator}{self.lines_before + line}"


class Dataset:
    """Rows of several caches by one index; satisfies `types.Examples`. `rows` (R,) are positions in all of them."""

    def __init__(self, parts: Sequence[CachedPart], rows: Indices | None = None) -> None:
        self.parts = parts
        lengths = [part.cache.lengths for part in parts]
        self._starts = np.cumsum([0, *(len(one) for one in lengths)])
        self.rows: Indices = np.arange(self._starts[-1]) if rows is None else rows
        self.lengths: npt.NDArray[np.int64] = np.concatenate(lengths)[self.rows]
        self.max_token: int = max(part.cache.max_token for part in parts)
        names = "".join(part.cache.fingerprint for part in parts)
        chosen = b"" if rows is None else rows.tobytes()
        self.fingerprint: str = hashlib.sha256(names.encode() + chosen).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        """Return row `index`; its arrays are views into the mapped file, read-only."""
        part, row = self.find(index)
        return part.cache[row]

    def where(self, index: int) -> str:
        """Return `file:line` of row `index` (`name: row n`, where there are no lines)."""
        part, row = self.find(index)
        return part.where(int(part.cache.lines[row]))

    @property
    def identities(self) -> npt.NDArray[np.uint64]:
        """A hash of what each row says, (R,)."""
        return np.concatenate([part.cache.identities for part in self.parts])[self.rows]

    @property
    def origins(self) -> tuple[Indices, Indices]:
        """Each row's part, and its place in that part's cache, (R,) and (R,)."""
        part = np.searchsorted(self._starts, self.rows, side="right") - 1
        return part, self.rows - self._starts[part]

    def find(self, index: int) -> tuple[CachedPart, int]:
        """Return the part of row `index`, and the row's place in its cache."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = int(self.rows[index])
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.parts[part], row - int(self._starts[part])


def whole_pairs(parts: Sequence[CachedPart], rows: Indices) -> Dataset:
    """Return the data set of these rows, (R,) positions in all parts; each first half of a pair with its second."""
    starts = np.cumsum([0, *(len(part.cache) for part in parts)])
    paired = np.array([part.pairs for part in parts])[np.searchsorted(starts, rows, side="right") - 1]
    counts = np.where(paired, 2, 1)
    both = np.repeat(rows, counts)
    both[np.cumsum(counts)[paired] - 1] += 1
    return Dataset(parts, both)


class Pairs:
    """The pairs of a data set whose rows 2k and 2k + 1 are the answers of pair k; satisfies `types.Examples`."""

    def __init__(self, answers: Dataset) -> None:
        self.answers = answers
        self.lengths: npt.NDArray[np.int64] = answers.lengths.reshape(-1, 2).sum(axis=1)
        self.max_token, self.fingerprint = answers.max_token, answers.fingerprint

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> PairExample:
        """Return pair `index`; its arrays are views into the mapped file, read-only."""
        part, row = self.answers.find(2 * index)
        return PairExample(part.cache[row], part.cache[row + 1], float(part.cache.values[row]))

    def where(self, index: int) -> str:
        """Return `file:line` of pair `index`."""
        return self.answers.where(2 * index)


class LabelledAnswers:
    """The rows of a data set, each with whether its answer is wanted; satisfies `types.Examples`.

    Of a pair the first answer is, the second is not.
    """

    def __init__(self, answers: Dataset) -> None:
        self.answers = answers
        self.lengths, self.max_token, self.fingerprint = (
            answers.lengths, answers.max_token, answers.fingerprint
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> LabelledExample:
        """Return row `index`; its arrays are views into the mapped file, read-only."""
        part, row = self.answers.find(index)
        wanted = row % 2 == 0 if part.pairs else bool(part.cache.values[row])
        return LabelledExample(part.cache[row], wanted)

    def where(self, index: int) -> str:
        """Return `file:line` of row `index`."""
        return self.answers.where(index)


def hold_out(
    identities: npt.NDArray[np.uint64], fraction: float | None, number: int | None
) -> npt.NDArray[np.bool_]:
    """Return which rows are held out, (R,): about a fraction of them, or a number, those with the lowest hashes.

    A row's own content decides, so that adding rows or changing their order moves none (or, for a number, few), and
    rows that say the same are held out together.
    """
    # Hashed once more: rows whose hashes begin alike could otherwise come from one source.
    mixed = identities * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    if number is not None:
        distinct = np.unique(mixed)
        limit = distinct[min(number, len(distinct)) - 1] if number else np.uint64(0)
        return np.asarray(mixed <= limit)
    assert fraction is not None
    return np.asarray(mixed < np.uint64(fraction * 2**64))


def mix(sources: Sequence[Indices], weights: Sequence[float]) -> Indices:
    """Return the rows of one epoch in which each source has its weight's share, (sum of all rows,).

    A source with too few rows is gone through again and again; of one with too many, the rest is left out, evenly. Each
    has a row at least, however small its weight.
    """
    total = sum(len(rows) for rows in sources)
    # The shares are cut from one sum, so that the rounded ones make up all of it.
    ends = np.round(np.cumsum(weights) / np.sum(weights) * total).astype(np.int64)
    chosen = []
    for rows, share in zip(sources, np.diff(ends, prepend=0), strict=True):
        wanted = max(1, int(share))
        if wanted < len(rows):
            chosen.append(rows[np.linspace(0, len(rows), wanted, endpoint=False).astype(np.int64)])
        else:
            chosen.append(np.resize(rows, wanted))
    return np.concatenate(chosen)


def overlap(train: Dataset, held_out: Dataset) -> list[tuple[int, int]]:
    """Return each held-out row that says what a training row says, with the first such row."""
    trained, first = np.unique(train.identities, return_index=True)
    places = np.searchsorted(trained, held_out.identities).clip(max=len(trained) - 1)
    same = trained[places] == held_out.identities
    return [(int(row), int(first[places[row]])) for row in np.nonzero(same)[0]]
