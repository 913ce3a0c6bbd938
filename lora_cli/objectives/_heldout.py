"""The held-out loss: the objective's own loss over a data set, weighted by units and split over processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

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
    sums: dict[str, float] = {"loss": 0.0, "units": 0.0}

    def batches_of(rows: Sequence[int]) -> list[Batch]:
        read = [(row, examples[row]) for row in rows]
        return objective.heldout_batches(model, read, Progress(0, 1), tokens=size.tokens)

    with model.evaluating():
        for first in range(0, len(by_length), 256):
            waiting = deque(batches_of(by_length[first : first + 256]))
            while waiting and not stopping():
                batch = waiting.popleft()
                with attempt() as tried:
                    loss, metrics = objective.loss_sum(model, batch)
                    found = {"loss": float(loss), "units": float(objective.units(batch)), **metrics}
                    for name, value in found.items():
                        sums[name] = sums.get(name, 0.0) + value
                if tried.failed:
                    size.halve(batch, examples)
                    waiting.extendleft(reversed(batches_of(batch.rows)))
    return sums
