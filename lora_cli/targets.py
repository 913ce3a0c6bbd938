"""Which tokens of a batch are trained, and where the token before each stands: found once, as rows become a batch.

A pass that looked for them itself would wait for the device, since their number decides the shapes that follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_cli.types import IGNORED

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Targets:
    """The trained tokens of a batch that something predicts, row by row; N in all."""

    tokens: torch.Tensor  # (N,) int64
    predictors: torch.Tensor  # (N,) int64
    """Place of the token before each in the flattened (B, T); rows that share a prompt share its last one's."""
    counts: tuple[int, ...]
    """How many each row has, in order; a document that only fills a sequence up is no row."""

    @classmethod
    def of_rows(cls, labels: torch.Tensor) -> Targets:
        """Return those of rows (B, T) in which each token is predicted by the one before it."""
        trained = labels[:, 1:] != IGNORED
        rows, places = trained.nonzero(as_tuple=True)
        counts = tuple(trained.sum(dim=1).tolist())
        return cls(labels[:, 1:][rows, places], rows * labels.shape[1] + places, counts)

    def to(self, device: torch.device) -> Targets:
        """Return them on a device."""
        tokens, predictors = (part.to(device, non_blocking=True) for part in (self.tokens, self.predictors))
        return Targets(tokens, predictors, self.counts)
