"""Which activations a run keeps: as the recipe says, or as many as have room, from what its longest pass would keep."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lora_cli.models.activations import Recomputation, Saved, decoder_layers, extrapolate, saved_bytes
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.memory import attempt, forget, free_memory
from lora_cli.objectives import Objective
from lora_cli.objectives._base import Items
from lora_cli.types import Item, Progress

_SHORT = 128
"""Tokens of the longest row that is counted in place of a long one."""
_FAR = 0.25
"""Part of the room that a bound may come to for no closer look."""
_ROOM = {"cpu": 0.6, "cuda": 0.9}
"""Part of the free memory that is counted on. On a CPU the heap breaks up: a pass of 1 x 2048 tokens through 30 layers
of 576 in bfloat16 has 1.60 GB of tensors, and the process grows by 2.23 GB."""


class Activations:
    """The decision, and its change where a pass shows that it was wrong. It changes no bit of a gradient.

    `wanted` is the recipe's `train.activations`.
    """

    def __init__(
        self,
        wanted: str,
        model: AdaptedModel,
        objective: Objective,
        processes: int,
        log: Callable[[str], None],
    ) -> None:
        self.wanted, self.model, self.objective, self.log = wanted, model, objective, log
        self._sharing = processes if model.device.type == "cpu" else 1
        """Processes that the free memory is for."""
        self.filled = 1.0
        """Part of the room that the longest pass is thought to need; 1 where nothing was estimated."""
        self.layers = Recomputation(decoder_layers(model.model) if wanted != "keep" else [])
        count = len(self.layers.layers)
        if wanted != "keep" and not count:
            kind = model.model.config.model_type
            log(f"activations: kept; {kind} has no layers that follow each other")
        elif wanted in ("recompute", "offload"):
            self._recompute_all()

    def _recompute_all(self) -> None:
        count = len(self.layers.layers)
        offload = self.wanted == "offload" and self.model.device.type == "cuda"
        self.layers.set(count, offload=offload)
        told = "; their inputs wait in the CPU's memory" if offload else ""
        if self.wanted == "offload" and not offload:
            told = "; there is no other memory to offload their inputs to"
        self.log(f"activations: all {count} layers are recomputed{told}")

    def settle(self, row: tuple[int, Item], number: int, progress: Progress, taken: int) -> None:
        """Choose for a pass of `number` rows like this one, if the choice is ours; `taken` bytes are needed besides.

        No weight, gradient or random stream is changed.
        """
        layers = len(self.layers.layers)
        if self.wanted != "auto" or not layers:
            return
        room = _ROOM[self.model.device.type] * free_memory(self.model.device) / self._sharing - taken
        gpus = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(gpus), self.layers.kept(), attempt() as tried:
            if bound := self._bound(row, number, progress, room):
                self.layers.set(0)
                self.filled = bound / room
                self.log(f"activations: kept, at most {bound / 1e9:.2f} GB of {room / 1e9:.2f} that are free")
                return
            saved = self._estimate(row, number, progress)
            if saved.to_recompute(room):  # little room: now the pass itself, which costs its forward pass
                saved = self._count([row] * number, progress)
        if tried.failed:
            self.make_room()
            forget(self.model.device)
            return
        count = saved.to_recompute(room)
        self.layers.set(count)
        self.filled = saved.peak(count) / room if room > 0 else 1.0
        needs, free = (f"{size / 1e9:.2f}" for size in (saved.peak(0), max(room, 0.0)))
        told = f"kept, about {needs}"
        if count:
            told = f"{count} of {layers} layers recomputed, about {saved.peak(count) / 1e9:.2f} in place of {needs}"
        self.log(f"activations: {told} GB of {free} that are free")

    def make_room(self) -> bool:
        """Recompute every layer after a pass did not fit, and return whether that is a change."""
        count = len(self.layers.layers)
        if self.wanted != "auto" or self.layers.count == count:
            return False
        self.layers.set(count)
        self.log(
            f"activations: a pass did not fit into memory; from here on all {count} layers are recomputed"
        )
        return True

    def _bound(self, row: tuple[int, Item], number: int, progress: Progress, room: float) -> float:
        """Return bytes that a pass cannot exceed, from one short pass; 0 where they are not far below the room.

        With its length, what a row keeps grows at most as its square.
        """
        index, example = row
        shortened = min(_SHORT, example.tokens)
        saved = self._count([(index, example.head(shortened))], progress)
        bound = number * (example.tokens / shortened) ** 2 * saved.peak(0)
        return bound if bound <= _FAR * room else 0.0

    def _estimate(self, row: tuple[int, Item], number: int, progress: Progress) -> Saved:
        """Return what a pass of so many rows keeps: of a long one from three short passes of one row."""
        index, whole = row
        length = whole.tokens
        shortened = min(_SHORT, length)
        if shortened < 4 or number * length <= 2 * _SHORT:
            return self._count([row] * number, progress)
        lengths = (shortened // 4, shortened // 2, shortened)
        # All of it trained: the head keeps the more, the more tokens are.
        heads = [whole.head(each) for each in lengths]
        return extrapolate(
            lengths, [self._count([(index, head)], progress) for head in heads], [length] * number
        )

    def _count(self, rows: Items, progress: Progress) -> Saved:
        tokens = sum(row.tokens for _, row in rows)
        (batch,) = self.objective.trial_batches(self.model, rows, progress, tokens=tokens)
        self.model.model.train()
        return saved_bytes(
            self.model.model, self.layers.layers, lambda: self.objective.loss_sum(self.model, batch)
        )
