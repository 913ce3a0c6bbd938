"""`lora recipe`: the JSON Schema for editors, the documentation of a key, and a recipe with its defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lora_cli.cli.arguments import Overrides
from lora_cli.cli.exits import new_app


def app() -> typer.Typer:
    """Return the `recipe` command group."""
    group = new_app()
    group.callback(invoke_without_command=True)(_recipe)
    group.command("explain")(_explain)
    group.command("show")(_show)
    return group


def _recipe(
    context: typer.Context,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema, for editors.")] = False,
) -> None:
    """Explain the recipe: its keys, a resolved recipe, its JSON Schema."""
    from lora_cli.recipe.explain import explain
    from lora_cli.recipe.keys import json_schema

    if schema:
        typer.echo(json.dumps(json_schema(), indent=2))
    elif context.invoked_subcommand is None:
        typer.echo(explain(""))


def _explain(
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="A key or block, e.g. train.warmup or adapter.")
    ] = "",
) -> None:
    """Print type, default and documentation of a key or block."""
    from lora_cli.recipe.explain import explain

    typer.echo(explain(key))


def _show(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", show_default=False, help="The recipe, a YAML file.")
    ],
    overrides: Overrides = None,
) -> None:
    """Print the recipe with overrides applied and every default written out."""
    from lora_cli.recipe.chain import dump_chain, load
    from lora_cli.recipe.dump import dump_recipe
    from lora_cli.recipe.schema import Recipe

    found = load(recipe, overrides or ())
    typer.echo(dump_recipe(found) if isinstance(found, Recipe) else dump_chain(found), nl=False)
