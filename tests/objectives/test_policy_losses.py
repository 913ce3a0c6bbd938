"""Losses and advantages of online reinforcement learning: worked by hand, and against TRL's own on random numbers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from trl import GRPOTrainer, RLOOTrainer
from trl.trainer.utils import nanstd

from lora_cli import objectives
from lora_cli.objectives import _policy_losses as losses
from lora_cli.objectives._rollout import Rollout, RolloutBatch, batches_of
from lora_cli.objectives._rollouts import RolloutObjective
from lora_cli.recipe.rollout_blocks import GrpoObjective, Reward, RlooObjective

LENGTHS = [3, 7, 1, 5, 7, 2]
REWARDS = [Reward(name="json_valid")]


class Given:
    """In place of a model: the log-probabilities, and values, that it is to have given each token of a rollout."""

    packs, device = False, torch.device("cpu")

    def __init__(self, logps: list[Tensor], values: list[Tensor]) -> None:
        self.logps, self.values = logps, values

    def token_losses(self, batch: RolloutBatch) -> tuple[Tensor, None]:
        """Return them in the order of the batch."""
        return -torch.cat([self.logps[sample] for sample in batch.samples]), None

    def token_losses_and_states(self, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
        """Return them, and states of width 1 that are the values."""
        values = torch.cat([self.values[sample] for sample in batch.samples])
        return self.token_losses(batch)[0], values[:, None]


def rollout_of(columns: Mapping[str, Tensor]) -> Rollout:
    """Return a rollout of LENGTHS with these columns."""
    count = len(LENGTHS)
    return Rollout(
        0, list(range(count)), [np.array([5], dtype=np.int32)] * count,
        [np.full(length, 6, dtype=np.int32) for length in LENGTHS], torch.zeros(count, 1),
        [True] * count, torch.zeros(count), dict(columns),
    )  # fmt: skip


def mean_loss(
    objective: RolloutObjective, logps: Tensor, rollout: Rollout, tokens: int, *, values: Tensor | None = None
) -> Tensor:
    """Return the loss of a step: sums over micro-batches, divided once by the units of all."""
    given: Any = Given(list(logps.split(LENGTHS)), list((logps if values is None else values).split(LENGTHS)))
    batches = batches_of(given, rollout, tokens=tokens, pad_id=0)
    total = sum((objective.loss_sum(given, batch)[0] for batch in batches), torch.zeros(()))
    return total / sum(objective.units(batch) for batch in batches)


def padded(values: Tensor) -> Tensor:
    """(N,) -> (S, T), filled up with zeros."""
    return torch.nn.utils.rnn.pad_sequence(list(values.split(LENGTHS)), batch_first=True)


def fake_trainer(logps: Tensor, **settings: Any) -> Any:
    """Return what TRL's loss reads of its trainer."""
    same = lambda value, reduction=None: value  # noqa: E731
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
        accelerator=SimpleNamespace(gather=same, reduce=same, gather_for_metrics=same, num_processes=1),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        model=SimpleNamespace(training=True), _metrics=defaultdict(lambda: defaultdict(list)),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        vllm_importance_sampling_correction=False, _entropy_bonus_enabled=False, importance_sampling_level="token",
        current_gradient_accumulation_steps=1, **settings,
    )  # fmt: skip


def inputs_of(columns: Mapping[str, Tensor], advantages: Tensor) -> dict[str, Tensor]:
    """Return the inputs of TRL's loss."""
    mask = padded(torch.ones(sum(LENGTHS)))
    ids = torch.ones(len(LENGTHS), 1, dtype=torch.long)
    return {
        "prompt_ids": ids, "prompt_mask": ids, "completion_ids": mask.long(), "completion_mask": mask.long(),
        "advantages": advantages, "old_per_token_logps": padded(columns["old"]),
        "old_logps": padded(columns["old"]).sum(1),
        "ref_per_token_logps": padded(columns["reference"]), "num_items_in_batch": mask.sum(),
    }  # fmt: skip


