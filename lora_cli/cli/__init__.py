"""The command line: `lora-train`, `lora-eval`, `lora-merge`, and `lora` with these and more as subcommands.

Each command reads the recipe, has everything checked that can be checked without torch, calls `pipeline` and
returns an exit code. Nothing here imports torch before the recipe is known to be good.
"""

from __future__ import annotations

from collections.abc import Sequence

import typer

from lora_cli.cli import data, evaluate, inspect, merge, recipe, train
from lora_cli.cli.exits import new_app, run
from lora_cli.cli.version import version_option

__all__ = ["eval_main", "main", "merge_main", "train_main"]


def train_main(arguments: Sequence[str] | None = None) -> int:
    """Run `lora-train` and return its exit code."""
    return run(_single(train.train), "lora-train", arguments)


def eval_main(arguments: Sequence[str] | None = None) -> int:
    """Run `lora-eval` and return its exit code."""
    return run(_single(evaluate.evaluate), "lora-eval", arguments)


def merge_main(arguments: Sequence[str] | None = None) -> int:
    """Run `lora-merge` and return its exit code."""
    return run(_single(merge.merge), "lora-merge", arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `lora` and return its exit code."""
    app = new_app()
    app.callback()(version_option)
    app.command("train")(train.train)
    app.command("eval")(evaluate.evaluate)
    app.command("merge")(merge.merge)
    app.command("data")(data.data)
    app.command("inspect")(inspect.inspect)
    app.add_typer(recipe.app(), name="recipe")
    return run(app, "lora", arguments)


def _single(command: train.Command) -> typer.Typer:
    app = new_app()
    app.command()(command)
    return app
