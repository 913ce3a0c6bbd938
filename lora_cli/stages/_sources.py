"""What the prepare stage reports of each source of rows."""

from __future__ import annotations

from collections.abc import Sequence

from lora_cli.data.dataset import CachedPart
from lora_cli.data.faults import SHOWN
from lora_cli.data.fit import Tally
from lora_cli.data.head import Origin
from lora_cli.data.tokenize import Reading
from lora_cli.types import SourceReport


def report(
    origin: Origin, reading: Reading, parts: Sequence[CachedPart], tally: Tally, *, detected: bool
) -> SourceReport:
    """Return how the rows of an origin were read, and what became of them; `tally` is that of all its parts."""
    firsts: dict[str, str] = {}
    for part in parts:
        for kind, line in part.cache.meta["first lines"].items():
            if kind != "longest" or part.cache.meta["tally"]["longest"] == tally.longest:
                firsts.setdefault(kind, part.where(line))
    return SourceReport(
        key=origin.key,
        files=tuple(source.name for source in origin.sources),
        format=reading.format,
        detected=detected,
        kind=reading.kind,
        counts=tally.counts(),
        too_long=tally.too_long,
        untrained=tally.untrained,
        longest=tally.longest,
        firsts=firsts,
        bad_lines=tuple(line for part in parts for line in part.cache.meta["bad lines"])[:SHOWN],
    )
