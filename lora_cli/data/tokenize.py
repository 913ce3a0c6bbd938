"""Parts of files -> token caches, in as many processes as there are cores.

A large file of lines is cut into parts of PART_BYTES. Each part has a cache of its own, named after all that decides
its content, so an interrupted preparation goes on where it stood, and a file that has grown is tokenized from the part
on that changed. Rows are streamed, so that memory does not grow with the file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lora_cli.data.cache import CacheWriter, fingerprint
from lora_cli.data.faults import Faults
from lora_cli.data.fields import fields_reader
from lora_cli.data.fit import Tally, fit
from lora_cli.data.formats import FORMATS
from lora_cli.data.hub import load_hub
from lora_cli.data.lines import WHOLE, Part
from lora_cli.data.read import RawRow, Source
from lora_cli.data.render import Renderer
from lora_cli.data.tokens import Encoder, backend_json
from lora_cli.errors import InputError, LoraError
from lora_cli.recipe.data_block import Data, Fields
from lora_cli.types import Conversation, Example, Labelled, Pair, Row, Text

CHUNK_ROWS, CHUNK_CHARACTERS = 512, 1_000_000
"""Most that is rendered and encoded together: enough to keep all cores busy, little enough to hold in memory (an
encoded token takes about 100 bytes until it is written)."""
PART_BYTES = 32 * 2**20
_NOTED = ("too_long", "untrained", "truncated")
"""Counts of the tally whose first row is noted."""

_WRITTEN = json.JSONEncoder(sort_keys=True, ensure_ascii=False)

_KINDS: dict[type[Row], str] = {
    Pair: "preference pairs",
    Labelled: "labelled answers",
    Text: "texts",
    Conversation: "conversations",
}

_Chunk = list[tuple[RawRow, Row]]


@dataclass(frozen=True, slots=True)
class Reading:
    """How the rows of a source are read: by a format of the table, or by templates."""

    format: str
    fields: Fields | None = None

    @property
    def makes(self) -> type[Row]:
        """What a row becomes."""
        return Conversation if self.fields else FORMATS[self.format].makes

    @property
    def kind(self) -> str:
        """What its rows are called."""
        return _KINDS[self.makes]

    def reader(self) -> Callable[[RawRow], Row]:
        """Return the function that reads a row."""
        return fields_reader(self.fields) if self.fields else FORMATS[self.format].read


@dataclass(frozen=True, slots=True)
class Task:
    """A part of a source that is tokenized into `folder`, whose cache is called `name`."""

    source: Source
    part: Part
    reading: Reading
    max_rows: int | None
    folder: Path
    name: str
    content: str
    """What identifies the bytes of the part."""
    state: tuple[int, int] | None
    """The file's size and time of change (ns) when `name` was made of its content."""


@dataclass(slots=True)
class Outcome:
    """What became of a task: the bad rows it met, and the fault that ended it, if any."""

    tally: Tally
    bad_lines: list[str]
    fault: LoraError | None = None


def parts_of(source: Source, *, whole: bool) -> list[tuple[Part, str]]:
    """Return the parts of a source, or it as a whole, and what identifies each one's content.

    Raises:
        InputError: if it cannot be read.
    """
    if source.path is None:
        data = load_hub(source.name, source.split, source.revision)
        return [(WHOLE, f"{source.name} {source.split} {data._fingerprint}")]
    ending = "".join(source.path.suffixes[-2:]).lower()
    try:
        with source.path.open("rb") as file:
            if whole or not source.can_be_parted() or source.path.stat().st_size <= PART_BYTES:
                return [(WHOLE, f"{ending} {hashlib.file_digest(file, 'sha256').hexdigest()}")]
            found, start, line = [], 0, 1
            while block := file.read(PART_BYTES):
                block += file.readline()
                end = start + len(block)
                found.append((Part(start, end, line), f"{ending} {hashlib.sha256(block).hexdigest()}"))
                start, line = end, line + block.count(b"\n")
            return found
    except OSError as error:
        raise InputError(f"{source.name}: cannot be read: {error.strerror or error}") from error


def identity(row: Row) -> int:
    """Return a hash of what a row says, below 2**64: equal for equal rows, wherever they stand."""
    if isinstance(row, Text):
        said: Any = row.text
    elif isinstance(row, Pair):
        said = [_said(row.chosen), _said(row.rejected)]
    elif isinstance(row, Labelled):
        said = [_said(row.conversation), row.wanted]
    else:
        said = _said(row)
    text = _WRITTEN.encode(said)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _said(row: Conversation) -> list[Any]:
    turns = [[turn.role, turn.content, *([dict(turn.extra)] if turn.extra else [])] for turn in row.messages]
    return [turns, *([list(row.tools)] if row.tools else [])]


