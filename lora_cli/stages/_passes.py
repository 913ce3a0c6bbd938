"""One epoch as it will be computed: its optimizer steps, and the forward passes that each is split into."""

from __future__ import annotations

from typing import Any

from lora_cli.data.dataset import Dataset
from lora_cli.objectives._base import group_by_length, tokens_of_pass
from lora_cli.objectives._packing import bins
from lora_cli.recipe.schema import Recipe
from lora_cli.runtime import order
from lora_cli.stages._gradient_step import MICRO_BATCH_TOKENS


def epoch(recipe: Recipe, train: Dataset, device: str) -> dict[str, Any]:
    """Return steps and forward passes of the first epoch, in one process; `device` is cpu or cuda.

    Rows are packed where the recipe wants it and the model, which is not loaded here, passes its trial; else padded.
    """
    plan, rows = recipe.train, len(train)
    steps = order.steps_per_epoch(rows, plan.batch_size)
    limit = tokens_of_pass(plan.micro_batch_tokens, device, at_most=MICRO_BATCH_TOKENS)
    wanted = recipe.data.packing is not False
    tokens = padded = passes = packed = 0
    for step in range(steps):
        mine = order.rows_of_step(step, num_rows=rows, batch_size=plan.batch_size, seed=recipe.run.seed)
        lengths = [int(train.lengths[row]) for row in mine]
        groups = group_by_length(lengths, limit)
        tokens, passes = tokens + sum(lengths), passes + len(groups)
        padded += sum(lengths[group[0]] * len(group) for group in groups)
        packed += len(bins(lengths, limit)) if wanted else 0
    return {
        "steps": steps,
        "total_steps": order.planned_steps(plan, rows),
        "batch_size": plan.batch_size,
        "tokens": tokens,
        "pass_tokens": limit,
        "device": device,
        "packing": recipe.data.packing,
        "packed": {"passes": packed, "filled": round(tokens / (packed * limit), 4)} if packed else None,
        "padded": {"passes": passes, "padding": round(1 - tokens / padded, 4)},
    }