def random_columns(seed: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Return log-probabilities with a gradient, columns, and each completion's advantage; many ratios are clipped."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(LENGTHS)
    logps = (-3 * torch.rand(count, generator=generator)).requires_grad_()
    old = logps.detach() + 0.3 * torch.randn(count, generator=generator)
    reference = logps.detach() + 0.5 * torch.randn(count, generator=generator)
    advantages = torch.randn(len(LENGTHS), generator=generator)
    spread = advantages.repeat_interleave(torch.tensor(LENGTHS))
    return logps, {"old": old, "reference": reference, "advantages": spread}, advantages


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("tokens", [1, 20, 1000])
@pytest.mark.parametrize(
    ("normalize", "loss_type"), [("sequence", "grpo"), ("token", "dapo"), ("constant", "dr_grpo")]
)
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_grpo_is_trls(seed: int, tokens: int, normalize: str, loss_type: str, beta: float) -> None:
    """Loss and gradient equal those of TRL's GRPOTrainer, to 1e-6, however the step is split."""
    logps, columns, advantages = random_columns(seed)
    settings = GrpoObjective.model_validate(
        {"rewards": REWARDS, "normalize": normalize, "beta": beta, "updates_per_rollout": 2,
         "clip_low": 0.2, "clip_high": 0.28, "sampling": {"max_new_tokens": 9}}
    )  # fmt: skip
    objective: Any = objectives.build(settings, pad_id=0)
    ours = mean_loss(objective, logps, rollout_of(columns), tokens)
    (gradient,) = torch.autograd.grad(ours, logps)
    trainer = fake_trainer(
        padded(logps),
        loss_type=loss_type,
        beta=beta,
        epsilon_low=0.2,
        epsilon_high=0.28,
        max_completion_length=9,
    )
    theirs = GRPOTrainer._compute_loss(trainer, None, inputs_of(columns, advantages))
    (expected,) = torch.autograd.grad(theirs, logps)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6, abs=1e-6)
    assert float((gradient - expected).abs().max()) <= 1e-6
    clipped = trainer._metrics["train"]["clip_ratio/region_mean"][0]
    assert 0.05 < clipped < 0.9


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("tokens", [1, 20, 1000])
def test_rloo_is_trls(seed: int, tokens: int) -> None:
    """Loss and gradient equal those of TRL's RLOOTrainer, to 1e-6, however the step is split."""
    logps, columns, advantages = random_columns(seed)
    objective: Any = objectives.build(RlooObjective(rewards=REWARDS, updates_per_rollout=2), pad_id=0)
    ours = mean_loss(objective, logps, rollout_of(columns), tokens)
    (gradient,) = torch.autograd.grad(ours, logps)
    trainer = fake_trainer(padded(logps), beta=0.05, epsilon_low=0.2, epsilon_high=0.2)
    theirs = RLOOTrainer._compute_loss(trainer, None, inputs_of(columns, advantages))
    (expected,) = torch.autograd.grad(theirs, logps)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6, abs=1e-6)
    assert float((gradient - expected).abs().max()) <= 1e-6


@pytest.mark.parametrize("scale", ["std", "none"])
def test_group_advantages_are_trls(scale: str) -> None:
    """A completion's advantage is what GRPOTrainer makes of the rewards of its group, to 1e-6, for each token."""
    rewards = torch.tensor([0.0, 1.0, 0.25, 0.5, 0.5, 0.5], dtype=torch.float64)  # two groups of three
    objective: Any = objectives.build(
        GrpoObjective.model_validate({"rewards": REWARDS, "samples": 3, "scale": scale}), pad_id=0
    )
    objective._rewards = [SimpleNamespace(weight=2.0)]
    rollout = rollout_of({})
    rollout.rewards = rewards[:, None]
    objective.settle(rollout)
    grouped = 2 * rewards.reshape(2, 3)
    expected = grouped - grouped.nanmean(dim=1, keepdim=True)
    if scale == "std":
        expected = expected / (nanstd(grouped, dim=1, keepdim=True) + 1e-4)
    for found, one in zip(rollout.split("advantages"), expected.flatten(), strict=True):
        assert found.tolist() == pytest.approx([float(one)] * len(found), abs=1e-6)


def test_rloo_counts_the_divergence_against_the_others() -> None:
    """A completion is worth its reward less beta nats by which it is likelier, and that less the mean of the others."""
    _, columns, _ = random_columns(4)
    objective: Any = objectives.build(RlooObjective(rewards=REWARDS, samples=3, beta=0.1), pad_id=0)
    objective._rewards = [SimpleNamespace(weight=1.0)]
    rollout = rollout_of(columns)
    rewards = [0.0, 1.0, 0.25, 0.5, 0.5, 0.75]
    rollout.rewards = torch.tensor(rewards, dtype=torch.float64)[:, None]
    objective.settle(rollout)
    gaps = (columns["old"] - columns["reference"]).split(LENGTHS)
    worth = [reward - 0.1 * float(gap.double().sum()) for reward, gap in zip(rewards, gaps, strict=True)]
    for place, found in enumerate(rollout.split("advantages")):
        group = [3 * (place // 3) + other for other in range(3)]
        expected = worth[place] - sum(worth[other] for other in group if other != place) / 2
        assert found.tolist() == pytest.approx([expected] * LENGTHS[place], abs=1e-5)


def test_three_tokens_by_hand() -> None:
    """One token within the clip, one above with a gain, one below with a loss, as the equations have them."""
    old = torch.tensor([0.5, 0.4, 0.2]).log()
    now = torch.tensor([0.55, 0.6, 0.1]).log()
    advantages = torch.tensor([2.0, 2.0, -1.0])
    found = losses.clipped_surrogate(now, old, advantages, 0.2, 0.3)
    assert found.tolist() == pytest.approx([-2.2, -2.6, 0.8])
    assert losses.is_clipped(now, old, advantages, 0.2, 0.3).tolist() == [False, True, True]
    gap = losses.divergence(now, old)  # q / p - log(q / p) - 1
    expected = [q / p - math.log(q / p) - 1 for q, p in ((0.5, 0.55), (0.4, 0.6), (0.2, 0.1))]
    assert gap.tolist() == pytest.approx(expected, rel=1e-5)


def test_group_advantages_by_hand() -> None:
    """A group of 1, 2, 3 has a mean of 2 and a deviation of 1; equal rewards have no advantage."""
    rewards = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])
    assert losses.group_advantages(rewards, scaled=False).tolist() == [[-1, 0, 1], [0, 0, 0]]
    scaled = losses.group_advantages(rewards, scaled=True)
    assert scaled.flatten().tolist() == pytest.approx([-1 / 1.0001, 0, 1 / 1.0001, 0, 0, 0])
    assert losses.leave_one_out(rewards).tolist() == [[-1.5, 0, 1.5], [0, 0, 0]]
