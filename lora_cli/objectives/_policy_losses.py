"""Losses and advantages of online reinforcement learning, as pure functions.

N tokens of all completions, one after the other; S completions; `whose` (N,) is the completion of each token. `logps`
are log-probabilities in nats: of the model now, of the one that drew (`old`), of the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_surrogate(logps: Tensor, old: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Return the loss -min(r A, clip(r, 1 - low, 1 + high) A), r = exp(logps - old), of each (...,) -> (...,).

    arXiv 1707.06347, eq. 7; with two bounds arXiv 2503.14476, section 3.1.
    """
    ratio = (logps - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def is_clipped(logps: Tensor, old: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Return where `clipped_surrogate` stands still, (...,) bool."""
    ratio = (logps - old).exp()
    return ((ratio < 1 - low) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))


def divergence(logps: Tensor, reference: Tensor) -> Tensor:
    """Return the estimate q / p - log(q / p) - 1 of each token's KL(p || q), never below 0.

    arXiv 2402.03300, eq. 4; known as k3.
    """
    gap = reference - logps
    return gap.exp() - gap - 1


def group_advantages(rewards: Tensor, *, scaled: bool) -> Tensor:
    """Return each reward less its group's mean, in standard deviations of the group where `scaled`: (G, K) -> (G, K).

    arXiv 2402.03300, section 4.1.2. The deviation is that of a sample (divided by K - 1), with 1e-4 added, as other
    implementations have it: the paper does not say which. Unscaled: arXiv 2503.20783, section 3.2.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True) + 1e-4) if scaled else centred


def leave_one_out(rewards: Tensor) -> Tensor:
    """Return each reward less the mean of the others of its group: (G, K) -> (G, K).

    The RLOO estimator of arXiv 2402.14740.
    """
    others = rewards.shape[1] - 1
    return rewards - (rewards.sum(dim=1, keepdim=True) - rewards) / others


def estimated_advantages(rewards: Tensor, values: Tensor, *, gamma: float, gae_lambda: float) -> Tensor:
    """Return A_t = d_t + gamma lambda A_(t+1), d_t = r_t + gamma V_(t+1) - V_t, of one completion: (T,), (T,) -> (T,).

    arXiv 1506.02438, eq. 16. Behind the last token there is nothing to come, also where a completion was cut.
    """
    following = torch.cat([values[1:], values.new_zeros(1)])
    deltas = rewards + gamma * following - values
    advantages, later = torch.empty_like(deltas), deltas.new_zeros(())
    for step in range(len(deltas) - 1, -1, -1):
        later = deltas[step] + gamma * gae_lambda * later
        advantages[step] = later
    return advantages


def clipped_value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Return max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2 of each, (...,) -> (...,).

    The original implementation of arXiv 1707.06347 has it, not the paper; there c is the policy's clip.
    """
    near = torch.minimum(torch.maximum(values, old - clip), old + clip)
    return torch.maximum((values - returns).square(), (near - returns).square()) / 2


def by_completion(values: Tensor, whose: Tensor, count: int) -> Tensor:
    """Return the sum of each completion's values: (N,) -> (S,)."""
    return values.new_zeros(count).index_add(0, whose, values)
