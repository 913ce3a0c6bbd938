"""`lora-train RECIPE [key=value ...]`: the whole pipeline."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from lora_cli.cli.arguments import AtLeast, AtMost, Overrides, read_recipe
from lora_cli.cli.exits import run_folder
from lora_cli.cli.uncollected import uncollected
from lora_cli.errors import InputError
from lora_cli.paths import expanded

Command = Callable[..., None]


def train(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", show_default=False, help="The recipe, a YAML file.")
    ],
    overrides: Overrides = None,
    check: Annotated[bool, typer.Option("--check", help="Check recipe, data and model, and stop.")] = False,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume",
            show_default=False,
            help="An unfinished run is gone on with by itself; with --resume a finished one as well, which now asks for"
            " more. With --no-resume neither.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start again in the folder of a run.")
    ] = False,
    at_least: AtLeast = None,
    at_most: AtMost = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            "--allow", metavar="KEY", help="Go on although this key, or what it names, is not what it was."
        ),
    ] = None,
) -> None:
    """Fine-tune a model as the recipe says, evaluate it against the base, and export it."""
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other (give one)")
    settings, gates = read_recipe(recipe, overrides or (), at_least or (), at_most or ())
    run_folder.set(expanded(settings.at("run.output"), settings.run.output))
    from lora_cli import preflight  # needs the data readers, which a bad recipe need not wait for

    checked = preflight.check(settings, resume=resume, overwrite=overwrite, allow=allow or ())
    if check:
        typer.echo("\n".join([f"{recipe}: every key is valid", *checked, "nothing was trained (--check)"]))
        return
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes one speaks
        method, base = settings.adapter.method, settings.model.base
        typer.echo(f"{recipe}: {settings.objective.name} with {method} on {base} -> {settings.run.output}")
    with uncollected():
        from lora_cli import pipeline  # imports torch: seconds, which no fault above should cost

    pipeline.train(settings, resume=resume, overwrite=overwrite, gates=gates, allow=allow or ())
