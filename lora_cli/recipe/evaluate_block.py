"""The `evaluate` block: what the base and the tuned model are scored by on the held-out rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from lora_cli.recipe.constitution_block import Judge
from lora_cli.recipe.rollout_blocks import Reward
from lora_cli.recipe.section import Conflict, PositiveInt, Section


class WinRate(Section):
    """What decides whether the tuned model's answer to a held-out prompt is better than the base's: `rewards` or a
    `judge`, one of the two."""

    rewards: Annotated[list[Reward], Field(min_length=1)] | None = None
    """The answer that is worth more wins: a list as in objective.rewards, of which the weighted sum is taken."""
    judge: Judge | None = None
    """The answer that it takes to be better wins; it is asked in both orders."""
    question: Annotated[str, Field(min_length=1, max_length=10_000)] = (
        "Which reply answers the user better: what was asked, correctly and clearly?"
    )
    """What the judge is asked of the replies A and B."""

    def conflicts(self) -> Iterator[Conflict]:
        """Yield every broken rule that joins keys of this block."""
        place = "evaluate.win_rate"
        if (self.rewards is None) == (self.judge is None):
            found = "nothing" if self.judge is None else "both rewards and a judge"
            message = f"found {found} to decide by (give one of them: rewards, or judge: {{kind: ...}})"
            yield Conflict(place, message, reads=(f"{place}.rewards", f"{place}.judge"))
        if self.judge is not None:
            yield from self.judge.rules(f"{place}.judge")
        for reward in self.rewards or ():
            yield from reward.rules(f"{place}.rewards")


class Evaluate(Section):
    """Scores of the base and of the tuned model on the held-out rows."""

    metrics: Annotated[list[Literal["loss", "exact_match", "win_rate"]], Field(min_length=1)] = Field(
        default=["loss"]
    )
    """loss: loss, perplexity and token accuracy. exact_match: generate each row's last answer and compare it with the
    row's own. win_rate: generate it and compare the tuned model's with the base's, as `win_rate` says. The last two are
    not for text rows, which have no answers."""
    max_generated_rows: PositiveInt | None = None
    """Generate for only the first so many held-out rows. null: all."""
    max_new_tokens: Literal["auto"] | PositiveInt = "auto"
    """Longest generated answer, in tokens. auto: the longest reference answer, since a longer one cannot match."""
    batch_tokens: Literal["auto"] | PositiveInt = "auto"
    """Padded tokens per forward pass (prompt and answer). auto: 8192 on a CPU and 65536 on a GPU, less
    for a large vocabulary where a model's code allows its losses only from all logits."""
    win_rate: WinRate | None = None

    def generates(self) -> bool:
        """Say whether a metric is of generated answers."""
        return "exact_match" in self.metrics or self.compares() is not None

    def compares(self) -> WinRate | None:
        """Return what win_rate is decided by; None where it is not asked for."""
        return self.win_rate if "win_rate" in self.metrics else None

    def conflicts(self) -> Iterator[Conflict]:
        """Yield every broken rule that joins keys of this block."""
        if "win_rate" in self.metrics and self.win_rate is None:
            message = (
                "found win_rate, but nothing says which answer wins (set evaluate.win_rate.rewards or .judge)"
            )
            yield Conflict("evaluate.metrics", message, reads=("evaluate.win_rate",))
