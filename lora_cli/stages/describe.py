"""What the prepare stage made of the data, in numbers and rows, for `lora data`: nothing is trained, no model needed.

Everything here is read from the same caches, laid out by the same functions and in the same order as in training, so
what is shown is what is fed. The description is plain JSON values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from lora_cli.data.dataset import Dataset, overlap
from lora_cli.data.measure import as_written, begins_twice, count
from lora_cli.recipe.schema import Recipe
from lora_cli.stages._findings import findings, unlearnt
from lora_cli.stages._passes import epoch
from lora_cli.stages._rows_shown import TokenTexts, find_rows, show_rows
from lora_cli.stages._unknown import unknown
from lora_cli.types import Prepared, SourceReport

LONGEST = 5
"""Rows that are named as the longest."""
BINS = 12


def run(
    recipe: Recipe,
    prepared: Prepared,
    config: Mapping[str, Any],
    *,
    consumes: tuple[type, ...],
    device: str,
    refusals: Sequence[str] = (),
    show: int = 0,
    rows: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the description; `config` is the model's, `consumes` what the objective can learn from.

    `refusals` are what training would say before it refuses. `show` rows of the training split are shown token by
    token, and those that `rows` names as `file:line`.

    Raises:
        InputError: one of `rows` names no row that is used.
    """
    assert isinstance(prepared.train, Dataset)
    splits = {"train": prepared.train}
    if isinstance(prepared.eval, Dataset):
        splits["eval"] = prepared.eval
    text_config = _text_config(config, recipe, prepared)
    texts = TokenTexts(prepared.tokenizer)
    wanted = find_rows(splits, show, rows)
    said: dict[str, Any] = {
        "base": recipe.model.base,
        "objective": recipe.objective.name,
        "train_on": recipe.train_on(),
        "template": prepared.template,
        "max_length": recipe.data.max_length,
        "overlong": recipe.data.overlong,
        "tokens": _special(prepared, texts),
        "sources": [_source(one, prepared.train) for one in prepared.sources],
        "splits": {name: _split(recipe, split, prepared, texts) for name, split in splits.items()},
        "overlap": _overlap(splits, splits_rows=recipe.data.overlong == "split"),
        "epoch": None,
    }
    if not unlearnt(said, consumes):
        said["epoch"] = epoch(recipe, prepared.train, device)
    said["findings"] = findings(said, recipe, text_config, consumes, refusals)
    said["rows"] = show_rows(recipe, splits, wanted, prepared, texts)
    return said