class Tokenization:
    """Tokenizes parts by one tokenizer and one set of the recipe's keys."""

    def __init__(
        self, data: Data, train_on: str, tokenizer: Any, template: str, spelled: Sequence[str] = ()
    ) -> None:
        self.data, self.train_on, self.tokenizer, self.template = data, train_on, tokenizer, template
        self.spelled = tuple(spelled)
        self._settings: dict[str, str] = {}
        self._tools: dict[str, tuple[Renderer, Encoder]] = {}

    def name(self, reading: Reading, content: str, max_rows: int | None) -> str:
        """Return the fingerprint of all that decides the tokens of a part."""
        if not self._settings:
            self._settings = {
                "tokenizer": hashlib.sha256(backend_json(self.tokenizer).encode()).hexdigest(),
                "special tokens": repr(sorted(self.tokenizer.special_tokens_map.items())),
                "chat template": repr(self.tokenizer.chat_template),
                "template": f"{self.template} {self.train_on}",
                "spelled": repr(sorted(self.spelled)),
                "length": f"{self.data.max_length} {self.data.overlong}",
            }
        own = {"data": content, "format": f"{reading.format} {reading.fields!r}", "rows": repr(max_rows)}
        return fingerprint(self._settings | own)

    def run(self, task: Task) -> Outcome:
        """Tokenize a part and publish its cache, unless a bad row or a fault stands against it."""
        tally, faults = Tally(), Faults(task.source.name)
        firsts: dict[str, int] = {}
        try:
            with CacheWriter(task.folder, task.name) as writer:
                for raw, row, value, examples in self._examples(task, faults):
                    line, longest = raw.number - task.part.first_line + 1, tally.longest
                    for example in fit(examples, raw.where, self.data, tally, faults):
                        writer.add(example, line, row, value)
                    for kind in _NOTED:
                        if kind not in firsts and getattr(tally, kind):
                            firsts[kind] = line
                    if tally.longest > longest:
                        firsts["longest"] = line
                tally.bad = faults.count
                if file_state(task.source) != task.state:
                    raise InputError(f"{task.source.name}: changed while it was read (start again)")
                if self.data.on_bad_row == "skip" or not faults.count:
                    bad = _without_place(faults.lines, task)
                    writer.publish({"tally": asdict(tally), "bad lines": bad, "first lines": firsts})
        except LoraError as fault:
            return Outcome(tally, faults.lines, fault)
        return Outcome(tally, faults.lines)

    def _examples(self, task: Task, faults: Faults) -> Iterator[tuple[RawRow, int, float, list[Example]]]:
        """Yield each row with its identity, its value and what it becomes: a pair two examples, all others one."""
        # What is preferred or wanted is the answer, never the turns before it.
        answers = task.reading.makes in (Pair, Labelled)
        train_on = "completion" if answers else self.train_on
        if (
            train_on not in self._tools
        ):  # half a second for a large vocabulary, so only where rows must be tokenized
            made = Renderer(self.tokenizer, self.template, train_on, self.spelled)
            self._tools[train_on] = made, Encoder(self.tokenizer, made.controls)
        renderer, encoder = self._tools[train_on]
        raw_rows = islice(task.source.rows(faults, task.part), task.max_rows)
        # The tokenizer does not need Python: while it encodes one chunk, the masks of the one before are made,
        # and the next one is read and rendered.
        with ThreadPoolExecutor(2) as pool:
            waiting: deque[tuple[_Chunk, list[int], Future[list[Example]]]] = deque()
            for chunk in _chunks(raw_rows, task.reading, faults):
                single = [(index, one) for index, (_, row) in enumerate(chunk) for one in _conversations(row)]
                bad = faults.count
                rendered = renderer.render([one for _, one in single], faults)
                # A pair is one row, though both of its answers may be refused.
                faults.count = bad + len(
                    {index for (index, _), text in zip(single, rendered, strict=True) if text is None}
                )
                good = [(index, text) for (index, _), text in zip(single, rendered, strict=True) if text]
                future = pool.submit(encoder.encode, [text for _, text in good])
                waiting.append((chunk, [index for index, _ in good], future))
                if len(waiting) > 2:
                    yield from _whole_rows(*waiting.popleft())
            for entry in waiting:
                yield from _whole_rows(*entry)


def _whole_rows(
    chunk: _Chunk, rows: list[int], encoded: Future[list[Example]]
) -> Iterator[tuple[RawRow, int, float, list[Example]]]:
    """Yield each row of a chunk of which everything was rendered; `rows[i]` is whose the i-th encoded text is."""
    found: dict[int, list[Example]] = {}
    for index, example in zip(rows, encoded.result(), strict=True):
        found.setdefault(index, []).append(example)
    for index, (raw, row) in enumerate(chunk):
        examples = found.get(index, [])
        if len(examples) == len(_conversations(row)):
            yield raw, identity(row), _value(row), examples


def _value(row: Row) -> float:
    """Return what a row says of its answers: 1 or 0 if it is wanted or not, a pair's margin; NaN for nothing."""
    if isinstance(row, Labelled):
        return float(row.wanted)
    return math.nan if not isinstance(row, Pair) or row.margin is None else row.margin


def _without_place(lines: Sequence[str], task: Task) -> list[tuple[int, str]]:
    """Return messages of bad rows as (line of the part, rest): an equal part may stand elsewhere, in another file."""
    prefix = f"{task.source.name}{task.source.separator}"
    apart = [line.removeprefix(prefix).partition(":") for line in lines]
    return [(int(number) - task.part.first_line + 1, rest) for number, _, rest in apart]


def _conversations(row: Row) -> tuple[Conversation | Text, ...]:
    """Return what is rendered of a row."""
    if isinstance(row, Pair):
        return row.chosen, row.rejected
    return (row.conversation,) if isinstance(row, Labelled) else (row,)


def _chunks(raw_rows: Iterable[RawRow], reading: Reading, faults: Faults) -> Iterator[_Chunk]:
    """Yield rows as they are read, in pieces of bounded size; a row that cannot be read joins the faults."""
    read = reading.reader()
    chunk: _Chunk = []
    characters = 0
    for raw in raw_rows:
        try:
            row = read(raw)
        except InputError as fault:
            faults.add(fault)
            continue
        chunk.append((raw, row))
        for one in _conversations(row):
            texts = (one.text,) if isinstance(one, Text) else (turn.content for turn in one.messages)
            characters += sum(map(len, texts))
        if len(chunk) >= CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def file_state(source: Source) -> tuple[int, int] | None:
    """Return a file's size and time of change, nothing for a data set of the hub or a file that is gone."""
    try:
        stat = source.path.stat() if source.path is not None else None
    except OSError:
        return None
    return (stat.st_size, stat.st_mtime_ns) if stat is not None else None
