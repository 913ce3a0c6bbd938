"""A first look at the data before torch is imported: wrong paths, columns and rows fail within a second."""

from __future__ import annotations

from itertools import islice
from typing import Literal

from lora_cli.data.faults import Faults
from lora_cli.data.formats import choose_format
from lora_cli.data.read import Source, find_source
from lora_cli.errors import InputError
from lora_cli.recipe.schema import Data

HEAD_ROWS = 50
"""Rows that decide the format, and that are checked before the model is loaded."""


def split_source(data: Data, split: Literal["train", "eval"]) -> Source | None:
    """Return where a split's rows come from, or None if the recipe names no such rows.

    Raises:
        InputError: if the recipe names something that is neither a readable file nor a hub id.
    """
    name = data.train if split == "train" else data.eval
    if name is None:
        return None
    return find_source(name, f"data.{split}", data.train_split if split == "train" else data.eval_split)


def check_head(data: Data, split: Literal["train", "eval"]) -> str:
    """Read and convert at most the first 50 rows of a local file, and say in one line what they are.

    Raises:
        InputError: if the split is not set, the file cannot be read, or one of these rows is bad.
    """
    key = f"data.{split}"
    source = split_source(data, split)
    if source is None:
        raise InputError(
            f"{key}: not set (name a .jsonl, .json, .csv, .parquet or .txt file, or a hub data set id)"
        )
    if source.path is None:
        return f"{key}: {source.name}: a hub data set, not checked"
    faults = Faults(source.name)
    rows = list(islice(source.rows(faults), HEAD_ROWS))
    faults.raise_if_any()
    name, read = choose_format(data, rows, key)
    for row in rows:
        try:
            read(row)
        except InputError as fault:
            faults.add(fault)
    faults.raise_if_any()
    return (
        f"{key}: {source.path.name}: {name}, first {len(rows)} rows ok"
        if len(rows) > 1
        else (f"{key}: {source.path.name}: {name}, first row ok")
    )
