"""Arguments that several commands share, and how a recipe and its gates are read together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_cli.errors import InputError

if TYPE_CHECKING:
    from lora_cli.recipe.gates import Gate
    from lora_cli.recipe.schema import Recipe

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", show_default=False, help="Recipe keys, e.g. train.learning_rate=1e-4."
    ),
]
AtLeast = Annotated[
    list[str] | None,
    typer.Option("--min", metavar="NAME=VALUE", help="Exit 5 if this score is lower, e.g. exact_match=0.9."),
]
AtMost = Annotated[
    list[str] | None,
    typer.Option("--max", metavar="NAME=VALUE", help="Exit 5 if this score is higher, e.g. perplexity=20."),
]


def read_recipe(
    path: Path | None, overrides: Sequence[str], at_least: Sequence[str] = (), at_most: Sequence[str] = ()
) -> tuple[Recipe, tuple[Gate, ...]]:
    """Return the recipe with its overrides, and the gates.

    Raises:
        InputError: with the problems of both.
    """
    from lora_cli.recipe.gates import check_computable, parse_gates  # pydantic: not for --help
    from lora_cli.recipe.load import load_recipe

    problems: list[str] = []
    gates: tuple[Gate, ...] = ()
    try:
        gates = parse_gates(at_least, at_most)
    except InputError as error:
        problems.extend(error.lines)
    try:
        recipe = load_recipe(path, overrides)
    except InputError as error:
        raise InputError(error.lines + problems) from None
    try:
        check_computable(gates, recipe)
    except InputError as error:
        problems.extend(error.lines)
    if problems:
        raise InputError(problems)
    return recipe, gates
