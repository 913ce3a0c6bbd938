"""Contrastive preference optimization (arXiv 2401.08417).

    - log sigmoid(beta (log p(chosen) - log p(rejected))) - w mean log p(chosen)          eq. 3, 5

The sum over tokens is compared, and the mean over the chosen answer's tokens is learned.
"""

from __future__ import annotations

from lora_cli.objectives._answers import Answers
from lora_cli.objectives._preference import Judged, PreferenceObjective, preference_losses


class Cpo(PreferenceObjective):
    """DPO with a uniform reference, and the chosen answer is learned besides."""

    def __init__(self, *, pad_id: int, beta: float, label_smoothing: float, sft_weight: float) -> None:
        super().__init__(pad_id=pad_id)
        self.beta, self.label_smoothing, self.sft_weight = beta, label_smoothing, sft_weight

    def judge(self, policy: Answers, reference: Answers | None) -> Judged:
        """Return losses, and as rewards beta times the log-probabilities."""
        chosen, rejected = policy.pairs(policy.logps)
        losses = preference_losses(
            chosen - rejected, loss="sigmoid", beta=self.beta, label_smoothing=self.label_smoothing
        )
        losses = losses - self.sft_weight * policy.pairs(policy.means)[0]
        return Judged(losses, self.beta * chosen.detach(), self.beta * rejected.detach())


OBJECTIVE = Cpo
