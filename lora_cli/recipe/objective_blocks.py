"""The `objective` block of each objective, all joined in the union `Objective`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field

from lora_cli.recipe.rollout_blocks import GrpoObjective, PpoObjective, RlooObjective
from lora_cli.recipe.section import Conflict, Section

Strength = Annotated[float, Field(gt=0.0, le=100.0)]
Smoothing = Annotated[float, Field(ge=0.0, lt=0.5)]
Weight = Annotated[float, Field(gt=0.0, le=1000.0)]


class SftObjective(Section):
    """Supervised fine-tuning: cross-entropy of the trained tokens."""

    name: Literal["sft"] = "sft"
    """Which loss is minimised."""
    train_on: Literal["assistant", "last_assistant", "completion", "all"] = "assistant"
    """Which tokens are trained. assistant: every assistant turn and its terminator. last_assistant: the last one alone.
    completion: those after the prompt, for rows that say what their prompt is. all: every token of the row."""


class DpoObjective(Section):
    """Direct preference optimization: the chosen answer is to gain over the rejected one, measured from the model that
    training begins with (arXiv 2305.18290)."""

    name: Literal["dpo"] = "dpo"
    """Which loss is minimised."""
    beta: Strength = 0.1
    """How closely the model stays to the one it began with: the larger, the closer. For ipo it is tau."""
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """sigmoid: the paper's. hinge: max(0, 1 - beta margin) (arXiv 2305.10425). ipo: (margin - 1 / (2 beta))^2 with the
    margin by token (arXiv 2310.12036)."""
    label_smoothing: Smoothing = 0.0
    """Part of the pairs that are taken to be the wrong way round (conservative DPO); for sigmoid only."""
    length_normalized: bool = False
    """Take log-probabilities as means over an answer's tokens, so that a long one counts no more than a short one."""


class OrpoObjective(Section):
    """Odds-ratio preference optimization: the chosen answer is learned, and its odds against the rejected one's; there
    is no reference model (arXiv 2403.07691)."""

    name: Literal["orpo"] = "orpo"
    """Which loss is minimised."""
    beta: Strength = 0.1
    """Weight of the odds ratio beside the chosen answer's likelihood; the paper's lambda."""


class SimpoObjective(Section):
    """Simple preference optimization: mean log-probability of an answer is its reward, with a margin to reach; there is
    no reference model (arXiv 2405.14734)."""

    name: Literal["simpo"] = "simpo"
    """Which loss is minimised."""
    beta: Strength = 2.0
    """Scale of the rewards."""
    gamma: Annotated[float, Field(ge=0.0, le=100.0)] = 1.0
    """By how much the chosen answer's reward must lead."""


class CpoObjective(Section):
    """Contrastive preference optimization: DPO with a uniform reference, and the chosen answer is learned besides
    (arXiv 2401.08417)."""

    name: Literal["cpo"] = "cpo"
    """Which loss is minimised."""
    beta: Strength = 0.1
    """Scale of the log-probabilities' difference."""
    label_smoothing: Smoothing = 0.0
    """Part of the pairs that are taken to be the wrong way round."""
    sft_weight: Annotated[float, Field(ge=0.0, le=100.0)] = 1.0
    """Weight of the chosen answer's mean negative log-likelihood."""


class KtoObjective(Section):
    """Kahneman-Tversky optimization: single answers, each with a label that says whether it is wanted; a pair counts as
    a wanted and an unwanted one (arXiv 2402.01306)."""

    name: Literal["kto"] = "kto"
    """Which loss is minimised."""
    beta: Strength = 0.1
    """How closely the model stays to the one it began with: the larger, the closer."""
    desirable_weight: Weight = 1.0
    """Weight of the loss of wanted answers. Where one kind is rare, the paper keeps this weight times the number of
    wanted answers at 1 to 4/3 of the same product of the others."""
    undesirable_weight: Weight = 1.0
    """Weight of the loss of unwanted answers."""


class RewardObjective(Section):
    """A reward model, learned from pairs of answers: a scalar head in the place of the output head. It scores by
    itself, and completions of the objectives that sample (`reward_model` among their rewards)."""

    name: Literal["reward"] = "reward"
    """Which loss is minimised."""
    use_margin: bool = False
    """The chosen answer must lead by the row's `margin`, or by `score_chosen` less `score_rejected` (arXiv 2307.09288);
    then each row must have it."""
    center_rewards_coefficient: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0
    """Weight of the squared sum of both scores, which holds them near zero (arXiv 2312.09244); 0.01 is usual."""


Objective = Annotated[
    SftObjective
    | DpoObjective
    | OrpoObjective
    | SimpoObjective
    | CpoObjective
    | KtoObjective
    | RewardObjective
    | GrpoObjective
    | RlooObjective
    | PpoObjective,
    Field(discriminator="name"),
]


def objective_conflicts(objective: Objective, formats: Sequence[str], batch_size: int) -> Iterator[Conflict]:
    """Yield what of a run an objective cannot do with."""
    reads = ("objective.name",)
    if isinstance(objective, KtoObjective) and batch_size < 2:
        message = "found 1, but kto compares each prompt with the answer to another one (use at least 2)"
        yield Conflict("train.batch_size", message, reads)
    if isinstance(objective, RewardObjective) and "portable" in formats:
        message = "found portable, which has no place for a reward model's head (use peft or merged)"
        yield Conflict("export.formats", message, reads)
