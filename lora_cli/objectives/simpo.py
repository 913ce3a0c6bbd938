"""Simple preference optimization (arXiv 2405.14734).

    - log sigmoid(beta (mean log p(chosen) - mean log p(rejected)) - gamma)          eq. 6

Means are over an answer's tokens. There is no reference model.
"""

from __future__ import annotations

from torch.nn import functional as F

from lora_cli.objectives._answers import Answers
from lora_cli.objectives._preference import Judged, PreferenceObjective


class Simpo(PreferenceObjective):
    """Mean log-probability is the reward, and the chosen answer's must lead by gamma."""

    def __init__(self, *, pad_id: int, beta: float, gamma: float) -> None:
        super().__init__(pad_id=pad_id)
        self.beta, self.gamma = beta, gamma

    def judge(self, policy: Answers, reference: Answers | None) -> Judged:
        """Return losses and rewards."""
        chosen, rejected = policy.pairs(self.beta * policy.means)
        return Judged(-F.logsigmoid(chosen - rejected - self.gamma), chosen.detach(), rejected.detach())


OBJECTIVE = Simpo
