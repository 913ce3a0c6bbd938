"""What `lora constitution report` prints: answers side by side, and how many of them break a principle."""

from __future__ import annotations

from typing import IO, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_LONGEST = 600
"""Characters of a prompt or an answer that are shown."""


def show(said: dict[str, Any], file: IO[str]) -> None:
    """Print a report as `constitution.report` returns it."""
    console = Console(file=file, highlight=False)
    if "answers" in said:
        titles = said["titles"]
        console.print(f"{said['answers']:,} answers, {said['changed']:,} changed", markup=False)
        if said["samples"]:
            console.print(_samples(said["samples"], titles))
        _violations(console, said["violations"], titles, ("before", "after"))
    if "pairs" in said:
        pairs = said["pairs"]
        console.print(
            f"{pairs['judged']:,} pairs judged, {pairs['same_in_both_orders']:,} alike in both orders,"
            f" {pairs['ties']:,} ties",
            markup=False,
        )
        _violations(console, pairs["violations"], ["chosen", "rejected"], ("chosen", "rejected"))


def _samples(samples: list[dict[str, Any]], titles: list[str]) -> Table:
    table = Table(show_lines=True)
    for title in ("prompt", *titles):
        table.add_column(title, overflow="fold", ratio=1)
    for sample in samples:
        # Text, not markup: an answer may well hold square brackets.
        table.add_row(*(Text(_short(sample[name])) for name in ("prompt", "before", "after")))
    return table


def _violations(
    console: Console, violations: list[dict[str, Any]], titles: list[str], names: tuple[str, str]
) -> None:
    if not violations:
        console.print("no principle has a rule to count by (forbidden, not_repeated)", markup=False)
        return
    table = Table(title="answers that break a principle", title_justify="left")
    table.add_column("principle")
    for title in titles:
        table.add_column(title, justify="right")
    for one in violations:
        cells = [
            f"{one[name]:,} of {one['answers']:,} ({_part(one[name], one['answers'])})" for name in names
        ]
        table.add_row(Text(one["principle"]), *cells)
    console.print(table)


def _part(broken: int, answers: int) -> str:
    return f"{broken / answers:.1%}" if answers else "none"


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} [...]"
