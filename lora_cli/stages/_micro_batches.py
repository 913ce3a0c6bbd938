"""The passes of one process in an optimizer step: forward and backward, one micro-batch after the other.

The dropout of a pass is drawn from a stream that its seed, step and rows name, so that a step that is made again, after
a stop or in smaller passes, draws what it would have drawn.

A pass that does not fit into memory ends the step: its gradients are dropped and it begins again, first with all layers
recomputed, to the same bits, then in passes of half the rows, which is the step that the smaller size would have made
from the start. Nothing has to be known of how far a failed backward pass came.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_cli.adapters import Method
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.memory import PassSize, attempt, forget
from lora_cli.objectives import Objective
from lora_cli.objectives._base import Items
from lora_cli.runtime.dist import Runtime
from lora_cli.runtime.optim import MasterAdamW
from lora_cli.seeding import stream_seed
from lora_cli.stages._activations import Activations
from lora_cli.types import Batch, Examples, Progress

REMEDY = "lower data.max_length, or set model.quantize: nf4"
"""What makes a pass of one row smaller."""


@dataclass(slots=True)
class Passes:
    """What the passes of a step came to in one process."""

    loss: float
    """Its share of the step's mean loss."""
    suspect: Batch | None
    """A micro-batch whose loss is not finite."""
    batches: list[Batch]
    watched: list[float] = field(default_factory=list)
    """Sums of what the objective has watched, in its order."""


class MicroBatches:
    """Makes the passes of a step, and adds up their gradients."""

    def __init__(
        self,
        model: AdaptedModel,
        method: Method,
        objective: Objective,
        examples: Examples,
        optimizer: MasterAdamW,
        activations: Activations,
        tokens: int,
        seed: int,
        rt: Runtime,
        log: Callable[[str], None],
    ) -> None:
        self.model, self.method, self.objective, self.examples = model, method, objective, examples
        self.optimizer, self.activations, self.seed, self.rt = optimizer, activations, seed, rt
        remedy = f"set train.activations: auto, or {REMEDY}" if activations.wanted == "keep" else REMEDY
        self.size = PassSize(tokens, "train.micro_batch_tokens", remedy, log)
        self._last: Batch | None = None
        """The micro-batch whose pass was begun last."""

    def split(self, rows: Items, progress: Progress) -> list[Batch]:
        """Return the rows as micro-batches of the size that is known to fit."""
        return self.objective.micro_batches(self.model, rows, progress, tokens=self.size.tokens)

    def add_up(self, rows: Items, batches: list[Batch], progress: Progress, units: float) -> Passes:
        """Add the gradients of this process' rows, each divided by the step's `units`.

        Where the process is asked to stop, what has been added up is incomplete.

        Raises:
            ResourceError: a single row does not fit into memory.
        """
        while True:
            with attempt() as tried:
                passes = self._add_up(batches, progress.step, units)
            if not tried.failed:
                return passes
            self._make_room()
            batches = self.split(rows, progress)

    def settle_activations(self, rows: Items, progress: Progress) -> None:
        """Choose what passes keep: room for one that is full of the longest of these rows; nothing computed stays."""
        row = max(rows, key=lambda row: row[1].tokens)
        fitting = max(1, min(len(rows), self.size.tokens // row[1].tokens))
        gradients = sum(4 * master.numel() for master in self.optimizer.masters.values())
        self.activations.settle(row, fitting, progress, self.optimizer.bytes_to_come() + gradients)

    def try_out(self, rows: Items, progress: Progress) -> None:
        """Make the longest and the largest pass of these rows as training makes them, and forget what they computed.

        Raises:
            ResourceError: a single row does not fit into memory.
        """
        while True:
            batches = self.objective.trial_batches(self.model, rows, progress, tokens=self.size.tokens)
            largest = {id(one): one for one in (max(batches, key=_tokens), max(batches, key=self._longest))}
            gpus = [self.model.device] if self.model.device.type == "cuda" else []
            with torch.random.fork_rng(gpus), attempt() as tried:
                # What AdamW keeps from its first step on is there in every pass after it.
                kept = torch.empty(
                    self.optimizer.bytes_to_come(), dtype=torch.uint8, device=self.model.device
                )
                self._add_up(list(largest.values()), progress.step, 1.0)
                del kept
            self.optimizer.zero_grad()
            if not tried.failed:
                return
            self._make_room()

    def not_finite(self, passes: Passes, step: int, units: float) -> Batch | None:
        """Return the first micro-batch whose loss or gradient is not finite; None where only their sum is.

        The passes are made again one by one, which costs a step, and this is the run's last.
        """
        if passes.suspect is not None:
            return passes.suspect
        for batch in passes.batches:
            self.optimizer.zero_grad()
            self._pass(batch, step, units)
            if not math.isfinite(float(self.optimizer.gradient_norm())):
                return batch
        return None

    def _add_up(self, batches: list[Batch], step: int, units: float) -> Passes:
        self.model.model.train()
        sums: list[Tensor] = []
        for batch in batches:
            if self.rt.stopping:
                return Passes(0.0, None, batches, [0.0] * len(self.objective.watched))
            sums.append(self._pass(batch, step, units))
        penalty = self.method.penalty()
        if penalty is not None:
            # Every process adds the same term; its gradient must count once in the sum.
            (penalty / self.rt.world_size).backward()
        # Read once, and last: a GPU would stand still after each pass whose loss is asked for.
        values = torch.stack(sums).tolist() if sums else []
        suspects = (
            batch for batch, (loss, *_) in zip(batches, values, strict=True) if not math.isfinite(loss)
        )
        watched = [sum(row[1 + place] for row in values) for place in range(len(self.objective.watched))]
        return Passes(sum(row[0] / units for row in values), next(suspects, None), batches, watched)

    def _pass(self, batch: Batch, step: int, units: float) -> Tensor:
        """Add a micro-batch's gradients; return its summed loss and what is watched, float32 on the device."""
        self._last = batch
        torch.manual_seed(stream_seed(self.seed, "dropout", step, *batch.rows))
        loss, metrics = self.objective.loss_sum(self.model, batch)
        (loss / units).backward()
        return torch.stack([loss.detach(), *(metrics[name].float() for name in self.objective.watched)])

    def _make_room(self) -> None:
        """Have what a pass keeps recomputed, or where it is already, make smaller passes."""
        assert self._last is not None
        self.optimizer.zero_grad()
        if self.activations.make_room():
            forget(self.model.device)
        else:
            self.size.halve(self._last, self.examples)

    def _longest(self, batch: Batch) -> int:
        return max(int(self.examples.lengths[row]) for row in batch.rows)


def _tokens(batch: Batch) -> int:
    return batch.input_ids.numel()
