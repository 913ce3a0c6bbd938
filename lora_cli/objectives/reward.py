"""A reward model: scores of answers, learned from pairs of them (Bradley and Terry, 1952; arXiv 2203.02155, eq. 1).

    - log sigmoid(s(chosen) - s(rejected) - m) + c (s(chosen) + s(rejected))^2

m is how far the row says that the chosen answer leads (arXiv 2307.09288, section 3.2.2), where the recipe wants it; the
second term holds scores near zero, as only their differences are learned otherwise (arXiv 2312.09244, eq. 2). A score
is a linear function of the last hidden state at the end of an answer (`models/score_head.py`). Its weights begin as
zero, so that the first loss is ln 2, and are trained with the adapter.

The unit is a pair. In evaluation sigmoid(s(chosen) - s(rejected)) is taken as the probability that the chosen answer is
the better one, and its calibration is measured: pairs in BINS bins of equal width by the probability of the answer that
scores higher, from 1/2 to 1; in each bin the distance between the mean probability and the part that is right; and its
mean over all pairs (expected calibration error, arXiv 1706.04599, eq. 3). Before training there are no scores: the base
beside which a tuned model stands has zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_cli.errors import InputError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.score_head import ScoreHead, last_places, zero_head
from lora_cli.objectives._answers import extended, pair_batches
from lora_cli.objectives._base import Items, Metrics, Objective
from lora_cli.types import Batch, Examples, Pair, PairExample, Prepared, Progress, Scores

BINS = 10


@dataclass(slots=True)
class MarginBatch(Batch):
    """Pairs, and by how much the chosen answer of each should lead, (P,) float32."""

    margins: Tensor = field(default_factory=lambda: torch.zeros(0))


class Reward(Objective):
    """Chosen answers come to score higher than rejected ones."""

    consumes = (Pair,)
    watched = ("right", "reward_margin", "reward_chosen", "reward_rejected")
    reported = (*watched, *(f"calibration_{number}" for number in range(BINS)))
    has_score_head = True
    needs_reference = False

    def __init__(self, *, pad_id: int, use_margin: bool, center_rewards_coefficient: float) -> None:
        self.pad_id, self.use_margin = pad_id, use_margin
        self.center_rewards_coefficient = center_rewards_coefficient
        self.head: nn.Linear | None = None
        self._start: Tensor | None = None

    def require_rows(self, prepared: Prepared) -> int:
        """Refuse rows that do not say how far the chosen answer leads, where that is wanted.

        Raises:
            InputError: naming the first such row.
        """
        for examples in filter(None, (prepared.train, prepared.eval)) if self.use_margin else ():
            _require_margins(examples)
        return 0

    def trainable(self, model: AdaptedModel) -> Mapping[str, nn.Parameter]:
        """Return the head's weight; the first call makes it, all zero or as it was taken.

        Raises:
            InputError: what was taken is of another size.
        """
        if self.head is None:
            self.head = zero_head(model.model, bias=False)
            if self._start is not None:
                if self._start.shape != self.head.weight.shape:
                    found, needed = self._start.shape[1], self.head.in_features
                    raise InputError(
                        f"objective.name: the reward model's head is for {found} hidden units, the base has {needed}"
                        " (was it trained on another one?)"
                    )
                with torch.no_grad():
                    self.head.weight.copy_(self._start)
        return {f"score.{name}": parameter for name, parameter in self.head.named_parameters()}

    def take_score_head(self, weight: Tensor) -> None:
        """Begin with this head, or score by it."""
        self._start, self.head = weight, None

    def score_head(self) -> ScoreHead | None:
        """Return the head as it is now."""
        assert self.head is not None
        return ScoreHead(self.head.weight.detach().cpu(), self.pad_id)

    def micro_batches(
        self, model: AdaptedModel, rows: Items, progress: Progress, *, tokens: int
    ) -> list[Batch]:
        """Return the pairs as batches, packed where the model keeps rows apart."""
        del progress
        batches = pair_batches(model, rows, tokens=tokens, pad_id=self.pad_id)
        if not self.use_margin:
            return batches
        leads = {index: row.margin for index, row in rows if isinstance(row, PairExample)}
        return [
            extended(batch, MarginBatch, margins=torch.tensor([leads[row] for row in batch.rows]))
            for batch in batches
        ]

    def units(self, batch: Batch) -> int:
        """Return the number of pairs."""
        return len(batch.rows)

    def loss_sum(self, model: AdaptedModel, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return the summed loss of the pairs, and sums over them to report."""
        found = self._scores(model, batch)
        chosen, rejected = found[0::2], found[1::2]
        leads = batch.margins if isinstance(batch, MarginBatch) else torch.zeros(1)
        losses = reward_losses(
            chosen,
            rejected,
            leads.to(chosen),
            center_rewards_coefficient=self.center_rewards_coefficient,
        )
        with torch.no_grad():
            margins = chosen - rejected
            metrics = {
                "right": _right(margins).sum(),
                "reward_margin": margins.sum(),
                "reward_chosen": chosen.sum(),
                "reward_rejected": rejected.sum(),
            }
            if not model.model.training:
                names = self.reported[len(self.watched) :]
                metrics |= dict(zip(names, calibration_gaps(margins), strict=True))
        return losses.sum(), metrics

    def scores(self, means: Mapping[str, float]) -> Scores:
        """Return loss, the part of the pairs that are the right way round, mean scores, and calibration error."""
        found = {"loss": means["loss"], "preference_accuracy": means["right"]}
        found |= {name: means[name] for name in self.watched[1:]}
        gaps = [abs(value) for name, value in means.items() if name not in ("loss", *self.watched)]
        return found | ({"calibration_error": sum(gaps)} if gaps else {})

    def _scores(self, model: AdaptedModel, batch: Batch) -> Tensor:
        """Return the score of each answer, (2 P,) float32, chosen and rejected in turn."""
        self.trainable(model)
        assert self.head is not None
        places = last_places(batch, self.pad_id)
        if model.is_reference:
            return torch.zeros(len(places), device=places.device)
        found: Tensor = self.head(model.states_at(batch, places).float())
        return found.squeeze(-1)


def reward_losses(
    chosen: Tensor, rejected: Tensor, margins: Tensor, *, center_rewards_coefficient: float
) -> Tensor:
    """Return the loss of each pair from its scores and from how far the first should lead: (P,) each."""
    losses = -F.logsigmoid(chosen - rejected - margins)
    return losses + center_rewards_coefficient * (chosen + rejected).square()


def calibration_gaps(margins: Tensor) -> Tensor:
    """Return for each bin the sum of what is right less its probability, (P,) -> (BINS,).

    A bin's part of the error is this sum's size, over the number of all pairs.
    """
    surest = torch.sigmoid(margins.abs().double())
    bins = ((surest - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    return surest.new_zeros(BINS).index_add(0, bins, _right(margins).double() - surest)


def _right(margins: Tensor) -> Tensor:
    """Return 1 where the chosen answer scores higher, 1/2 where both score alike, else 0."""
    return (margins.sign() + 1) / 2


def _require_margins(examples: Examples) -> None:
    for row in range(len(examples)):
        pair = examples[row]
        assert isinstance(pair, PairExample)
        if pair.margin != pair.margin:
            raise InputError(
                f"{examples.where(row)}: does not say how far the chosen answer leads, which objective.use_margin reads"
                " (add margin, or score_chosen and score_rejected)"
            )


OBJECTIVE = Reward
