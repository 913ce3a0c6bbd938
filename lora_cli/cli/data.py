"""`lora data RECIPE [key=value ...]`: what training would be fed, and what is wrong with it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from lora_cli.cli.arguments import Overrides, read_recipe
from lora_cli.cli.uncollected import uncollected
from lora_cli.errors import GateError, InputError

PAGE_ROWS = 10
"""Rows that a page shows where --show does not say how many."""


def data(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", show_default=False, help="The recipe, a YAML file.")
    ],
    overrides: Overrides = None,
    show: Annotated[
        int | None,
        typer.Option(
            "--show", metavar="N", min=0, help="Show the first N training rows, every token of them."
        ),
    ] = None,
    rows: Annotated[
        list[str] | None,
        typer.Option(
            "--row", metavar="FILE:LINE", help="Show the row on this line; can be given several times."
        ),
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the report as one HTML page.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 5 if there is a warning.")] = False,
) -> None:
    """Show what training would be fed: counts, lengths, findings, and rows token by token. Trains nothing."""
    settings, _ = read_recipe(recipe, overrides or ())
    if page is not None:
        _check_page(page)
    from lora_cli import preflight  # needs the data readers, which a bad recipe need not wait for

    preflight.check_description(settings)
    with uncollected():
        from lora_cli import without_training  # imports torch, since transformers does

    number = show if show is not None else PAGE_ROWS if page is not None and not rows else 0
    with contextlib.redirect_stdout(sys.stderr):
        said = without_training.describe_data(settings, show=number, rows=rows or ())
    said = {"recipe": str(recipe), **said}
    if page is not None:
        _write_page(page, said)
        if show is None and not rows:
            said["rows"] = []
    _print(said, as_json=as_json)
    warnings = [finding for finding in said["findings"] if finding["level"] == "warning"]
    if strict and warnings:
        others = f", and {len(warnings) - 1} more warnings" if len(warnings) > 1 else ""
        place = f" (first: {warnings[0]['where']})" if warnings[0]["where"] else ""
        raise GateError(f"{recipe}: {warnings[0]['what']}{place}{others} (--strict)")


def _print(said: dict[str, object], *, as_json: bool) -> None:
    from lora_cli.cli import data_report

    try:
        if as_json:
            typer.echo(json.dumps(said, indent=2, allow_nan=False))
        else:
            data_report.show(said)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads has enough (`| head`); the interpreter would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_page(page: Path) -> None:
    if page.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--html: {page} does not end in .html (a recipe or data file could be overwritten)")
    if page.is_dir() or not page.absolute().parent.is_dir():
        what = "is a folder" if page.is_dir() else f"cannot be written: there is no folder {page.parent}"
        raise InputError(f"--html: {page} {what} (choose another name)")


def _write_page(page: Path, said: dict[str, object]) -> None:
    """Write the page by one rename, so that it is whole or as it was before."""
    from lora_cli.cli import data_page

    text = data_page.render(said)
    staging = page.with_name(f".tmp-{page.name}-{os.getpid()}")
    try:
        try:
            staging.write_text(text, encoding="utf-8", errors="backslashreplace")
            staging.replace(page)
        finally:
            staging.unlink(missing_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"--html: {page} cannot be written: {error.strerror} (choose another name)"
        ) from error
