"""Which rank, which alpha, and which decoder layers: choices by the path of a module, with PEFT's matching rule.

A pattern is a regular expression that must reach the end of the path and begin at its start or after a dot; of
several that match, the first counts. PEFT sorts its patterns when it saves, which `lasting` makes harmless.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from lora_cli.adapters._targets import fully_matches
from lora_cli.errors import InputError

Value = TypeVar("Value", int, float)


def value_at(patterns: Mapping[str, Value], path: str, default: Value) -> Value:
    """Return the value of the first pattern that matches `path`, else `default`."""
    pattern = _first_match(patterns, path)
    return default if pattern is None else patterns[pattern]


def require_used(patterns: Mapping[str, object], paths: Sequence[str], where: str) -> None:
    """Refuse a pattern that decides nothing about the adapted modules.

    Raises:
        InputError: it matches none of `paths`, or only such as an earlier pattern has matched.
    """
    used = {_first_match(patterns, path) for path in paths}
    for pattern in patterns:
        if pattern in used:
            continue
        if any(_first_match({pattern: None}, path) for path in paths):
            raise InputError(
                f"{where}: {pattern!r} comes after patterns that match all it does (put it first)"
            )
        names = sorted({path.rpartition(".")[2] for path in paths})
        near = difflib.get_close_matches(pattern, [*names, *paths], n=1)
        hint = f"did you mean {near[0]}?" if near else f"they end in {', '.join(names)}"
        raise InputError(f"{where}: {pattern!r} matches none of the adapted modules ({hint})")


def is_pattern(value: object, holds: Callable[[object], bool]) -> bool:
    """Say whether a JSON value is nothing, or a mapping of regular expressions to values for which `holds`."""
    if not isinstance(value, dict):
        return value is None
    try:
        for pattern in value:
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return all(map(holds, value.values()))


def lasting(patterns: Mapping[str, Value], paths: Sequence[str]) -> dict[str, Value]:
    """Return patterns of the same meaning in sorted order; where sorting would change it, one per whole path."""
    ordered = dict(sorted(patterns.items()))
    chosen = {path: _first_match(patterns, path) for path in paths}
    if all(_first_match(ordered, path) == pattern for path, pattern in chosen.items()):
        return ordered
    return {re.escape(path): patterns[pattern] for path, pattern in chosen.items() if pattern is not None}


def shared_out(
    ranks: Mapping[str, int],
    before: Mapping[str, int],
    rank: int,
    alpha: float,
    alpha_of: Callable[[str], float],
    rslora: bool,
) -> tuple[dict[str, int], dict[str, float]]:
    """Return the patterns of ranks and alphas that give each path its new rank and leave its update's scale as it was.

    `rank` and `alpha` are what no pattern is needed for; a path of rank 0 has none.
    """
    alphas = {
        path: alpha_of(path) * (math.sqrt(new / before[path]) if rslora else new / before[path])
        for path, new in ranks.items()
        if new
    }
    return (
        {re.escape(path): new for path, new in ranks.items() if new not in (0, rank)},
        {re.escape(path): value for path, value in alphas.items() if value != alpha},
    )


def layer_indices(layers: str | Sequence[int], count: int, where: str) -> list[int]:
    """Return the decoder layers that `first N`, `last N`, `a-b` or a list names, of a model with `count`.

    Raises:
        InputError: the model has no such layer.
    """
    if isinstance(layers, str):
        if layers.startswith(("first ", "last ")):
            word, number = layers.split()
            low, high = (0, int(number)) if word == "first" else (count - int(number), count)
        else:
            low, high = int(layers.partition("-")[0]), int(layers.partition("-")[2]) + 1
        chosen = list(range(low, high))
    else:
        chosen = list(layers)
    if min(chosen) < 0 or max(chosen) >= count:
        raise InputError(f"{where}: found {layers}, but the model has {count} layers (0 to {count - 1})")
    return chosen


def in_layers(paths: Sequence[str], indices: Sequence[int] | str, names: Sequence[str] = ()) -> list[str]:
    """Return the paths inside these layers; the first number of a path counts, or the first after one of `names`."""
    assert not isinstance(indices, str)
    name = "|".join(names) if names else r"[^.]*"
    matches = {path: fully_matches(rf"(?:|.*?\.)(?:{name})\.(\d+)\..*", path) for path in paths}
    return [path for path, match in matches.items() if match and int(match[1]) in indices]


def require_targets(paths: Sequence[str], targets: str | Sequence[str], where: str) -> None:
    """Refuse a choice of layers in which a target has no module left.

    Raises:
        InputError: with the target.
    """
    for target in [targets] if isinstance(targets, str) else targets:
        named = [path for path in paths if f".{path}".endswith(f".{target}")]
        if not (paths if isinstance(targets, str) else named):
            raise InputError(
                f"{where}: {target!r} matches no linear layer in the chosen decoder layers (see adapter.layers)"
            )


def _first_match(patterns: Mapping[str, object], path: str) -> str | None:
    return next((pattern for pattern in patterns if fully_matches(rf"(.*\.)?({pattern})", path)), None)
