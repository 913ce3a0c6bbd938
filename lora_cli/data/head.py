"""A first look at the data before torch is imported: wrong paths, columns and rows fail within a second."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Literal

from lora_cli.data.faults import Faults
from lora_cli.data.formats import choose_format
from lora_cli.data.read import Source, find_sources
from lora_cli.errors import InputError
from lora_cli.recipe.schema import Data, DataSource, Fields

HEAD_ROWS = 50
"""Rows that decide the format, and that are checked before the model is loaded."""
HEAD_FILES = 20
"""Files of an origin whose first rows are checked."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Rows that are read in one way: a split of the recipe, or one of its sources; `key` is where it was written."""

    key: str
    sources: tuple[Source, ...]
    format: str
    fields: Fields | None
    max_rows: int | None
    weight: float | None = None

    @property
    def title(self) -> str:
        """What it is called in messages: the file's name, or how many there are."""
        first = self.sources[0]
        name = first.path.name if first.path else first.name
        return name if len(self.sources) == 1 else f"{name} and {len(self.sources) - 1} more"


def origins(data: Data, split: Literal["train", "eval"]) -> list[Origin]:
    """Return where a split's rows come from; nothing if the recipe names no such rows.

    Raises:
        InputError: if the recipe names something that is neither a readable file nor a hub id.
    """
    if split == "train" and data.sources:
        return [_named(name, one, data) for name, one in data.sources.items()]
    names = data.train if split == "train" else data.eval
    if names is None:
        return []
    of_hub = data.train_split if split == "train" else data.eval_split
    sources = find_sources(names, f"data.{split}", of_hub, data.revision)
    most = data.max_train_rows if split == "train" else data.max_eval_rows
    return [Origin(f"data.{split}", tuple(sources), data.format, data.fields, most)]


def _named(name: str, source: DataSource, data: Data) -> Origin:
    key = f"data.sources.{name}"
    sources = find_sources(source.path, f"{key}.path", source.split or data.train_split, data.revision)
    return Origin(key, tuple(sources), source.format, source.fields, source.max_rows, source.weight)


def check_head(data: Data, split: Literal["train", "eval"]) -> list[str]:
    """Read and convert at most the first 50 rows of each file, and say in a line for each origin what they are.

    Raises:
        InputError: if the split is not set, a file cannot be read, or one of these rows is bad.
    """
    found = origins(data, split)
    if not found:
        raise InputError(
            f"data.{split}: not set (name a .jsonl, .json, .csv, .parquet or .txt file, or a hub data set id)"
        )
    return [_check(origin, skips=data.on_bad_row == "skip") for origin in found]


def _check(origin: Origin, *, skips: bool) -> str:
    names, checked = [], 0
    faults = Faults(origin.key)
    for source in origin.sources[:HEAD_FILES]:
        if source.path is None:
            return f"{origin.key}: {source.name}: a hub data set, not checked"
        own = Faults(source.name)
        rows = list(islice(source.rows(own), HEAD_ROWS))
        if not skips or not rows:
            own.raise_if_any()
        name, read = choose_format(origin.format, origin.fields, rows, origin.key, skips=skips)
        names.append(name)
        if name != names[0]:
            raise InputError(
                f"{origin.key}: {source.name} is {name}, {origin.sources[0].name} is {names[0]} (name each kind as a"
                " source of its own in data.sources)"
            )
        for row in rows:
            try:
                read(row)
            except InputError as fault:
                faults.add(fault)
        checked += len(rows)
    if not skips:
        faults.raise_if_any()
    what = "first row ok" if checked == 1 else f"first {checked} rows ok"
    return f"{origin.key}: {origin.title}: {names[0]}, {what}"


def has_conversations(data: Data) -> bool:
    """Say whether the first rows of a local origin are rendered by a chat template; not, where they cannot be read."""
    splits: tuple[Literal["train", "eval"], ...] = ("train", "eval")
    try:
        for origin in (one for split in splits for one in origins(data, split)):
            source = origin.sources[0]
            if source.path is not None:
                rows = list(islice(source.rows(Faults(source.name)), HEAD_ROWS))
                if rows and choose_format(origin.format, origin.fields, rows, origin.key)[0] != "text":
                    return True
    except (InputError, OSError):
        pass  # what is wrong with them is told by `check_head`
    return False
