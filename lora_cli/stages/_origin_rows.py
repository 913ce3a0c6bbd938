"""An origin of rows on its way to tokens: its parts, their caches, and what the user is told of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lora_cli.data.cache import TokenCache
from lora_cli.data.dataset import CachedPart, Indices
from lora_cli.data.faults import SHOWN
from lora_cli.data.fit import Tally
from lora_cli.data.head import Origin
from lora_cli.data.read import Source
from lora_cli.data.tokenize import Reading, Task, Tokenization
from lora_cli.errors import InputError
from lora_cli.recipe.schema import Data
from lora_cli.types import SourceReport


@dataclass(slots=True)
class Job:
    """One origin of rows: how it is read, and its parts with their caches."""

    origin: Origin
    reading: Reading
    detected: bool
    tasks: list[tuple[Source, Task]] = field(default_factory=list)
    parts: list[CachedPart] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    bad_lines: list[str] = field(default_factory=list)
    """Messages of the first bad rows that were skipped."""

    def open(self) -> None:
        """Open the caches, unless they are open.

        Raises:
            InputError: if one is not there any more.
        """
        if self.parts:
            return
        try:
            self.parts = [
                CachedPart(
                    TokenCache(task.folder, check=False),
                    source.name,
                    source.separator,
                    task.part.first_line - 1,
                    self.origin.key,
                    self.reading.kind == "preference pairs",
                )
                for source, task in self.tasks
            ]
        except ValueError as error:
            raise InputError(
                f"{error} (the token cache disappeared while it was used; start again)"
            ) from error
        self.tally = sum((Tally(**part.cache.meta["tally"]) for part in self.parts), Tally())
        self.bad_lines = [
            f"{part.where(number)}:{rest}"
            for part in self.parts
            for number, rest in part.cache.meta["bad lines"]
        ][:SHOWN]

    def rows(self) -> Indices:
        """Return which rows of the parts are used, (R,): all, or those that the first `max_rows` became.

        Of one source no more rows were read than that; of several, each may hold so many.
        """
        left = self.origin.max_rows
        used, before = [], 0
        for part in self.parts:
            lines = part.cache.lines
            if left is not None and len(self.parts) > 1:
                first = np.unique(lines)[:left]  # a long row may have been split, a pair is two
                lines = lines[np.isin(lines, first)]
                left -= len(first)
            used.append(before + np.arange(len(lines)))
            before += len(part.cache)
        return np.concatenate(used)


def too_many(job: Job, data: Data) -> str:
    """Return what is wrong with an origin that has too many bad rows."""
    total = job.tally.rows + job.tally.bad
    return (
        f"{job.origin.key}: {job.tally.bad} of {total} rows are bad, more than data.max_bad_rows"
        f" {data.max_bad_rows:g} allows (mend them, or raise it)"
    )


def nothing_left(job: Job, data: Data) -> str:
    """Return why no row of an origin can be used."""
    tally, place = job.tally, f"{job.origin.key}: {job.origin.title}"
    if tally.longest > data.max_length:
        remedy = "raise it, or let data.overlong truncate" if data.overlong == "drop" else "raise it"
        return (
            f"{place}: none of {tally.rows} rows can be used with data.max_length {data.max_length}: the longest has"
            f" {tally.longest} tokens ({remedy})"
        )
    return f"{place}: none of {tally.rows} rows has a token to train"


def line(job: Job, tokenization: Tokenization, took: str) -> str:
    """Return what became of the rows of an origin."""
    tally, most = job.tally, tokenization.data.max_length
    parts = [f"{tally.kept:,} of {tally.rows + tally.bad:,} rows kept"]
    if tally.bad:
        parts.append(f"{tally.bad:,} bad ones skipped (first: {job.bad_lines[0]})")
    if tally.too_long:
        parts.append(f"{tally.too_long:,} dropped (longer than {most} tokens)")
    if tally.untrained:
        parts.append(f"{tally.untrained:,} dropped (nothing to train)")
    if tally.truncated:
        how = "split" if tokenization.data.overlong == "split" else "truncated"
        parts.append(f"{tally.truncated:,} {how} to {most} tokens")
    parts.append(f"{tally.tokens:,} tokens, {tally.trained_tokens:,} trained")
    if tally.lost_trained_tokens:
        parts.append(f"{tally.lost_trained_tokens:,} trained tokens lost")
    template = "untemplated" if job.reading.format == "text" else f"template {tokenization.template}"
    form = f"{job.reading.format}{' (detected)' if job.detected else ''}"
    return f"{job.origin.key}: {job.origin.title}: {form}, {template}: {', '.join(parts)}; {took}"


def report(job: Job) -> SourceReport:
    """Return how the rows of an origin were read, and what became of them."""
    firsts: dict[str, str] = {}
    for part in job.parts:
        for kind, number in part.cache.meta["first lines"].items():
            if kind != "longest" or part.cache.meta["tally"]["longest"] == job.tally.longest:
                firsts.setdefault(kind, part.where(number))
    return SourceReport(
        key=job.origin.key,
        files=tuple(source.name for source in job.origin.sources),
        format=job.reading.format,
        detected=job.detected,
        kind=job.reading.kind,
        counts=job.tally.counts(),
        too_long=job.tally.too_long,
        untrained=job.tally.untrained,
        longest=job.tally.longest,
        firsts=firsts,
        bad_lines=tuple(job.bad_lines),
    )
