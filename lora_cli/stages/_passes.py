"""One epoch as it will be computed: its optimizer steps, and the forward passes that each is split into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_cli.data.dataset import Dataset
from lora_cli.objectives._base import group_by_length, tokens_of_pass
from lora_cli.recipe.schema import Recipe
from lora_cli.runtime import order
from lora_cli.stages._gradient_step import MICRO_BATCH_TOKENS


def epoch(recipe: Recipe, train: Dataset, config: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Return steps, tokens and padding of the first epoch, in one process; `device` is cpu or cuda."""
    plan, rows = recipe.train, len(train)
    steps = order.steps_per_epoch(rows, plan.batch_size)
    limit = tokens_of_pass(
        plan.micro_batch_tokens, int(config.get("vocab_size", 1)), device, at_most=MICRO_BATCH_TOKENS
    )
    tokens = padded = passes = 0
    for step in range(steps):
        mine = order.rows_of_step(step, num_rows=rows, batch_size=plan.batch_size, seed=recipe.run.seed)
        for real, held in layout([int(train.lengths[row]) for row in mine], limit):
            tokens, padded, passes = tokens + real, padded + held, passes + 1
    return {
        "steps": steps,
        "total_steps": order.total_steps(rows, plan.batch_size, epochs=plan.epochs, max_steps=plan.max_steps),
        "batch_size": plan.batch_size,
        "tokens": tokens,
        "passes": passes,
        "pass_tokens": limit,
        "device": device,
        "padding": round(1 - tokens / padded, 4),
    }


def layout(lengths: Sequence[int], tokens: int) -> list[tuple[int, int]]:
    """Return for each forward pass of a step its tokens, and those with padding; `tokens` is the most of a pass."""
    return [
        (sum(lengths[row] for row in group), lengths[group[0]] * len(group))
        for group in group_by_length(lengths, tokens)
    ]
