"""Which rows an optimizer step trains on: a function of seed and step, not a state that must be saved."""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt

from lora_cli.recipe.schema import Train
from lora_cli.seeding import stream_seed


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Return the optimizer steps of one pass; the last of them may hold fewer than `batch_size` rows."""
    return math.ceil(num_rows / batch_size)


def total_steps(num_rows: int, batch_size: int, *, epochs: float, max_steps: int | None) -> int:
    """Return the optimizer steps of the run: `max_steps` where given, else `epochs` passes, rounded up."""
    if max_steps is not None:
        return max_steps
    return max(1, math.ceil(round(epochs * steps_per_epoch(num_rows, batch_size), 9)))


def planned_steps(settings: Train, num_rows: int, *, updates: int = 1) -> int:
    """Return the optimizer steps of a run over so many training rows, with so many `updates` on the same ones."""
    if settings.max_steps is not None:
        return settings.max_steps
    return updates * total_steps(num_rows, settings.batch_size, epochs=settings.epochs, max_steps=None)


def rows_of_step(step: int, *, num_rows: int, batch_size: int, seed: int) -> list[int]:
    """Return the rows of a step over all processes: a slice of its epoch's permutation, at equal cost for any step."""
    epoch, index = divmod(step, steps_per_epoch(num_rows, batch_size))
    rows = _permutation(num_rows, seed, epoch)[index * batch_size : (index + 1) * batch_size]
    return [int(row) for row in rows]


def step_of_longest(
    lengths: npt.NDArray[np.int64], first: int, last: int, *, batch_size: int, seed: int
) -> int:
    """Return which step from `first` to the end of its epoch, and before `last`, has the longest row; lengths (R,)."""
    epoch, index = divmod(first, steps_per_epoch(len(lengths), batch_size))
    rows = _permutation(len(lengths), seed, epoch)[index * batch_size :][: (last - first) * batch_size]
    return first + int(np.argmax(lengths[rows])) // batch_size


@functools.lru_cache(maxsize=1)
def _permutation(num_rows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(stream_seed(seed, "order", epoch))).permutation(num_rows)
