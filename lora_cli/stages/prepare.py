"""Stage 1: rows -> conversations -> text -> tokens and trained mask -> a memory-mapped data set.

The main process tokenizes a split, unless a cache of the same content exists; the others wait and open it.
Rows are streamed in chunks, so memory does not grow with the file. Bad rows stop the stage with the first
five of them named, and leave no cache behind.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

from lora_cli.data.cache import CacheWriter, TokenCache, cache_root, fingerprint
from lora_cli.data.faults import Faults
from lora_cli.data.fit import Tally, fit
from lora_cli.data.formats import choose_format
from lora_cli.data.head import HEAD_ROWS, split_source
from lora_cli.data.hub import load_hub
from lora_cli.data.read import RawRow, Source
from lora_cli.data.render import Renderer, choose_template, settle_special_tokens
from lora_cli.data.tokens import Encoder, backend_json
from lora_cli.errors import InputError
from lora_cli.recipe.schema import Data
from lora_cli.types import Example, Prepared, Row, Text

CHUNK_ROWS, CHUNK_CHARACTERS = 512, 1_000_000
"""Most that is rendered and encoded together: enough to keep all cores busy, little enough to hold in memory (an
encoded token takes about 100 bytes until it is written)."""

Split = Literal["train", "eval"]


class Processes(Protocol):
    """What this stage needs to know of the runtime."""

    def in_main(self, work: Callable[[], None]) -> None: ...


@dataclass(frozen=True, slots=True)
class _Job:
    """One split to prepare."""

    split: Split
    source: Source
    format: str
    read: Callable[[RawRow], Row]
    max_rows: int | None


def run(
    data: Data,
    train_on: str,
    tokenizer: Any,
    rt: Processes,
    log: Callable[[str], None],
    *,
    need_train: bool = True,
    spelled: Sequence[str] = (),
) -> Prepared:
    """Prepare the recipe's splits; without `need_train` only the held-out one.

    `tokenizer` is a transformers fast tokenizer, left as it is; `log` receives one line per split. `spelled` are
    control tokens that a message may hold; other ones in it are ordinary text.

    Raises:
        InputError: if a split that is needed is not set, cannot be read, has bad rows, or none to train on.
        ResourceError: if the cache does not fit on the disk.
    """
    jobs = _find_jobs(data, need_train=need_train)
    # Text rows are never templated, so for them a template without terminator is no fault.
    templated = any(job.format != "text" for job in jobs)
    template = choose_template(tokenizer, data.template) if templated else "plain"
    pad_id, stop_ids = settle_special_tokens(tokenizer, template)
    worker = _Worker(data, train_on, tokenizer, template, tuple(spelled))
    folders = {job.split: worker.folder(job) for job in jobs}

    def build() -> None:
        for job in jobs:
            worker.ensure(job, log)

    rt.in_main(build)
    opened = {split: _open(folder) for split, folder in folders.items()}
    return Prepared(
        train=opened.get("train"),
        eval=opened.get("eval"),
        tokenizer=tokenizer,
        pad_id=pad_id,
        stop_ids=stop_ids,
        formats={job.split: job.format for job in jobs},
        template=template,
        counts={split: Tally(**cache.meta["tally"]).counts() for split, cache in opened.items()},
    )


def _find_jobs(data: Data, *, need_train: bool) -> list[_Job]:
    jobs: list[_Job] = []
    splits: tuple[Split, ...] = ("train", "eval") if need_train else ("eval",)
    for split in splits:
        source = split_source(data, split)
        if source is None:
            if split == splits[0]:
                raise InputError(f"data.{split}: not set (name a file or a hub data set)")
            continue
        faults = Faults(source.name)
        head = list(islice(source.rows(faults), HEAD_ROWS))
        if not head:
            faults.raise_if_any()
        name, read = choose_format(data, head, f"data.{split}")
        jobs.append(
            _Job(split, source, name, read, data.max_train_rows if split == "train" else data.max_eval_rows)
        )
    return jobs


def _open(folder: Path) -> TokenCache:
    try:
        return TokenCache(folder, check=False)
    except ValueError as error:
        raise InputError(f"{folder}: the token cache disappeared while it was used (start again)") from error


@dataclass(slots=True)
class _Worker:
    """The settings that all splits share."""

    data: Data
    train_on: str
    tokenizer: Any
    template: str
    spelled: tuple[str, ...]
    _tokenizer_parts: dict[str, str] = field(default_factory=dict)
    _names: dict[Split, str] = field(default_factory=dict)
    _tools: tuple[Renderer, Encoder] | None = None

    def name(self, job: _Job) -> str:
        """Return the fingerprint of all that decides the split's tokens."""
        if not self._tokenizer_parts:
            self._tokenizer_parts = {
                "tokenizer": hashlib.sha256(backend_json(self.tokenizer).encode()).hexdigest(),
                "special tokens": repr(sorted(self.tokenizer.special_tokens_map.items())),
                "chat template": repr(self.tokenizer.chat_template),
            }
        if job.split not in self._names:
            self._names[job.split] = fingerprint(
                self._tokenizer_parts
                | {
                    "data": _content(job.source),
                    "format": f"{job.format} {self.data.fields!r}",
                    "template": f"{self.template} {self.train_on}",
                    "spelled": repr(sorted(self.spelled)),
                    "length": f"{self.data.max_length} {self.data.overlong}",
                    "rows": repr(job.max_rows),
                }
            )
        return self._names[job.split]

    def folder(self, job: _Job) -> Path:
        """Return where the split's cache is or will be."""
        return cache_root() / self.name(job)[:32]

    def ensure(self, job: _Job, log: Callable[[str], None]) -> None:
        """Build the split's cache unless a sound one is there, and log what it holds."""
        began = time.monotonic()
        folder = self.folder(job)
        try:
            cache, origin = TokenCache(folder, check=True), "cached"
        except ValueError:
            self._build(job, folder)
            cache, origin = _open(folder), f"{time.monotonic() - began:.1f} s"
        log(self._line(job, Tally(**cache.meta["tally"]), origin))

    def _build(self, job: _Job, folder: Path) -> None:
        tally = Tally()
        faults = Faults(job.source.name)
        before = _state(job.source)
        with CacheWriter(folder, self.name(job)) as writer:
            for raw, example in self._examples(job, faults):
                kept = fit(example, raw.where, self.data, tally, faults)
                if kept is not None:
                    writer.add(kept, raw.number)
            faults.raise_if_any()
            if _state(job.source) != before:
                raise InputError(f"{job.source.name}: changed while it was read (start again)")
            if not tally.kept:
                raise InputError(self._nothing_left(job, tally))
            writer.publish({"tally": asdict(tally)})

    def _examples(self, job: _Job, faults: Faults) -> Iterator[tuple[RawRow, Example]]:
        if self._tools is None:  # half a second for a large vocabulary, so only where rows must be tokenized
            renderer = Renderer(self.tokenizer, self.template, self.train_on, self.spelled)
            self._tools = renderer, Encoder(self.tokenizer, renderer.controls)
        renderer, encoder = self._tools
        for pairs in _chunks(islice(job.source.rows(faults), job.max_rows), job.read, faults):
            rendered = renderer.render([row for _, row in pairs], faults)
            good = [(raw, text) for (raw, _), text in zip(pairs, rendered, strict=True) if text is not None]
            yield from zip((raw for raw, _ in good), encoder.encode([text for _, text in good]), strict=True)

    def _nothing_left(self, job: _Job, tally: Tally) -> str:
        if tally.longest > self.data.max_length:
            remedy = (
                "raise it" if self.data.overlong == "truncate" else "raise it, or let data.overlong truncate"
            )
            return (
                f"data.{job.split}: {job.source.name}: none of {tally.rows} rows can be used with "
                f"data.max_length {self.data.max_length}: the longest has {tally.longest} tokens ({remedy})"
            )
        return f"data.{job.split}: {job.source.name}: none of {tally.rows} rows has a token to train"

    def _line(self, job: _Job, tally: Tally, origin: str) -> str:
        detected = " (detected)" if self.data.format == "auto" and self.data.fields is None else ""
        template = "untemplated" if job.format == "text" else f"template {self.template}"
        parts = [f"{tally.kept:,} of {tally.rows:,} rows kept"]
        if tally.too_long:
            parts.append(f"{tally.too_long:,} dropped (longer than {self.data.max_length} tokens)")
        if tally.untrained:
            parts.append(f"{tally.untrained:,} dropped (nothing to train)")
        if tally.truncated:
            parts.append(f"{tally.truncated:,} truncated to {self.data.max_length} tokens")
        parts.append(f"{tally.tokens:,} tokens, {tally.trained_tokens:,} trained")
        if tally.lost_trained_tokens:
            parts.append(f"{tally.lost_trained_tokens:,} trained tokens lost")
        name = job.source.path.name if job.source.path else job.source.name
        return f"data.{job.split}: {name}: {job.format}{detected}, {template}: {', '.join(parts)}; {origin}"


def _chunks(
    raw_rows: Iterator[RawRow], read: Callable[[RawRow], Row], faults: Faults
) -> Iterator[list[tuple[RawRow, Row]]]:
    """Yield rows as they are read, in pieces of bounded size; a row that cannot be read joins the faults."""
    chunk: list[tuple[RawRow, Row]] = []
    characters = 0
    for raw in raw_rows:
        try:
            row = read(raw)
        except InputError as fault:
            faults.add(fault)
            continue
        chunk.append((raw, row))
        characters += len(row.text) if isinstance(row, Text) else sum(len(m.content) for m in row.messages)
        if len(chunk) >= CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _content(source: Source) -> str:
    """Return what identifies the source's content."""
    if source.path is None:
        return f"{source.name} {source.split} {load_hub(source.name, source.split)._fingerprint}"
    try:
        with source.path.open("rb") as file:
            return f"{source.path.suffix.lower()} {hashlib.file_digest(file, 'sha256').hexdigest()}"
    except OSError as error:
        raise InputError(f"{source.name}: cannot be read: {error.strerror or error}") from error


def _state(source: Source) -> tuple[int, int] | None:
    if source.path is None:
        return None
    stat = source.path.stat()
    return stat.st_size, stat.st_mtime_ns
