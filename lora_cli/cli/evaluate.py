"""`lora-eval TARGET [key=value ...]`: score a run, an adapter or a model on held-out rows."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_cli.cli.arguments import AtLeast, AtMost, Overrides, read_recipe
from lora_cli.cli.exits import run_folder

if TYPE_CHECKING:
    from lora_cli.recipe.gates import Gate
    from lora_cli.recipe.schema import Recipe

Target = Annotated[
    Path,
    typer.Argument(
        metavar="TARGET",
        show_default=False,
        help="A run folder, an adapter folder (then model.base=... says what it adapts), or a model folder.",
    ),
]


def read_target(
    target: Path, overrides: Sequence[str], at_least: Sequence[str] = (), at_most: Sequence[str] = ()
) -> tuple[Recipe, tuple[Gate, ...]]:
    """Return the recipe of a run, or the defaults for an adapter or model, with overrides; and the gates.

    Raises:
        InputError: there is no such folder, or the recipe or an option is bad.
    """
    from lora_cli.preflight import kind_of

    is_run = kind_of(target) == "run"
    if is_run:
        run_folder.set(target)
    return read_recipe(target / "recipe.yaml" if is_run else None, overrides, at_least, at_most)


def evaluate(
    target: Target,
    overrides: Overrides = None,
    at_least: AtLeast = None,
    at_most: AtMost = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the scores as JSON, all else on stderr.")
    ] = False,
) -> None:
    """Score a run, an adapter or a model on the rows of data.eval, beside its base."""
    recipe, gates = read_target(target, overrides or (), at_least or (), at_most or ())
    from lora_cli import preflight

    preflight.check_evaluation(target, recipe)
    from lora_cli import pipeline  # imports torch
    from lora_cli.recipe.gates import check_gates

    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        scores = pipeline.evaluate(target, recipe)
    if as_json:
        typer.echo(json.dumps(scores, indent=2))
    check_gates(
        gates, scores["tuned"]
    )  # here, not in the pipeline: the scores are printed even if one misses
