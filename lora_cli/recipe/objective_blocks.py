"""The `objective` block of each objective, all joined in the union `Objective`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lora_cli.recipe.rollout_blocks import GrpoObjective, PpoObjective, RlooObjective
from lora_cli.recipe.section import Section

Strength = Annotated[float, Field(gt=0.0, le=100.0)]
Smoothing = Annotated[float, Field(ge=0.0, lt=0.5)]


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


Objective = Annotated[
    SftObjective
    | DpoObjective
    | OrpoObjective
    | SimpoObjective
    | CpoObjective
    | GrpoObjective
    | RlooObjective
    | PpoObjective,
    Field(discriminator="name"),
]
