"""REINFORCE leave-one-out (arXiv 2402.14740).

    A = R - mean of the other completions' R,   R = reward - beta log(p(y) / p0(y))

A completion is one action: its ratio is that of its whole probability, clipped as PPO's is where a rollout serves
several updates.
"""

from __future__ import annotations

from torch import Tensor

from lora_cli.models.adapted import AdaptedModel
from lora_cli.objectives._policy_losses import by_completion, clipped_surrogate, leave_one_out
from lora_cli.objectives._rollout import Rollout, RolloutBatch
from lora_cli.objectives._rollouts import RolloutObjective
from lora_cli.recipe.rollout_blocks import RlooObjective
from lora_cli.types import Batch


class Rloo(RolloutObjective):
    """A completion's baseline is the mean of the others; the unit is a completion."""

    def __init__(self, settings: RlooObjective, *, pad_id: int) -> None:
        super().__init__(settings, pad_id=pad_id, samples=settings.samples, beta=settings.beta)

    def measure(self, model: AdaptedModel, rollout: Rollout, tokens: int) -> None:
        """Add log-probabilities where there is to be a ratio or a divergence."""
        self.score_policy(model, rollout, tokens, old=self.updates_per_rollout > 1 or self.beta > 0)

    def settle(self, rollout: Rollout) -> None:
        """Add advantages, of rewards less the divergence."""
        rewards = self.totals(rollout)
        if self.beta:
            gaps = [
                (old - reference).sum()
                for old, reference in zip(rollout.split("old"), rollout.split("reference"), strict=True)
            ]
            rewards = rewards - self.beta * rewards.new_tensor(gaps)
        advantages = leave_one_out(rewards.reshape(-1, self.samples)).reshape(-1)
        rollout.columns["advantages"] = rollout.spread(advantages)

    def units(self, batch: Batch) -> int:
        """Return the number of completions."""
        assert isinstance(batch, RolloutBatch)
        return len(batch.samples)

    def policy_loss(self, model: AdaptedModel, batch: RolloutBatch) -> Tensor:
        """Return the summed loss."""
        assert batch.whose is not None
        logps = -model.token_losses(batch)[0]  # (N,)
        old = batch.columns.get("old", logps.detach())
        count, advantages = len(batch.samples), batch.columns["advantages"]
        whole, drawn = (by_completion(each, batch.whose, count) for each in (logps, old))
        first = by_completion(advantages, batch.whose, count) / by_completion(
            advantages.new_ones(len(advantages)), batch.whose, count
        )
        self.report_policy(logps, old, batch.columns.get("reference"), advantages)
        return clipped_surrogate(whole, drawn, first, self.low, self.high).sum()


OBJECTIVE = Rloo
