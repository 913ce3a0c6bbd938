"""What `lora data` prints: who was read, how long rows are, what an epoch takes, findings, and rows on request."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from lora_cli.cli.data_tokens import rows_shown, visible

WIDEST, PIPED = 120, 100
"""Columns of the report at most, and where no terminal says how many there are."""
_EIGHTHS = " ▏▎▍▌▋▊▉"


class _Console(Console):
    """A console that does not end the process by itself when nobody reads any more."""

    def on_broken_pipe(self) -> None:
        """Leave it to the command.

        Raises:
            BrokenPipeError: always.
        """
        raise BrokenPipeError


def show(said: Mapping[str, Any]) -> None:
    """Print the report on stdout, in colour where that is a terminal.

    Raises:
        BrokenPipeError: nobody reads any more.
    """
    console = _Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    given = os.environ.get("COLUMNS", "")
    width = console.width if console.is_terminal or given.isdecimal() else PIPED
    console.width = max(60, min(width, WIDEST))
    for part in report(said, console.width, ascii_only=console.options.ascii_only):
        console.print(part)


def report(said: Mapping[str, Any], width: int, *, ascii_only: bool) -> Iterator[RenderableType]:
    """Yield the parts of the report."""
    yield from _head(said, ascii_only=ascii_only)
    for source in said["sources"]:
        files = source["files"]
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        yield Text(f"{source['key']}: {visible(files[0], ascii_only)}{more}", style="dim")
    yield _sources(said["sources"])
    for name, split in said["splits"].items():
        yield Text()
        yield from _split(name, split, width, ascii_only=ascii_only)
    yield Text()
    yield from _epoch(said)
    yield Text()
    yield from _findings(said["findings"], ascii_only=ascii_only)
    if said["rows"]:
        yield Text()
        yield from rows_shown(said["rows"], width, ascii_only=ascii_only)


def _head(said: Mapping[str, Any], *, ascii_only: bool) -> Iterator[Text]:
    tokens = said["tokens"]
    yield Text(visible(said["recipe"], ascii_only), style="bold")
    yield Text(
        f"base {visible(said['base'], ascii_only)}, template {said['template']}, trained: {said['train_on']}; at most"
        f" {said['max_length']:,} tokens a row, longer ones: {said['overlong']}"
    )
    ends = " ".join(_token(one, ascii_only) for one in tokens["terminators"])
    yield Text(
        f"begin {_token(tokens['begin'], ascii_only)}, pad {_token(tokens['pad'], ascii_only)},"
        f" an answer ends with {ends}"
    )
    yield Text()


def _token(token: Mapping[str, Any] | None, ascii_only: bool) -> str:
    return "none" if token is None else f"{visible(token['text'], ascii_only)} ({token['id']})"


def _table(*columns: str, left: int = 1) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_edge=False)
    for index, name in enumerate(columns):
        table.add_column(
            name, justify="left" if index < left else "right", overflow="fold", no_wrap=index >= left
        )
    return table


def _sources(sources: Sequence[Mapping[str, Any]]) -> Table:
    """Return what became of the rows of each source; columns that are empty for all are left out."""
    lost = {
        "too long": [source["too_long"] for source in sources],
        "untrained": [source["untrained"] for source in sources],
        "bad": [source["counts"]["bad"] for source in sources],
        "cut": [source["counts"]["truncated"] for source in sources],
    }
    lost = {name: numbers for name, numbers in lost.items() if any(numbers)}
    table = _table("source", "read as", "rows", "kept", *lost, "tokens", "trained", left=2)
    for index, source in enumerate(sources):
        counts = source["counts"]
        form = source["format"] + (" (detected)" if source["detected"] else "")
        numbers = [counts["rows"] + counts["bad"], counts["kept"], *(one[index] for one in lost.values())]
        numbers += [counts["tokens"], counts["trained_tokens"]]
        table.add_row(source["key"], form, *(f"{number:,}" for number in numbers))
    return table


def _split(name: str, split: Mapping[str, Any], width: int, *, ascii_only: bool) -> Iterator[RenderableType]:
    share = split["trained_tokens"] / split["tokens"]
    heading = Text(name, style="bold")
    pairs = f" ({split['pairs']:,} pairs)" if split["pairs"] else ""
    heading.append(
        f"  {split['rows']:,} rows{pairs}, {split['tokens']:,} tokens, {split['trained_tokens']:,} trained"
        f" ({share:.1%})",
        style="not bold",
    )
    yield heading
    table = _table("per row", "min", "median", "mean", "95 %", "max")
    for label, key in (("tokens", "lengths"), ("trained", "trained")):
        numbers = [split[key][one] for one in ("min", "median", "mean", "p95", "max")]
        table.add_row(label, *(f"{number:,.0f}" for number in numbers))
    yield table
    yield Text()
    yield _histogram(split["histogram"], width, ascii_only=ascii_only)
    yield Text()
    yield Text("longest rows", style="dim")
    for row in split["longest"]:
        yield Text(
            f"  {row['tokens']:,} tokens, {row['trained']:,} trained  {visible(row['where'], ascii_only)}"
        )


def _histogram(histogram: Mapping[str, Any], width: int, *, ascii_only: bool) -> Table:
    edges, tokens, trained = histogram["edges"], histogram["tokens"], histogram["trained"]
    filled = [bin for bin in range(len(tokens)) if tokens[bin] or trained[bin]]
    bar = (width - 34) // 2
    most = max(*tokens, *trained)
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", show_edge=False)
    for name, side in (("length", "right"), ("rows", "right"), ("by tokens", "left")):
        table.add_column(name, justify=side, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("by trained tokens", justify="left", no_wrap=True)
    for bin in range(filled[0], filled[-1] + 1):
        low, high = edges[bin], edges[bin + 1] - 1
        cells: list[RenderableType] = [str(low) if low == high else f"{low}-{high}"]
        for counts, style in ((tokens, "cyan"), (trained, "green")):
            cells += [f"{counts[bin]:,}", Text(_bar(counts[bin] / most, bar, ascii_only), style=style)]
        table.add_row(*cells)
    return table


def _bar(share: float, width: int, ascii_only: bool) -> str:
    """Return a bar; what is not nothing shows."""
    if ascii_only:
        return "#" * max(round(share * width), share > 0)
    eighths = max(round(share * width * 8), int(share > 0))
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _epoch(said: Mapping[str, Any]) -> Iterator[Text]:
    epoch = said["epoch"]
    if epoch is None:
        return
    line = Text("epoch", style="bold")
    line.append(f"  {epoch_line(epoch)}", style="not bold")
    yield line


def epoch_line(epoch: Mapping[str, Any]) -> str:
    """Return what an epoch takes."""
    packed, padded = epoch["packed"], epoch["padded"]
    line = (
        f"{epoch['tokens']:,} tokens in {_number(epoch['steps'], 'step')} of {epoch['batch_size']} rows; the run has"
        f" {_number(epoch['total_steps'], 'step')}. On {epoch['device']}, in passes of at most"
        f" {epoch['pass_tokens']:,} tokens: "
    )
    plain = f"{_number(padded['passes'], 'padded pass')}, {padded['padding']:.1%} padding"
    if packed is None:
        return line + plain
    line += f"{_number(packed['passes'], 'packed pass')}, {packed['filled']:.1%} full"
    return line if epoch["packing"] is True else f"{line} (where the model cannot pack: {plain})"


def _number(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "es" if what.endswith("s") else "s")


def _findings(findings: Sequence[Mapping[str, Any]], *, ascii_only: bool) -> Iterator[RenderableType]:
    if not findings:
        yield Text("nothing to warn of", style="bold green")
        return
    for finding in findings:
        warns = finding["level"] == "warning"
        table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), show_edge=False)
        table.add_column(width=7, no_wrap=True)
        table.add_column(overflow="fold")
        what = Text(visible(finding["what"], ascii_only))
        if finding["where"]:
            what.append(f"\nfirst: {visible(finding['where'], ascii_only)}", style="dim")
        what.append(f"\n-> {finding['remedy']}", style="dim")
        table.add_row(Text(finding["level"], style="bold yellow" if warns else "cyan"), what)
        yield table
