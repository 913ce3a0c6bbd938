"""`lora-merge TARGET --output DIR`: write the base with the adapter in its weights, or a plain LoRA of any adapter."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lora_cli.cli.arguments import Overrides, run_of
from lora_cli.cli.evaluate import Target, read_target
from lora_cli.cli.uncollected import uncollected
from lora_cli.errors import InputError

_OF_PORTABLE = ("portable_rank", "max_portable_error")
_OF_MERGED = ("max_shard_bytes", "merge_base", "max_merge_kl")
_FORMATS = "override export.formats=[portable]"


class Dtype(StrEnum):
    """Type of the merged weights."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class Adapter(StrEnum):
    """What is written in place of a merged model."""

    PORTABLE = "portable"


def merge(
    target: Target,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", show_default=False, help="New folder for the result."),
    ],
    overrides: Overrides = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Default: model.dtype of the recipe.")
    ] = None,
    adapter: Annotated[
        Adapter | None,
        typer.Option(
            "--adapter",
            help="Write no model but the adapter, as a plain LoRA that vLLM and llama.cpp read;"
            " export.portable_rank=N bounds its rank.",
        ),
    ] = None,
) -> None:
    """Write a plain model: the base with the update of a run or adapter in it; with --adapter, a plain LoRA."""
    target = run_of(target)
    given = list(overrides or ())
    _require_effect(given, adapter, dtype)
    try:
        recipe, _ = read_target(
            target,
            [*given, *([_FORMATS.removeprefix("override ")] if adapter else [])],
            blocks=("model", "data", "export", "run"),
        )
    except InputError as error:
        raise InputError(
            [line.replace(f"{_FORMATS}: export.formats", "--adapter portable") for line in error.lines]
        ) from None
    from lora_cli import preflight

    preflight.check_merge(target, output, recipe)
    with uncollected():
        from lora_cli import without_training  # imports torch

    without_training.merge(
        target,
        output,
        recipe,
        dtype=dtype.value if dtype else None,
        form=adapter.value if adapter else "merged",
    )


def _require_effect(overrides: Sequence[str], adapter: Adapter | None, dtype: Dtype | None) -> None:
    """Refuse what the asked-for form would not read.

    Raises:
        InputError: with one line for each.
    """
    problems = []
    if adapter and dtype:
        problems.append(
            f"--dtype {dtype.value}: has no effect on an adapter, which is float32 (leave it out)"
        )
    why = "with --adapter portable" if adapter else "without --adapter portable"
    for override in overrides:
        block, _, key = override.partition("=")[0].strip().partition(".")
        if block != "export":
            continue
        if key == "formats":
            problems.append(f"override {override}: has no effect here (--adapter says what is written)")
        elif key in (_OF_MERGED if adapter else _OF_PORTABLE):
            problems.append(f"override {override}: has no effect {why} (leave it out)")
    if problems:
        raise InputError(problems)
