"""Rows of `lora data --show`, token by token: text and id of each, and whether it is trained.

Without colour a trained token stands in brackets: `[Paris:3681]`, an untrained one without: `Paris:3681`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

BESIDE = 100
"""Columns from which the halves of a pair stand beside each other."""
_MARKS = {" ": ("·", "\\s"), "\n": ("⏎", "\\n"), "\t": ("⇥", "\\t"), "\r": ("␍", "\\r")}


def visible(text: str, ascii_only: bool) -> str:
    """Return a text on one line, with nothing in it that a terminal would obey or not show."""
    shown = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
    return shown.encode("ascii", "backslashreplace").decode() if ascii_only else shown


def token_text(text: str, ascii_only: bool) -> str:
    """Return a token's text with its white space as marks."""
    return "".join(_MARKS[one][ascii_only] if one in _MARKS else visible(one, ascii_only) for one in text)


def rows_shown(
    rows: Sequence[Mapping[str, Any]], width: int, *, ascii_only: bool
) -> Iterator[RenderableType]:
    """Yield each row: its place, and its tokens; the two halves of a pair beside each other where there is room."""
    yield Text("trained tokens are [text:id], the others text:id", style="dim")
    for row in rows:
        yield Text()
        yield _heading(row, ascii_only)
        sides = row["sides"]
        if len(sides) == 2 and width >= BESIDE:
            table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="bold")
            for side in sides:
                table.add_column(_side(side), width=width // 2 - 2, overflow="fold")
            table.add_row(*(_tokens(side["tokens"], ascii_only) for side in sides))
            yield table
            continue
        for side in sides:
            if side["name"]:
                yield Text(_side(side), style="bold")
            yield _tokens(side["tokens"], ascii_only)


def _heading(row: Mapping[str, Any], ascii_only: bool) -> Text:
    heading = Text(visible(row["where"], ascii_only), style="bold")
    tokens = [token for side in row["sides"] for token in side["tokens"]]
    trained = sum(token["trained"] for token in tokens)
    said = f"  {row['split']}, {len(tokens):,} tokens, {trained:,} trained"
    if row["wanted"] is not None:
        said += f", {'wanted' if row['wanted'] else 'not wanted'}"
    heading.append(said, style="not bold")
    return heading


def _side(side: Mapping[str, Any]) -> str:
    trained = sum(token["trained"] for token in side["tokens"])
    return f"{side['name']}: {len(side['tokens']):,} tokens, {trained:,} trained"


def _tokens(tokens: Sequence[Mapping[str, Any]], ascii_only: bool) -> Text:
    """Return tokens one after the other; a token that ends with a line break ends the line."""
    line = Text(overflow="fold")
    for token in tokens:
        text, trained = token_text(token["text"], ascii_only), token["trained"]
        style = "bold green" if trained else "magenta" if token["control"] else "dim"
        left, right = ("[", "]") if trained else ("", "")
        line.append(left + text, style=style)
        line.append(f":{token['id']}{right}", style="green" if trained else "dim")
        line.append("\n" if token["text"].endswith("\n") else " ")
    line.rstrip()
    return line
