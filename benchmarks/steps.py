"""Seconds of an optimizer step of several recipes beside each other, in one process, in turn.

    python benchmarks/steps.py configs/quickstart.yaml configs/dora.yaml
    python benchmarks/steps.py configs/quickstart.yaml configs/dora.yaml model.base=./my-model train.batch_size=8
    python benchmarks/steps.py configs/quickstart.yaml --beside data.packing=false

Every recipe makes a step on its own rows, then the next recipe does, and so on, so that a slow second falls on all. A
ratio is that of two steps which stood side by side; printed are its median and quartiles.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
from collections.abc import Sequence
from pathlib import Path

from lora_cli import objectives
from lora_cli.models.load import base_folder
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.schema import Recipe
from lora_cli.runtime import dist, order
from lora_cli.runtime.dist import Runtime
from lora_cli.runtime.log import Stopwatch
from lora_cli.stages import _opened as opened
from lora_cli.stages import inject, prepare
from lora_cli.stages._gradient_step import GradientStep
from lora_cli.types import Prepared


def gradient_step(path: Path, overrides: Sequence[str], rt: Runtime) -> GradientStep:
    """Return the step of a recipe, as the pipeline makes it."""
    recipe = load_recipe(path, overrides)
    base = base_folder(recipe.model.base, recipe.model.revision)
    tokenizer = opened.tokenizer_for(recipe, base)
    kinds = objectives.consumes(recipe.objective)
    prepared = prepare.run(recipe.data, recipe.train_on(), tokenizer, rt, lambda line: None, consumes=kinds)
    return step_on(recipe, base, prepared, rt)


def step_on(recipe: Recipe, base: Path, prepared: Prepared, rt: Runtime) -> GradientStep:
    """Return the step of a recipe on prepared rows, as the pipeline makes it."""
    assert prepared.train is not None
    plan = recipe.train
    total = order.planned_steps(plan, len(prepared.train))
    model, method = inject.run(
        base, recipe.model.dtype, recipe.adapter, prepared,
        start=None, keeps_start=False, quantization=opened.quantization(recipe), packing=recipe.data.packing,
        total_steps=total, max_length=recipe.data.max_length, max_generated=0, batch_size=plan.batch_size,
        seed=recipe.run.seed, resumed=lambda: None, rt=rt, log=lambda line: None,
    )  # fmt: skip
    objective = objectives.build(recipe.objective, pad_id=prepared.pad_id)
    return GradientStep(
        plan, model, method, objective, prepared.train, recipe.run.seed, rt, lambda line: None
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Time the recipes and print a line for each."""
    parser = argparse.ArgumentParser(description="Time the optimizer steps of recipes side by side.")
    parser.add_argument("recipes", nargs="+", metavar="RECIPE | key=value")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--beside", action="append", default=[], metavar="key=value", help="recipes with it as well"
    )
    options = parser.parse_args(arguments)
    overrides = [one for one in options.recipes if "=" in one]
    paths = [Path(one) for one in options.recipes if "=" not in one]
    cases = [(path, [path.stem, *key]) for key in ([], *([one] for one in options.beside)) for path in paths]
    with dist.start(options.device) as rt:
        with contextlib.redirect_stdout(io.StringIO()):
            steps = [gradient_step(path, [*overrides, *name[1:]], rt) for path, name in cases]
        seconds: list[list[float]] = []
        for turn in range(options.warmup + options.steps):
            laps, watch = [], Stopwatch()
            for step in steps:
                step.take()  # reads the loss, so a GPU has finished
                laps.append(watch.lap())
            if turn >= options.warmup:
                seconds.append(laps)
    for index, (_, name) in enumerate(cases):
        own = statistics.median(laps[index] for laps in seconds)
        low, middle, high = statistics.quantiles((laps[index] / laps[0] for laps in seconds), n=4)
        print(
            f"{' '.join(name):<16} {own * 1e3:8.1f} ms a step, {middle:.3f} times the first ({low:.3f} to {high:.3f})"
        )


if __name__ == "__main__":
    main()
