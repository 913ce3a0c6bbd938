"""Odds-ratio preference optimization (arXiv 2403.07691).

    - log p(chosen) - beta log sigmoid(log odds(chosen) / odds(rejected)),   odds = p / (1 - p)        eq. 4, 6, 7

log p is the mean over an answer's tokens. There is no reference model.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_cli.objectives._answers import Answers
from lora_cli.objectives._preference import Judged, PreferenceObjective


class Orpo(PreferenceObjective):
    """The chosen answer is learned, and its odds against the rejected one's."""

    def __init__(self, *, pad_id: int, beta: float) -> None:
        super().__init__(pad_id=pad_id)
        self.beta = beta

    def judge(self, policy: Answers, reference: Answers | None) -> Judged:
        """Return losses, and as rewards beta times the mean log-probabilities."""
        chosen, rejected = policy.pairs(policy.means)
        ratio = _log_odds(chosen) - _log_odds(rejected)
        losses = -chosen - self.beta * F.logsigmoid(ratio)
        return Judged(losses, self.beta * chosen.detach(), self.beta * rejected.detach())


def _log_odds(logp: Tensor) -> Tensor:
    """Return log(p / (1 - p)) from log p < 0, with all digits where p is near 0 or near 1."""
    near_one = logp > -0.6931472  # log 1/2: there 1 - p is taken from expm1, else from p itself
    one = torch.log(-torch.expm1(torch.where(near_one, logp, -1.0)))
    other = torch.log1p(-torch.exp(torch.where(near_one, -1.0, logp)))
    return logp - torch.where(near_one, one, other)


OBJECTIVE = Orpo
