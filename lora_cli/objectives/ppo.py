"""Proximal policy optimization with a value head (arXiv 1707.06347), as language models use it (arXiv 2203.02155).

    r_t = - beta log(p(y_t) / p0(y_t)),  and the reward at the last token besides
    A   = generalized advantage estimation of r and V (arXiv 1506.02438, eq. 16);  returns R = A + V
    - min(r A, clip(r, 1 - e, 1 + e) A) + w max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2

The value of a token is that of what stands before it. It is a linear function of the last hidden state of the model
that is trained, whose weights both losses move; it starts as zero, and is kept in checkpoints alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.score_head import zero_head
from lora_cli.objectives._policy_losses import clipped_surrogate, clipped_value_loss, estimated_advantages
from lora_cli.objectives._rollout import Rollout, RolloutBatch
from lora_cli.objectives._rollouts import RolloutObjective
from lora_cli.recipe.rollout_blocks import PpoObjective
from lora_cli.types import Batch


class Ppo(RolloutObjective):
    """An action is a token, and so is the unit; held-out completions are counted as such."""

    told = ("kl", "clip_fraction", "value_loss")

    def __init__(self, settings: PpoObjective, *, pad_id: int) -> None:
        super().__init__(settings, pad_id=pad_id, samples=settings.samples, beta=settings.beta)
        self.gamma, self.gae_lambda, self.whiten = settings.gamma, settings.gae_lambda, settings.whiten
        self.value_weight, self.value_clip = settings.value_weight, settings.value_clip
        self.head: nn.Linear | None = None

    def trainable(self, model: AdaptedModel) -> Mapping[str, nn.Parameter]:
        """Return the value head's weight and bias; the first call makes them, all zero."""
        if self.head is None:
            self.head = zero_head(model.model, bias=True)
        return {f"value_head.{name}": parameter for name, parameter in self.head.named_parameters()}

    def measure(self, model: AdaptedModel, rollout: Rollout, tokens: int) -> None:
        """Add log-probabilities and values."""

        def of_policy(batch: RolloutBatch) -> tuple[Tensor, Tensor]:
            return self._scored(model, batch)

        self.score(model, rollout, ("old", "values"), of_policy, tokens)
        self.score_policy(model, rollout, tokens, old=False)

    def settle(self, rollout: Rollout) -> None:
        """Add advantages and returns."""
        rewards = torch.zeros(rollout.tokens)
        if self.beta:
            rewards -= self.beta * (rollout.columns["old"] - rollout.columns["reference"])
        if rollout.rows:
            rewards[torch.tensor(rollout.lengths).cumsum(0) - 1] += self.totals(rollout)
        parts = zip(rewards.split(rollout.lengths), rollout.split("values"), strict=True)
        advantages = torch.cat(
            [
                torch.zeros(0),
                *(
                    estimated_advantages(reward, value, gamma=self.gamma, gae_lambda=self.gae_lambda)
                    for reward, value in parts
                ),
            ]
        )
        rollout.columns["returns"] = advantages + rollout.columns["values"]
        rollout.columns["advantages"] = self._whitened(advantages) if self.whiten else advantages

    def units(self, batch: Batch) -> int:
        """Return the number of tokens, of held-out rows that of completions."""
        assert isinstance(batch, RolloutBatch)
        return sum(batch.lengths) if batch.rewards is None else len(batch.samples)

    def policy_loss(self, model: AdaptedModel, batch: RolloutBatch) -> Tensor:
        """Return the summed loss of policy and value head."""
        logps, values = self._scored(model, batch)
        columns = batch.columns
        old, advantages = columns["old"], columns["advantages"]
        losses = clipped_surrogate(logps, old, advantages, self.low, self.high)
        of_values = clipped_value_loss(values, columns["values"], columns["returns"], self.value_clip)
        self.report_policy(logps, old, columns.get("reference"), advantages)
        self.report("value_loss", of_values)
        return losses.sum() + self.value_weight * of_values.sum()

    def _scored(self, model: AdaptedModel, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
        """Return log-probability and value of each token, (N,) and (N,)."""
        self.trainable(model)
        assert self.head is not None
        losses, states = model.token_losses_and_states(batch)
        return -losses, self.head(states.float()).squeeze(-1)

    def _whitened(self, advantages: Tensor) -> Tensor:
        """Return them with mean 0 and variance 1 over all processes."""
        exact = advantages.double()
        total, count = self.around.sum([float(exact.sum()), float(len(exact))])
        mean = total / max(count, 1.0)
        (squares,) = self.around.sum([float((exact - mean).square().sum())])
        return ((exact - mean) / (squares / max(count - 1.0, 1.0) + 1e-8) ** 0.5).float()


OBJECTIVE = Ppo
