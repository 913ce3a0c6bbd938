"""`lora-eval TARGET [key=value ...]`: score a run, an adapter or a model on held-out rows."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_cli.cli.arguments import AtLeast, AtMost, Overrides, read_recipe, run_of
from lora_cli.cli.exits import run_folder
from lora_cli.cli.uncollected import uncollected
from lora_cli.errors import InputError

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
    target: Path,
    overrides: Sequence[str],
    at_least: Sequence[str] = (),
    at_most: Sequence[str] = (),
    *,
    blocks: Sequence[str],
    beside_base: bool = False,
) -> tuple[Recipe, tuple[Gate, ...]]:
    """Return the recipe of a run, or the defaults for an adapter or model, with overrides; and the gates.

    `blocks` are the blocks of the recipe that the command reads; an override elsewhere would have no effect.
    `beside_base` says that it reads a base also where the target is a model.

    Raises:
        InputError: there is no such folder, the recipe or an option is bad, or an override has no effect.
    """
    from lora_cli.preflight import kind_of

    kind = kind_of(target)
    is_run = kind == "run"
    if is_run:
        run_folder.set(target)
    unread = {"data", "adapter", "objective", "train", "evaluate", "export", "constitution"} - set(blocks)
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key.partition(".")[0] in unread:
            raise InputError(f"override {override}: has no effect here (only {', '.join(blocks)} keys have)")
        if key == "model.base" and kind == "model" and not beside_base:
            raise InputError(
                f"override {override}: has no effect, {target} is the model itself (leave it out)"
            )
    recipe, gates = read_recipe(target / "recipe.yaml" if is_run else None, overrides, at_least, at_most)
    place = recipe.at("model.trust_remote_code")
    if is_run and recipe.model.trust_remote_code and not place.startswith("override "):
        # A run folder may have been handed over, and its recipe with it.
        raise InputError(
            f"{place}: the recipe of a run cannot let code run (add model.trust_remote_code=true, if you trust"
            f" {recipe.model.base})"
        )
    return recipe, gates


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
    blocks = ("model", "data", "objective", "evaluate", "run")
    target = run_of(target)
    recipe, gates = read_target(target, overrides or (), at_least or (), at_most or (), blocks=blocks)
    from lora_cli import preflight

    if preflight.kind_of(target) == "run":
        _refuse_what_a_run_cannot_ask(recipe)
    preflight.check_evaluation(target, recipe)
    with uncollected():
        from lora_cli import without_training  # imports torch
    from lora_cli.recipe.gates import check_gates

    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        scores = without_training.evaluate(target, recipe)
    if as_json:
        typer.echo(json.dumps(scores, indent=2))
    # Here, not in the pipeline: the scores are printed even if one misses.
    check_gates(gates, scores["tuned"])


def _refuse_what_a_run_cannot_ask(recipe: Recipe) -> None:
    """Refuse code and connections that the recipe of a run names and the user does not: it may have been handed over.

    Raises:
        InputError: the recipe names such; an override says that the user does.
    """
    problems = []
    place = recipe.at("run.allow_code")
    if recipe.run.allow_code and not place.startswith("override "):
        problems.append(
            f"{place}: the recipe of a run cannot let code run (add run.allow_code=true, if you have read it, or"
            " run.allow_code=false)"
        )
    win_rate = recipe.evaluate.compares()
    judge = win_rate.judge if win_rate is not None else None
    for name, does in (("url", "open a connection"), ("key_from", "choose what is sent")):
        value, key = getattr(judge, name, None), f"evaluate.win_rate.judge.{name}"
        if value is not None and not recipe.at(key).startswith("override "):
            problems.append(
                f"{recipe.at(key)}: the recipe of a run cannot {does} (add {key}={value}, if you trust it)"
            )
    if problems:
        raise InputError(problems)
