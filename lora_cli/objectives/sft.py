"""Supervised fine-tuning: the cross-entropy of the trained tokens, summed; the unit is one trained token."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from lora_cli.models.adapted import AdaptedModel
from lora_cli.objectives._base import Items, Metrics, Objective, pad_batches
from lora_cli.objectives._packing import pack_batches
from lora_cli.types import Batch, Example, Progress, Scores


class Sft(Objective):
    """Next-token prediction on the tokens that the data marks as trained."""

    reported = ("correct",)
    needs_reference = False

    def __init__(self, *, pad_id: int) -> None:
        self.pad_id = pad_id

    def micro_batches(
        self, model: AdaptedModel, rows: Items, progress: Progress, *, tokens: int
    ) -> list[Batch]:
        """Return the rows packed where the model keeps them apart, else padded batches of rows of similar length."""
        del progress
        examples = [(index, row) for index, row in rows if isinstance(row, Example)]
        assert len(examples) == len(rows)
        if model.packs:
            return pack_batches(examples, tokens=tokens, device=model.device)
        return pad_batches(examples, tokens=tokens, pad_id=self.pad_id, device=model.device)

    def units(self, batch: Batch) -> int:
        """Return the number of trained tokens that have a prediction: all but a row's first token."""
        return sum(batch.targets.counts)

    def loss_sum(self, model: AdaptedModel, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return the summed negative log-likelihood, and in evaluation how many tokens were the most likely one."""
        losses, correct = model.token_losses(batch)  # (N,)
        return losses.sum(), {} if correct is None else {"correct": correct.sum()}

    def scores(self, means: Mapping[str, float]) -> Scores:
        """Return loss, perplexity and the part of the tokens that were the most likely one."""
        loss = means["loss"]
        return {
            "loss": loss, "perplexity": math.exp(min(loss, 700.0)), "token_accuracy": means.get("correct", 0.0)
        }  # fmt: skip


OBJECTIVE = Sft
