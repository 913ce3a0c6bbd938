"""Group relative policy optimization (arXiv 2402.03300).

    - min(r A, clip(r, 1 - e, 1 + e) A) + beta KL,   A = (R - mean of the group) / its deviation          eq. 3, 4

of each token; r is how much likelier it has become since it was drawn. By `normalize` the losses of a completion are
divided by its length (the paper), those of a step by all of its tokens (arXiv 2503.14476, section 3.3), or all by the
longest length that a completion may have (arXiv 2503.20783); by `scale` the deviation is left out (the same).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_cli.models.adapted import AdaptedModel
from lora_cli.objectives._policy_losses import clipped_surrogate, divergence, group_advantages
from lora_cli.objectives._rollout import Rollout, RolloutBatch
from lora_cli.objectives._rollouts import RolloutObjective
from lora_cli.recipe.rollout_blocks import GrpoObjective
from lora_cli.types import Batch


class Grpo(RolloutObjective):
    """Completions of one prompt are compared with each other; the unit is a completion, by token a token."""

    def __init__(self, settings: GrpoObjective, *, pad_id: int) -> None:
        super().__init__(settings, pad_id=pad_id, samples=settings.samples, beta=settings.beta)
        self.scaled, self.normalize = settings.scale == "std", settings.normalize

    def measure(self, model: AdaptedModel, rollout: Rollout, tokens: int) -> None:
        """Add log-probabilities where there is to be a ratio or a divergence."""
        # A single update is made by the model that drew: its own log-probabilities, detached, are the old ones.
        self.score_policy(model, rollout, tokens, old=self.updates_per_rollout > 1)

    def settle(self, rollout: Rollout) -> None:
        """Add advantages."""
        rewards = self.totals(rollout).reshape(-1, self.samples)
        rollout.columns["advantages"] = rollout.spread(
            group_advantages(rewards, scaled=self.scaled).reshape(-1)
        )

    def units(self, batch: Batch) -> int:
        """Return the number of completions, or of their tokens where these are counted."""
        assert isinstance(batch, RolloutBatch)
        by_token = self.normalize == "token" and batch.rewards is None
        return sum(batch.lengths) if by_token else len(batch.samples)

    def policy_loss(self, model: AdaptedModel, batch: RolloutBatch) -> Tensor:
        """Return the summed loss."""
        logps = -model.token_losses(batch)[0]  # (N,)
        old = batch.columns.get("old", logps.detach())
        advantages, reference = batch.columns["advantages"], batch.columns.get("reference")
        losses = clipped_surrogate(logps, old, advantages, self.low, self.high)
        if self.beta and reference is not None:
            losses = losses + self.beta * divergence(logps, reference)
        self.report_policy(logps, old, reference, advantages)
        if self.normalize == "sequence":
            losses = losses / torch.tensor(batch.lengths, device=losses.device)[batch.whose]
        elif self.normalize == "constant":
            losses = losses / self.sampling.max_new_tokens
        return losses.sum()


OBJECTIVE = Grpo
