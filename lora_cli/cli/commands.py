"""The commands by name, as Typer apps."""

from __future__ import annotations

import typer

from lora_cli.cli import constitution, data, evaluate, inspect, merge, recipe, train
from lora_cli.cli.exits import new_app
from lora_cli.cli.version import version_option

_ALONE: dict[str, train.Command] = {
    "lora-train": train.train,
    "lora-eval": evaluate.evaluate,
    "lora-merge": merge.merge,
}


def app(name: str) -> typer.Typer:
    """Return the app of `lora` or of a command that stands alone."""
    made = new_app()
    if name in _ALONE:
        made.command()(_ALONE[name])
        return made
    made.callback()(version_option)
    made.command("train")(train.train)
    made.command("eval")(evaluate.evaluate)
    made.command("merge")(merge.merge)
    made.command("data")(data.data)
    made.command("inspect")(inspect.inspect)
    made.add_typer(constitution.app(), name="constitution")
    made.add_typer(recipe.app(), name="recipe")
    return made
