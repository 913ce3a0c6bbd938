"""The held-out loss: the objective's own loss over a data set, weighted by units and split over processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lora_cli.models.adapted import AdaptedModel
from lora_cli.objectives._base import Objective
from lora_cli.types import Examples, Progress


def heldout_sums(
    objective: Objective,
    model: AdaptedModel,
    examples: Examples,
    *,
    rank: int,
    world_size: int,
    tokens: int,
    after_batch: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Return this process' sums: `loss`, `units`, and the objective's metrics."""
    mine = range(rank, len(examples), world_size)
    # Neighbours in length go together; a chunk bounds how many rows are held as tensors at a time.
    by_length: Sequence[int] = sorted(mine, key=lambda row: int(examples.lengths[row]))
    sums: dict[str, float] = {"loss": 0.0, "units": 0.0}
    with model.evaluating():
        for first in range(0, len(by_length), 256):
            rows = [(row, examples[row]) for row in by_length[first : first + 256]]
            for batch in objective.micro_batches(model, rows, Progress(0, 1), tokens=tokens):
                loss, metrics = objective.loss_sum(model, batch)
                sums["loss"] += float(loss)
                sums["units"] += objective.units(batch)
                for name, value in metrics.items():
                    sums[name] = sums.get(name, 0.0) + value
                if after_batch is not None:
                    after_batch()
    return sums
