"""Direct preference optimization (arXiv 2305.18290), with the losses of its kin.

    h = beta (log p(chosen) / p0(chosen) - log p(rejected) / p0(rejected))

    sigmoid     - log sigmoid(h)                                          eq. 7
    smoothed    - (1 - e) log sigmoid(h) - e log sigmoid(-h)              conservative DPO
    hinge       max(0, 1 - h)                                             arXiv 2305.10425
    ipo         (h / beta - 1 / (2 beta))^2, log-probabilities by token   arXiv 2310.12036, eq. 17

p0 is the model that training begins with. IPO's paper states the sum over tokens; its authors' results are by token,
which other implementations follow as well.
"""

from __future__ import annotations

from lora_cli.objectives._answers import Answers
from lora_cli.objectives._preference import Judged, PreferenceObjective, preference_losses


class Dpo(PreferenceObjective):
    """The chosen answer gains over the rejected one, measured from the model that training begins with."""

    needs_reference = True

    def __init__(
        self, *, pad_id: int, beta: float, loss: str, label_smoothing: float, length_normalized: bool
    ) -> None:
        super().__init__(pad_id=pad_id)
        self.beta, self.loss, self.label_smoothing = beta, loss, label_smoothing
        self.length_normalized = length_normalized or loss == "ipo"

    def judge(self, policy: Answers, reference: Answers | None) -> Judged:
        """Return losses and rewards; a reward is beta times the gain in log-probability over the reference."""
        assert reference is not None
        gains = policy.logps - reference.logps
        chosen, rejected = policy.pairs(gains / policy.lengths if self.length_normalized else gains)
        losses = preference_losses(
            chosen - rejected, loss=self.loss, beta=self.beta, label_smoothing=self.label_smoothing
        )
        return Judged(losses, self.beta * chosen.detach(), self.beta * rejected.detach())


OBJECTIVE = Dpo
