"""PPO's advantages and losses against plain loops over the papers' equations, and worked by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_policy_losses import LENGTHS, REWARDS, mean_loss, random_columns, rollout_of

from lora_cli import objectives
from lora_cli.objectives import _policy_losses as losses
from lora_cli.recipe.rollout_blocks import PpoObjective


@pytest.mark.parametrize("tokens", [1, 20, 1000])
def test_ppo_is_the_papers(tokens: int) -> None:
    """Advantages, returns, loss and gradient of a step equal plain loops over the equations, however it is split."""
    logps, columns, _ = random_columns(5)
    generator = torch.Generator().manual_seed(6)
    old_values, moved = torch.randn(2, sum(LENGTHS), generator=generator)
    values = (old_values + 0.3 * moved).requires_grad_()
    settings = PpoObjective.model_validate(
        {"rewards": REWARDS, "samples": 2, "beta": 0.1, "gamma": 0.9, "gae_lambda": 0.8, "value_weight": 0.3,
         "value_clip": 0.25, "clip_low": 0.2, "clip_high": 0.3}
    )  # fmt: skip
    objective: Any = objectives.build(settings, pad_id=0)
    objective._rewards = [SimpleNamespace(weight=1.0)]
    objective._around = SimpleNamespace(sum=list)
    objective.head = torch.nn.Linear(1, 1)  # the value is the state
    torch.nn.init.ones_(objective.head.weight)
    torch.nn.init.zeros_(objective.head.bias)
    rollout = rollout_of({"old": columns["old"], "reference": columns["reference"], "values": old_values})
    rewards = [0.0, 1.0, 0.25, 0.5, 0.5, 0.75]
    rollout.rewards = torch.tensor(rewards, dtype=torch.float64)[:, None]
    objective.settle(rollout)

    advantages: list[float] = []
    first = 0
    for length, reward in zip(LENGTHS, rewards, strict=True):
        mine = range(first, first + length)
        each = [-0.1 * float(columns["old"][token] - columns["reference"][token]) for token in mine]
        each[-1] += reward
        values_of = [float(old_values[token]) for token in mine] + [0.0]
        deltas = [each[t] + 0.9 * values_of[t + 1] - values_of[t] for t in range(length)]
        advantages += [
            sum((0.9 * 0.8) ** (later - t) * deltas[later] for later in range(t, length))
            for t in range(length)
        ]
        first += length
    raw = torch.tensor(advantages)
    returns = raw + old_values
    assert rollout.columns["returns"].tolist() == pytest.approx(returns.tolist(), abs=1e-5)
    whitened = (raw - raw.mean()) / raw.std()
    assert rollout.columns["advantages"].tolist() == pytest.approx(whitened.tolist(), abs=1e-5)

    ours = mean_loss(objective, logps, rollout, tokens, values=values)
    expected = torch.zeros(())
    for token in range(sum(LENGTHS)):
        ratio = (logps[token] - columns["old"][token]).exp()
        gain = torch.min(ratio * whitened[token], ratio.clamp(0.8, 1.3) * whitened[token])
        near = old_values[token] + (values[token] - old_values[token]).clamp(-0.25, 0.25)
        error = torch.max((values[token] - returns[token]) ** 2, (near - returns[token]) ** 2)
        expected = expected + (0.3 * 0.5 * error - gain) / sum(LENGTHS)
    assert float(ours) == pytest.approx(float(expected), rel=1e-5)
    for found, one in zip(
        torch.autograd.grad(ours, [logps, values]),
        torch.autograd.grad(expected, [logps, values]),
        strict=True,
    ):
        assert float((found - one).abs().max()) <= 1e-6


def test_advantages_of_three_tokens_by_hand() -> None:
    """Generalized advantage estimation of three tokens, of which the last is rewarded, worked out by hand."""
    rewards, values = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.5, 0.25, 0.5])
    found = losses.estimated_advantages(rewards, values, gamma=0.5, gae_lambda=0.5)
    # d = -0.5 + 0.125, -0.25 + 0.25, 1 - 0.5; each later one counts a quarter
    assert found.tolist() == pytest.approx([-0.375 + 0.5 / 16, 0.125, 0.5])


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.9, 0.0)])
def test_advantages_are_the_sum_of_the_paper(gamma: float, gae_lambda: float) -> None:
    """The recursion equals the sum over (gamma lambda)^l d_(t+l) of arXiv 1506.02438, eq. 16."""
    generator = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(9, generator=generator), torch.randn(9, generator=generator)
    following = [*values[1:].tolist(), 0.0]
    deltas = [
        float(r) + gamma * v_next - float(v) for r, v, v_next in zip(rewards, values, following, strict=True)
    ]
    expected = [
        sum((gamma * gae_lambda) ** (later - step) * deltas[later] for later in range(step, 9))
        for step in range(9)
    ]
    found = losses.estimated_advantages(rewards, values, gamma=gamma, gae_lambda=gae_lambda)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_value_loss_by_hand() -> None:
    """A value that has moved further than the clip counts with the larger of both errors."""
    values, old, returns = torch.tensor([1.0, 0.1, 2.0]), torch.zeros(3), torch.tensor([0.0, 0.5, 3.0])
    # near: 0.2, 0.1, 0.2; errors 1 and 0.04; 0.16 and 0.16; 1 and 7.84
    found = losses.clipped_value_loss(values, old, returns, 0.2)
    assert found.tolist() == pytest.approx([0.5, 0.08, 3.92])


def test_whitened_advantages_have_mean_0_and_variance_1() -> None:
    """Over all processes: here twice the same numbers, so with the deviation of their number doubled."""
    objective: Any = objectives.build(PpoObjective(rewards=REWARDS), pad_id=0)
    objective._around = SimpleNamespace(sum=lambda values: [2 * value for value in values])
    advantages = torch.randn(50, generator=torch.Generator().manual_seed(2)) * 3 + 1
    found = objective._whitened(advantages)
    both = torch.cat([advantages, advantages])
    assert found.tolist() == pytest.approx(((advantages - both.mean()) / both.std()).tolist(), abs=1e-5)
