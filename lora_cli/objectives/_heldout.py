"""The held-out loss: the objective's own loss over a data set, weighted by units and split over processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch

from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.memory import PassSize, attempt
from lora_cli.objectives._base import Objective
from lora_cli.types import Batch, Examples, Progress


def heldout_sums(
    objective: Objective,
    model: AdaptedModel,
    examples: Examples,
    *,
    rank: int,
    world_size: int,
    size: PassSize,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Return this process' sums: `loss`, `units`, and the objective's metrics; where it is `stopping`, of some rows.

    A pass that does not fit into memory is made again in parts.

    Raises:
        ResourceError: one row does not fit.
    """
    mine = range(rank, len(examples), world_size)
    # Neighbours in length go together; a chunk bounds how many rows are held as tensors at a time.
    by_length: Sequence[int] = sorted(mine, key=lambda row: int(examples.lengths[row]))
    # All of them in every process, also in one without rows, so that they can be summed over processes.
    sums: dict[str, float] = dict.fromkeys(("loss", "units", *objective.reported), 0.0)

    def batches_of(rows: Sequence[int]) -> list[Batch]:
        read = [(row, examples[row]) for row in rows]
        return objective.heldout_batches(model, read, Progress(0, 1), tokens=size.tokens)

    with model.evaluating():
        objective.begin_heldout(model, examples, tokens=size.tokens)
        for first in range(0, len(by_length), 256):
            waiting = deque(batches_of(by_length[first : first + 256]))
            while waiting and not stopping():
                batch = waiting.popleft()
                with attempt() as tried:
                    loss, metrics = objective.loss_sum(model, batch)
                    names = ("loss", *metrics)
                    values = torch.stack([loss.float(), *(one.float() for one in metrics.values())]).tolist()
                    for name, value in zip(names, values, strict=True):
                        sums[name] += value
                    sums["units"] += objective.units(batch)
                if tried.failed:
                    size.halve(batch, examples)
                    waiting.extendleft(reversed(batches_of(batch.rows)))
    return sums


def means_of(sums: Mapping[str, float], add: Callable[[list[float]], list[float]]) -> dict[str, float]:
    """Return the mean of each sum but `units` over all units; `add` sums numbers over the processes."""
    names = sorted(sums.keys() - {"units"})
    units, *values = add([sums["units"], *(sums[name] for name in names)])
    return {name: value / max(units, 1.0) for name, value in zip(names, values, strict=True)}
