"""`lora-train RECIPE [key=value ...]`: the whole pipeline."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_cli.cli.arguments import AtLeast, AtMost, Overrides, read_chain
from lora_cli.cli.exits import run_folder
from lora_cli.cli.uncollected import uncollected
from lora_cli.errors import InputError
from lora_cli.paths import expanded

if TYPE_CHECKING:
    from lora_cli.recipe.chain import Chain
    from lora_cli.recipe.gates import Gate

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
    settings, gates = read_chain(recipe, overrides or (), at_least or (), at_most or ())
    from lora_cli.recipe.schema import Recipe

    if not isinstance(settings, Recipe):
        _train_stages(recipe, settings, gates, check, resume, overwrite, allow or ())
        return
    run_folder.set(expanded(settings.at("run.output"), settings.run.output))
    from lora_cli import preflight  # needs the data readers, which a bad recipe need not wait for

    checked = preflight.check(settings, resume=resume, overwrite=overwrite, allow=allow or ())
    method, base = settings.adapter.method, settings.model.base
    if _says(
        recipe, f"{settings.objective.name} with {method} on {base} -> {settings.run.output}", check, checked
    ):
        return
    with uncollected():
        from lora_cli import pipeline  # imports torch: seconds, which no fault above should cost

    pipeline.train(settings, resume=resume, overwrite=overwrite, gates=gates, allow=allow or ())


def _train_stages(
    path: Path,
    stages: Chain,
    gates: Sequence[Gate],
    check: bool,
    resume: bool | None,
    overwrite: bool,
    allow: Sequence[str],
) -> None:
    run_folder.set(expanded(stages.place, stages.run.output))
    from lora_cli import chain_preflight

    checked = chain_preflight.check(stages, resume=resume, overwrite=overwrite, allow=allow)
    first = stages.stages[0].recipe
    names = ", ".join(stage.name for stage in stages.stages)
    if _says(
        path,
        f"{names} with {first.adapter.method} on {first.model.base} -> {stages.run.output}",
        check,
        checked,
    ):
        return
    with uncollected():
        from lora_cli import chain  # imports torch

    chain.train(stages, resume=resume, overwrite=overwrite, gates=gates, allow=allow)


def _says(recipe: Path, what: str, check: bool, checked: Sequence[str]) -> bool:
    """Print what was checked, or what is begun; return whether it ends there."""
    if check:
        typer.echo("\n".join([f"{recipe}: every key is valid", *checked, "nothing was trained (--check)"]))
    elif os.environ.get("RANK", "0") == "0":  # of torchrun's processes one speaks
        typer.echo(f"{recipe}: {what}")
    return check
