"""Supervised fine-tuning: the cross-entropy of the trained tokens, summed; the unit is one trained token."""

from __future__ import annotations

from torch import Tensor

from lora_cli.models.adapted import AdaptedModel
from lora_cli.objectives._base import Metrics, Objective, Rows, pad_batches
from lora_cli.objectives._packing import pack_batches
from lora_cli.types import IGNORED, Batch, Progress


class Sft(Objective):
    """Next-token prediction on the tokens that the data marks as trained."""

    def __init__(self, *, pad_id: int) -> None:
        self.pad_id = pad_id

    def micro_batches(
        self, model: AdaptedModel, rows: Rows, progress: Progress, *, tokens: int
    ) -> list[Batch]:
        """Return the rows packed where the model keeps them apart, else padded batches of rows of similar length."""
        del progress
        if model.packs:
            return pack_batches(rows, tokens=tokens, device=model.device)
        return pad_batches(rows, tokens=tokens, pad_id=self.pad_id, device=model.device)

    def units(self, batch: Batch) -> int:
        """Return the number of trained tokens that have a prediction: all but a row's first token."""
        return int((batch.labels[:, 1:] != IGNORED).sum())

    def loss_sum(self, model: AdaptedModel, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return the summed negative log-likelihood, and in evaluation how many tokens were the most likely one."""
        losses, correct = model.token_losses(batch)  # (N,)
        return losses.sum(), {} if correct is None else {"correct": float(correct.sum())}


OBJECTIVE = Sft
