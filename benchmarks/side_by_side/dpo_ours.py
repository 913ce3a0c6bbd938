"""Our side of preference optimization: the product's own `inject.run` and `GradientStep`, on the pairs of the job."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from steps import step_on

from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.prefixes import unfold
from lora_cli.recipe.load import load_recipe
from lora_cli.runtime import dist
from lora_cli.types import Batch, Example, PairExample, Prepared
from side_by_side.ours import fill, laid_out
from side_by_side.pairs import Pair, read_steps
from side_by_side.records import Job, Recorder, measure


class Pairs:
    """The pairs of all steps, laid so that the run's own order brings those of each step together."""

    def __init__(self, steps: list[list[Pair]], seed: int) -> None:
        self.pairs = laid_out(steps, seed)
        self.lengths = np.array([2 * len(one) + len(two) + len(three) for one, two, three in self.pairs])
        self.max_token = max(max(part) for pair in self.pairs for part in pair if part)
        self.fingerprint = "side by side"

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> PairExample:
        prompt, *answers = self.pairs[index]
        one, other = (
            Example(np.array(prompt + answer, np.int32), np.arange(len(prompt + answer)) >= len(prompt))
            for answer in answers
        )
        return PairExample(one, other, math.nan)

    def where(self, index: int) -> str:
        """Return a pair's place in the file."""
        return f"row {index}"


def run(job: Job, recorder: Recorder) -> None:
    """Make the steps of the job."""
    recipe = load_recipe(Path(job.recipe), [])
    prepared = Prepared(
        train=Pairs(read_steps(job.work), recipe.run.seed), eval=None, tokenizer=None, pad_id=0, stop_ids=(),
        formats={}, template="plain", counts={}, changed=list, contents={},
    )  # fmt: skip
    with dist.start(job.device) as rt:
        step = step_on(recipe, Path(job.model), prepared, rt)
        if job.start is not None:
            fill(step.model, step.method, job.start)
        if not job.options.get("share", True):
            step.model.shares_prompts = False
        step.try_out()
        computed: list[int] = []
        counted = step.objective.loss_sum

        def loss_sum(model: AdaptedModel, batch: Batch) -> Any:
            computed.append(batch.input_ids.numel())
            recorder.see(**_seen(batch))
            return counted(model, batch)

        step.objective.loss_sum = loss_sum  # type: ignore[method-assign]
        recorder.begin()
        for _ in range(job.steps):
            metrics = step.take()
            recorder.loss, recorder.norm = metrics["loss"], metrics["grad_norm"]
            recorder.end()
        recorder.numbers["computed_tokens"] = sum(computed) / job.steps


def _seen(batch: Batch) -> dict[str, Any]:
    """Return what a batch shows the model, each answer with its prompt, without what fills a sequence up."""
    if batch.documents is None:
        return {"ids": batch.input_ids, "labels": batch.labels, "mask": batch.attention_mask}
    lengths, common = batch.documents.lengths, batch.documents.common
    real = len(batch.targets.counts)
    order = torch.from_numpy(unfold(lengths, common)[: sum(lengths[:real])]).to(batch.input_ids.device)
    assert batch.position_ids is not None
    parts = {"ids": batch.input_ids, "labels": batch.labels, "positions": batch.position_ids}
    return {name: part[:, order] for name, part in parts.items()}


if __name__ == "__main__":
    measure(run)
