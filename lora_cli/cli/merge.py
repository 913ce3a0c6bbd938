"""`lora-merge TARGET --output DIR`: write the base with the adapter in its weights."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lora_cli.cli.arguments import Overrides
from lora_cli.cli.evaluate import Target, read_target


class Dtype(StrEnum):
    """Type of the merged weights."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


def merge(
    target: Target,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", show_default=False, help="New folder for the model."),
    ],
    overrides: Overrides = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Default: model.dtype of the recipe.")
    ] = None,
) -> None:
    """Write a plain model: the base with the update of a run or adapter in its weights."""
    recipe, _ = read_target(target, overrides or (), blocks=("model", "data", "export", "run"))
    from lora_cli import preflight

    preflight.check_merge(target, output, recipe)
    from lora_cli import pipeline  # imports torch

    pipeline.merge(target, output, recipe, dtype=dtype.value if dtype else None)
