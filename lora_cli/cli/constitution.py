"""`lora constitution make RECIPE`, `lora constitution report RUN`: rows made by principles, and what they changed."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from lora_cli.cli.arguments import Overrides, read_recipe
from lora_cli.cli.exits import new_app, run_folder
from lora_cli.errors import InputError
from lora_cli.paths import expanded

PRINCIPLES_FILE = "constitution.yaml"
"""In the folder of a constitution's rows."""


def app() -> typer.Typer:
    """Return the app of `lora constitution`."""
    made = new_app()
    made.callback(help="Constitutional AI: rows to train on, made by a model under written principles.")(
        _group
    )
    made.command("make")(make)
    made.command("report")(report)
    return made


def _group() -> None:
    """Constitutional AI: rows to train on, made by a model under written principles."""


def make(
    recipe: Annotated[
        Path,
        typer.Argument(metavar="RECIPE", show_default=False, help="The recipe, with a constitution block."),
    ],
    overrides: Overrides = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Make all rows anew that are in the folder.")
    ] = False,
) -> None:
    """Write critiques, revisions and judged pairs, and the rows to train on; goes on where it was interrupted."""
    settings, _ = read_recipe(recipe, overrides or ())
    if settings.constitution is None:
        raise InputError(f"{recipe}: has no constitution block (write constitution: {{file: ...}})")
    run_folder.set(expanded(settings.at("run.output"), settings.run.output))
    from lora_cli.stages import _constitution_checks  # needs the data readers

    _constitution_checks.check(settings)
    from lora_cli import without_training  # imports torch

    without_training.constitute(settings, overwrite=overwrite)


def report(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            show_default=False,
            help="A folder of `lora constitution make`, a training run with generated answers, or stages with both.",
        ),
    ],
    constitution: Annotated[
        Path | None,
        typer.Option("--constitution", metavar="FILE", help="Count by the rules of this file instead."),
    ] = None,
    before: Annotated[
        Path | None,
        typer.Option(
            "--before",
            metavar="RUN",
            help="Of two training runs: answers of this one's tuned model come first.",
        ),
    ] = None,
    show: Annotated[int, typer.Option("--show", metavar="N", min=0, help="Show N answers.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show answers before and after side by side, and count those that break a principle."""
    for folder in filter(None, (run, before)):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder (give a run)")
    from lora_cli.constitution.report import report as read_report

    if before is None:
        run, before, constitution = _of_stages(run, constitution)
    said = read_report(run, constitution, show=show, before=before, said=_held_out(run))
    if as_json:
        typer.echo(json.dumps(said, indent=2, ensure_ascii=False))
        return
    from lora_cli.cli import constitution_table  # rich

    with contextlib.suppress(BrokenPipeError):
        constitution_table.show(said, sys.stdout)


def _of_stages(run: Path, constitution: Path | None) -> tuple[Path, Path | None, Path | None]:
    """Return the run to report, the one that comes first, and the constitution; of a single run itself.

    Of a recipe's stages these are the last that trained the language model, and the last that did before rows were made
    by the constitution; where there are not both, the rows.

    Raises:
        InputError: no stage makes rows by principles.
    """
    from lora_cli.recipe.chain import load_chain
    from lora_cli.runtime.chain_folder import ChainFolder

    if not ChainFolder(run).is_chain():
        return run, None, constitution
    chain = load_chain(ChainFolder(run).recipe_file)
    made = next((stage for stage in chain.stages if stage.recipe.constitution is not None), None)
    if made is None:
        raise InputError(f"{run}: none of its stages makes rows by principles (give the folder of a stage)")
    rows = run / made.folder.name
    earlier = [stage for stage in chain.stages[: made.number - 1] if stage.trains]
    last = chain.policy()
    if not earlier or last is None or last.number < made.number:
        return rows, None, constitution
    rules = constitution or rows / PRINCIPLES_FILE
    return run / last.folder.name, run / earlier[-1].folder.name, rules


def _held_out(run: Path) -> dict[str, tuple[str, ...]]:
    """Return what the user says in the held-out rows of a training run; nothing where they cannot be read any more."""
    from lora_cli.data.prompts import said_by_place
    from lora_cli.recipe.load import load_recipe
    from lora_cli.runtime.run_folder import RECIPE_FILE, RunFolder

    if not RunFolder(run).is_run():
        return {}
    try:
        return said_by_place(load_recipe(run / RECIPE_FILE).data)
    except InputError as fault:
        typer.echo(f"warning: prompts are searched as the model was shown them: {fault.lines[0]}", err=True)
        return {}
