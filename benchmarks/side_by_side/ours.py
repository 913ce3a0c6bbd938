"""Our side: the product's own `inject.run` and `GradientStep`, on the rows of the case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from steps import step_on

from lora_cli.adapters import Method
from lora_cli.models.adapted import AdaptedModel
from lora_cli.recipe.load import load_recipe
from lora_cli.runtime import dist, order
from lora_cli.types import IGNORED, Batch, Example, Prepared
from side_by_side.records import Document, Job, Recorder, measure, read_work


class Rows:
    """The documents of all steps, laid so that the run's own order brings those of each step together."""

    def __init__(self, steps: Sequence[Sequence[Document]], seed: int) -> None:
        self.documents: list[Document] = laid_out(steps, seed)
        self.lengths = np.array([len(ids) for ids, _ in self.documents])
        self.max_token = max(int(ids.max()) for ids, _ in self.documents)
        self.fingerprint = "side by side"

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Example:
        ids, labels = self.documents[index]
        return Example(ids.astype(np.int32), labels != IGNORED)

    def where(self, index: int) -> str:
        """Return a row's place in the file."""
        return f"row {index}"


def laid_out(steps: Sequence[Sequence[Any]], seed: int) -> list[Any]:
    """Return the rows of all steps in the order from which a run takes those of each step together."""
    size = len(steps[0])
    rows = [steps[0][0]] * (size * len(steps))
    for step, members in enumerate(steps):
        places = order.rows_of_step(step, num_rows=len(rows), batch_size=size, seed=seed)
        for place, member in zip(places, members, strict=True):
            rows[place] = member
    return rows


def run(job: Job, recorder: Recorder) -> None:
    """Make the case's steps."""
    recipe = load_recipe(Path(job.recipe), [])
    rows = Rows(read_work(job.work), recipe.run.seed)
    prepared = Prepared(
        train=rows, eval=None, tokenizer=None, pad_id=0, stop_ids=(), formats={}, template="plain", counts={},
        changed=list, contents={},
    )  # fmt: skip
    with dist.start(job.device) as rt:
        step = step_on(recipe, Path(job.model), prepared, rt)
        if job.start is not None:
            fill(step.model, step.method, job.start)
        step.try_out()
        counted = step.objective.loss_sum

        def loss_sum(model: AdaptedModel, batch: Batch) -> Any:
            real = slice(None)
            if batch.documents is not None:  # without the filler that follows the rows
                real = slice(sum(batch.documents.lengths[: len(batch.rows)]))
            positions = None if batch.position_ids is None else batch.position_ids[:, real]
            recorder.see(
                batch.input_ids[:, real],
                batch.labels[:, real],
                mask=batch.attention_mask,
                positions=positions,
            )
            return counted(model, batch)

        step.objective.loss_sum = loss_sum  # type: ignore[method-assign]
        recorder.begin()
        for _ in range(job.steps):
            metrics = step.take()
            recorder.loss, recorder.norm = metrics["loss"], metrics["grad_norm"]
            recorder.end()


@torch.no_grad()
def fill(model: AdaptedModel, method: Method, path: str) -> None:
    """Set the adapters to the values of the file, every one of which has its place."""
    start = load_file(path)
    for name in [name for name in start if name in ("vera_A", "vera_B")]:
        getattr(method.projections, name).copy_(start.pop(name))  # type: ignore[attr-defined]
    left = set(method.trainable(model.model))
    for name, value in start.items():
        path, _, tensor = name.rpartition(".")
        getattr(method.layers[path], tensor).copy_(value)
        left.discard(name)
    assert not left, f"{sorted(left)[:3]} are trained, and the file has no values for them"


if __name__ == "__main__":
    measure(run)