def _text_config(config: Mapping[str, Any], recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    """Return the config of the language model, with the vocabulary that new tokens of the recipe make it grow to."""
    inner = config.get("text_config")
    text = dict(inner if isinstance(inner, dict) else config)
    _, new = recipe.chosen_tokens()
    if new and isinstance(text.get("vocab_size"), int):
        text["vocab_size"] = max(text["vocab_size"], len(prepared.tokenizer))
    return text


def _special(prepared: Prepared, texts: TokenTexts) -> dict[str, Any]:
    tokenizer = prepared.tokenizer
    named = {"begin": tokenizer.bos_token_id, "end": tokenizer.eos_token_id, "pad": prepared.pad_id}
    return {
        "vocabulary": len(tokenizer),
        **{name: None if i is None else texts.named(i) for name, i in named.items()},
        "terminators": [texts.named(i) for i in prepared.stop_ids],
        "pad_ends_answers": prepared.pad_id in prepared.stop_ids,
    }


def _source(source: SourceReport, train: Dataset) -> dict[str, Any]:
    part, _ = train.origins
    mine = np.array([one.key == source.key for one in train.parts])
    trained = mine[part]
    distinct = len(np.unique(train.rows[trained]))
    return asdict(source) | {
        "firsts": dict(source.firsts),
        "epoch_rows": int(trained.sum()),
        "epoch_repeats": round(int(trained.sum()) / distinct, 3) if distinct else 0.0,
    }


def _split(recipe: Recipe, split: Dataset, prepared: Prepared, texts: TokenTexts) -> dict[str, Any]:
    trained = count(split, lambda _, mask: mask)
    stops = np.array(prepared.stop_ids)
    ended = count(split, lambda ids, mask: mask & np.isin(ids, stops))
    without = np.nonzero(ended == 0)[0]
    begin = prepared.tokenizer.bos_token_id
    twice = np.nonzero(begins_twice(split, begin))[0] if begin is not None else np.empty(0, np.int64)
    order = np.argsort(-split.lengths, kind="stable")[:LONGEST]
    return {
        "rows": len(split),
        "pairs": int(np.array([one.pairs for one in split.parts])[split.origins[0]].sum()) // 2,
        "tokens": int(split.lengths.sum()),
        "trained_tokens": int(trained.sum()),
        "max_token": split.max_token,
        "lengths": _summary(split.lengths),
        "trained": _summary(trained),
        "histogram": histogram(split.lengths, trained),
        "duplicates": _duplicates(split, splits_rows=recipe.data.overlong == "split"),
        "longest": [
            {"where": split.where(row), "tokens": int(split.lengths[row]), "trained": int(trained[row])}
            for row in map(int, order)
        ],
        "without_terminator": _places(split, without),
        "begins_twice": _places(split, twice),
        "unknown": unknown(recipe.data, split, prepared, texts),
    }


def _summary(values: Any) -> dict[str, float]:
    quantiles = np.percentile(values, [0, 50, 95, 100])
    names = ("min", "median", "p95", "max")
    found = {name: float(value) for name, value in zip(names, quantiles, strict=True)}
    return found | {"mean": round(float(np.mean(values)), 2)}


def histogram(lengths: Any, trained: Any) -> dict[str, Any]:
    """Return how many rows have so many tokens, and so many trained ones: `edges` (n + 1,) and counts (n,).

    Bins are equally wide, but for the last, which holds the few rows beyond 99.5 % of them.
    """
    most = int(lengths.max())
    wide = max(1, int(np.ceil((np.percentile(lengths, 99.5) + 1) / BINS)))
    power = 10 ** (len(str(wide)) - 1)
    width = next(step * power for step in (1, 2, 5, 10) if step * power >= wide)
    edges = [*range(0, min(most, width * BINS) + 1, width)]
    edges.append(most + 1 if most + 1 - edges[-1] > width else edges[-1] + width)
    counts = {
        name: np.histogram(values, edges)[0].tolist()
        for name, values in (("tokens", lengths), ("trained", trained))
    }
    return {"edges": edges, **counts}


def _places(split: Dataset, rows: Any) -> dict[str, Any]:
    return {"rows": len(rows), "first": split.where(int(rows[0])) if len(rows) else None}


def _duplicates(split: Dataset, *, splits_rows: bool) -> dict[str, Any]:
    """Return how many rows say what an earlier one says, and the first of them beside that one."""
    rows = as_written(split, split=splits_rows)
    _, first, back = np.unique(split.identities[rows], return_index=True, return_inverse=True)
    again = np.nonzero(first[back] != np.arange(len(rows)))[0]
    found: dict[str, Any] = {"rows": len(again), "of": len(rows), "first": None, "repeats": None}
    if len(again):
        here = int(again[0])
        found |= {
            "first": split.where(int(rows[here])),
            "repeats": split.where(int(rows[first[back[here]]])),
        }
    return found


def _overlap(splits: Mapping[str, Dataset], *, splits_rows: bool) -> dict[str, Any] | None:
    """Return how many held-out rows are trained on as well, and the first of them beside that training row."""
    if "eval" not in splits:
        return None
    whole = set(as_written(splits["eval"], split=splits_rows).tolist())
    found = [pair for pair in overlap(splits["train"], splits["eval"]) if pair[0] in whole]
    first = found[0] if found else None
    return {
        "rows": len(found),
        "of": len(whole),
        "first": splits["eval"].where(first[0]) if first else None,
        "repeats": splits["train"].where(first[1]) if first else None,
    }
