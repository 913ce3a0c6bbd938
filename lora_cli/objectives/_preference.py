"""What objectives over pairs of answers have in common: batches of pairs, and what is reported of them.

The unit is a pair. Rewards are what an objective makes of an answer's log-probability; the margin is the chosen one's
reward less the rejected one's. A pair of equal rewards counts as half right.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_cli.models.adapted import AdaptedModel
from lora_cli.objectives._answers import Answers, answers_of, pair_batches
from lora_cli.objectives._base import Items, Metrics, Objective
from lora_cli.types import Batch, Pair, Progress, Scores


@dataclass(frozen=True, slots=True)
class Judged:
    """Of each pair, (P,) float64: its loss, and the rewards of both answers, without a gradient."""

    losses: Tensor
    chosen: Tensor
    rejected: Tensor


class PreferenceObjective(Objective):
    """An objective over pairs."""

    consumes = (Pair,)
    reported = watched = (
        "right", "reward_margin", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected"
    )  # fmt: skip
    needs_reference = False

    def __init__(self, *, pad_id: int) -> None:
        self.pad_id = pad_id

    @abstractmethod
    def judge(self, policy: Answers, reference: Answers | None) -> Judged:
        """Return losses and rewards of pairs from what the model and the one it began with give their answers."""

    def micro_batches(
        self, model: AdaptedModel, rows: Items, progress: Progress, *, tokens: int
    ) -> list[Batch]:
        """Return the pairs as batches; where the model keeps rows apart they are packed, each prompt once."""
        del progress
        return pair_batches(model, rows, tokens=tokens, pad_id=self.pad_id, share=True)

    def units(self, batch: Batch) -> int:
        """Return the number of pairs."""
        return len(batch.rows)

    def loss_sum(self, model: AdaptedModel, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return the summed loss of the pairs, and sums over them to report."""
        reference = None
        if self.needs_reference:
            with model.as_it_began():
                reference = answers_of(model, batch)
        policy = answers_of(model, batch)
        judged = self.judge(policy, reference)
        with torch.no_grad():
            margins = judged.chosen - judged.rejected
            chosen, rejected = policy.pairs(policy.logps)
            metrics = {
                "right": (margins > 0).sum() + (margins == 0).sum() / 2,
                "reward_margin": margins.sum(),
                "reward_chosen": judged.chosen.sum(),
                "reward_rejected": judged.rejected.sum(),
                "logp_chosen": chosen.sum(),
                "logp_rejected": rejected.sum(),
            }
        return judged.losses.sum().float(), metrics

    def scores(self, means: Mapping[str, float]) -> Scores:
        """Return loss, the part of the pairs that are the right way round, and mean rewards and log-probabilities."""
        named = {name: value for name, value in means.items() if name != "right"}
        return {"loss": named.pop("loss"), "preference_accuracy": means["right"], **named}


def preference_losses(margins: Tensor, *, loss: str, beta: float, label_smoothing: float) -> Tensor:
    """Return the loss of each pair from its margin before beta: (P,) -> (P,)."""
    if loss == "hinge":
        return F.relu(1 - beta * margins)
    if loss == "ipo":
        return (margins - 1 / (2 * beta)).square()
    right = -F.logsigmoid(beta * margins)
    if not label_smoothing:
        return right
    return (1 - label_smoothing) * right - label_smoothing * F.logsigmoid(-beta * margins)
