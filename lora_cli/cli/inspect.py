"""`lora inspect TARGET [key=value ...]`: where the adaptation went, and whether its ranks fit."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Annotated

import typer

from lora_cli.cli import inspect_table
from lora_cli.cli.arguments import Overrides, run_of
from lora_cli.cli.evaluate import Target, read_target
from lora_cli.cli.uncollected import uncollected
from lora_cli.errors import InputError


def inspect(
    target: Target,
    overrides: Overrides = None,
    every: Annotated[bool, typer.Option("--all", help="A row for every module, not for every kind.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all of it as JSON, all else on stderr.")
    ] = False,
) -> None:
    """Show where the update of a run, adapter or model went, its spectrum, and whether its ranks fit."""
    if every and as_json:
        raise InputError("--all and --json exclude each other (JSON holds every module)")
    target = run_of(target)
    recipe, _ = read_target(target, overrides or (), blocks=("model", "run"), beside_base=True)
    from lora_cli import preflight

    preflight.check_inspection(target, recipe)
    with uncollected():
        from lora_cli import without_training  # imports torch

    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        found = without_training.inspect(target, recipe)
    if as_json:
        typer.echo(json.dumps(found, indent=2, allow_nan=False))
        return
    typer.echo("\n".join(inspect_table.lines(found, every=every, encoding=sys.stdout.encoding or "ascii")))
