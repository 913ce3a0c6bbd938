"""The `objective` blocks that learn from completions of their own: what is sampled, and what it is worth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from lora_cli.recipe.section import Conflict, Fraction, PositiveInt, Section, regex_fault

Strength = Annotated[float, Field(ge=0.0, le=100.0)]
Clip = Annotated[float, Field(gt=0.0, le=10.0)]
_KEYS = {
    "numeric_answer": ("pattern",),
    "regex": ("pattern",),
    "json_fields": ("partial",),
    "length": ("limit",),
    "python": ("file", "function"),
    "reward_model": ("run",),
}
_NEEDED = {
    "regex": ("pattern",),
    "length": ("limit",),
    "python": ("file", "function"),
    "reward_model": ("run",),
}


class Reward(Section):
    """One term of what a completion is worth."""

    name: Literal[
        "exact_match",
        "numeric_answer",
        "regex",
        "json_valid",
        "json_fields",
        "length",
        "no_repeat",
        "python",
        "reward_model",
    ]
    """exact_match: 1 if the completion is the row's own answer. numeric_answer: 1 if the last number that `pattern`
    finds in it is that of the row's answer. regex: 1 if `pattern` is found in it. json_valid: 1 if it is JSON.
    json_fields: the part of the answer's JSON fields that are right in it. length: 0 up to `limit` tokens, then falling
    to -1 at twice as many. no_repeat: less the part of its runs of three words that were there before. python: what
    `function` of `file` returns. reward_model: the score that the model of `run` gives it."""
    weight: Annotated[float, Field(ge=-1000.0, le=1000.0)] = 1.0
    """What it is multiplied by in the sum."""
    pattern: str | None = None
    """Regular expression of regex, and of numeric_answer, which takes its first group. null: that of GSM8K, the number
    after `####`."""
    partial: bool | None = None
    """For json_fields: count fields one by one (true, the default), or give 1 for all of them and else 0."""
    limit: PositiveInt | None = None
    """For length: tokens from which on a completion is too long."""
    file: str | None = None
    """For python: a file of Python code, which is run; read it before."""
    function: str | None = None
    """For python: a function of that file, called with the texts of completion, prompt and reference; it returns a
    number."""
    run: str | None = None
    """For reward_model: the folder of a run with the objective reward, or of what it exported. The model must have the
    tokenizer and the chat template of this run; an adapter's folder without its run, also its base."""

    def rules(self, place: str) -> Iterator[Conflict]:
        """Yield every broken rule of the term in the list at `place`."""
        taken = _KEYS.get(self.name, ())
        for key in ("pattern", "partial", "limit", "file", "function", "run"):
            if getattr(self, key) is not None and key not in taken:
                yield Conflict(place, f"found {key} in {self.name}, which has none (remove the key)")
            if getattr(self, key) is None and key in _NEEDED.get(self.name, ()):
                yield Conflict(place, f"found {self.name} without {key} (add it)")
        if self.pattern is not None and (fault := regex_fault(self.pattern)):
            yield Conflict(place, f"found {fault} (correct the pattern)")


class Sampling(Section):
    """How completions are drawn from the model."""

    temperature: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0
    """Logits are divided by it. The gradient is exact at 1, where what is drawn is what the model is."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Draw from the fewest tokens that have so much of the probability together. 1: from all."""
    top_k: PositiveInt | None = None
    """Draw from the so many most likely tokens. null: from all."""
    max_new_tokens: PositiveInt = 256
    """Longest completion, its terminator counted; a longer one is cut there."""
    batch_tokens: Literal["auto"] | PositiveInt = "auto"
    """Tokens of prompts and completions, padding counted, that are drawn at once. auto: 16384 on a CPU, 131072 on a
    GPU."""


class RolloutObjective(Section):
    """What the objectives have in common that learn from completions of their own."""

    rewards: Annotated[list[Reward], Field(min_length=1)]
    """What a completion is worth: a list of `{name: ..., weight: ...}`, of which the sum is taken. `name` is
    exact_match, numeric_answer, regex, json_valid, json_fields, length, no_repeat, python or reward_model; further keys
    go with some of them: pattern, partial, limit, file, function, run."""
    sampling: Sampling = Sampling()
    updates_per_rollout: Annotated[int, Field(ge=1, le=1000)] = 1
    """Optimizer steps made on the same completions, each on all of them. From the second on, what a token counts is
    weighed by how much likelier it has become since it was drawn."""
    clip_low: Clip = 0.2
    """A ratio below 1 less this does not count as lower."""
    clip_high: Clip | None = None
    """A ratio above 1 plus this does not count as higher. null: as `clip_low`."""

    @property
    def train_on(self) -> Literal["last_assistant"]:
        """A row is a prompt and, as its reference, its last answer."""
        return "last_assistant"

    def conflicts(self) -> Iterator[Conflict]:
        """Yield every broken rule that joins keys of this block."""
        for reward in self.rewards:
            yield from reward.rules("objective.rewards")
        if self.clip_low >= 1.0 and self.clip_high is None:
            message = f"found {self.clip_low}, but no ratio is below 0 (use less than 1, or set clip_high)"
            yield Conflict("objective.clip_low", message, reads=("objective.clip_high",))


class GrpoObjective(RolloutObjective):
    """Group relative policy optimization: completions of one prompt are compared with each other (arXiv 2402.03300)."""

    name: Literal["grpo"] = "grpo"
    """Which loss is minimised."""
    samples: Annotated[int, Field(ge=2, le=1024)] = 8
    """Completions of each prompt."""
    beta: Strength = 0.0
    """Weight of the divergence from the model that training begins with, by token (the estimator k3). The paper has
    0.04; with 0 the reference is not computed."""
    scale: Literal["std", "none"] = "std"
    """std: what a completion is worth beyond the mean of its group, in standard deviations of it. none: undivided, so
    that easy and hard prompts do not count more (Dr. GRPO, arXiv 2503.20783)."""
    normalize: Literal["sequence", "token", "constant"] = "sequence"
    """What a token's loss is divided by. sequence: by the tokens of its completion, as in the paper. token: by all
    tokens of the step (DAPO, arXiv 2503.14476). constant: by `sampling.max_new_tokens` (Dr. GRPO)."""


class RlooObjective(RolloutObjective):
    """REINFORCE with the mean of a prompt's other completions as the baseline (arXiv 2402.14740)."""

    name: Literal["rloo"] = "rloo"
    """Which loss is minimised."""
    samples: Annotated[int, Field(ge=2, le=1024)] = 4
    """Completions of each prompt."""
    beta: Strength = 0.05
    """What a completion loses for each nat that it is likelier than in the model that training begins with."""


class PpoObjective(RolloutObjective):
    """Proximal policy optimization with a value head (arXiv 1707.06347)."""

    name: Literal["ppo"] = "ppo"
    """Which loss is minimised."""
    samples: Annotated[int, Field(ge=1, le=1024)] = 1
    """Completions of each prompt."""
    beta: Strength = 0.05
    """What a token loses for each nat that it is likelier than in the model that training begins with."""
    gamma: Fraction = 1.0
    """What a reward is multiplied by for each token that it lies ahead."""
    gae_lambda: Fraction = 0.95
    """How far ahead advantages look: 0 to the next value alone, 1 to the end (arXiv 1506.02438)."""
    value_weight: Annotated[float, Field(gt=0.0, le=100.0)] = 0.1
    """Weight of the value head's loss."""
    value_clip: Clip = 0.2
    """How far a value may move from that of the rollout before its loss stands still."""
    whiten: bool = True
    """Shift and scale the advantages of a rollout to mean 0 and variance 1."""
