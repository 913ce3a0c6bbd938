"""Arguments that several commands share, and how a recipe and its gates are read together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from lora_cli.errors import InputError

if TYPE_CHECKING:
    from lora_cli.recipe.chain import Chain
    from lora_cli.recipe.gates import Gate
    from lora_cli.recipe.schema import Recipe

Read = TypeVar("Read", bound="Recipe | Chain")

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
        InputError: with the problems of both; or the recipe has several objectives.
    """
    from lora_cli.recipe.load import load_recipe  # pydantic: not for --help

    return _with_gates(lambda: load_recipe(path, overrides), at_least, at_most)


def read_chain(
    path: Path, overrides: Sequence[str], at_least: Sequence[str], at_most: Sequence[str]
) -> tuple[Recipe | Chain, tuple[Gate, ...]]:
    """Return the recipe with its overrides, or its stages where it has several objectives, and the gates.

    Raises:
        InputError: with the problems of both.
    """
    from lora_cli.recipe.chain import load

    return _with_gates(lambda: load(path, overrides), at_least, at_most)


def _with_gates(
    read: Callable[[], Read], at_least: Sequence[str], at_most: Sequence[str]
) -> tuple[Read, tuple[Gate, ...]]:
    from lora_cli.recipe.gates import check_computable, parse_gates
    from lora_cli.recipe.schema import Recipe

    problems: list[str] = []
    gates: tuple[Gate, ...] = ()
    try:
        gates = parse_gates(at_least, at_most)
    except InputError as error:
        problems.extend(error.lines)
    try:
        found = read()
    except InputError as error:
        raise InputError(error.lines + problems) from None
    if isinstance(found, Recipe):
        scored: Recipe | None = found
    else:
        policy = found.policy()
        scored = policy.recipe if policy else None
    try:
        if scored is not None:
            check_computable(gates, scored)
        elif gates:
            raise InputError(f"{gates[0]}: no stage trains the language model, so there are no scores of it")
    except InputError as error:
        problems.extend(error.lines)
    if problems:
        raise InputError(problems)
    return found, gates


def run_of(target: Path) -> Path:
    """Return the folder of the last stage that trains the language model, where the target has stages; else itself.

    Raises:
        InputError: there is no such stage, or it was not begun.
    """
    from lora_cli.runtime.chain_folder import ChainFolder

    folder = ChainFolder(target)
    if not folder.is_chain():
        return target
    from lora_cli.recipe.chain import load_chain

    stage = load_chain(folder.recipe_file).policy()
    if stage is None:
        raise InputError(
            f"{target}: none of its stages trains the language model (name the folder of one of them)"
        )
    found = target / stage.folder.name
    if not found.is_dir():
        raise InputError(
            f"{target}: its stage {stage.name} was not begun yet (finish it with lora-train, or name the folder of an"
            " earlier stage)"
        )
    return found
