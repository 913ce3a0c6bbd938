"""`lora --version`."""

from __future__ import annotations

from typing import Annotated

import typer

from lora_cli import __version__


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"lora-cli {__version__}")
        raise typer.Exit


def version_option(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune language models from one YAML recipe."""
