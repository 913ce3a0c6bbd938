"""What is known of each adapted module, gathered by kind of module and by depth, and the ranks that follow from it.

A kind is a module's name (`q_proj`), with its parent's where several parents have one of that name (`attn.c_proj`).
A kind has a verdict where at least CLEAR of its modules have it and none has the opposite one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from lora_cli.stages import _spectrum

CLEAR = 0.75
VERDICTS = ("wasted", "short", "fits", "zero")
BINS = 8
"""Columns of the picture of a spectrum."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The singular values of an update, falling, and how many directions they are."""

    singular_values: list[float]
    effective_rank: float
    rank_99: int
    profile: list[float]
    """At most BINS means of neighbouring singular values, as parts of the largest: a picture of them."""

    @classmethod
    def of(cls, values: list[float]) -> Spectrum:
        """Return the spectrum with these singular values."""
        return cls(values, _spectrum.effective_rank(values), _spectrum.rank_for(values), profile_of(values))


@dataclass(frozen=True, slots=True)
class Module:
    """One linear layer and its update."""

    path: str
    layer: int | None
    """Number of its decoder layer; None outside of them."""
    out_features: int
    in_features: int
    parameters: int
    """Of its adapter, frozen ones included; of its weight where that is trained itself."""
    rank: int | None
    """In the recipe's terms; None where the weight is trained itself."""
    alpha: float | None
    """In the recipe's terms; None where there is none, or where the rank is not chosen by module."""
    initial_rank: int | None
    """AdaLoRA: the rank before pruning."""
    update_rank: int
    """The most directions that the update can have: more than `rank` where several updates are added up."""
    weight_norm: float
    """Frobenius norm of the base's weight."""
    update_norm: float
    relative_change: float | None
    """update_norm / weight_norm; None for a weight of zeros."""
    update: Spectrum
    low_rank: Spectrum | None
    """Of the part of the update that the rank bounds, where that is not all of it."""
    verdict: str | None
    suggested_rank: int | None
    """In the recipe's terms."""

    @property
    def judged(self) -> Spectrum:
        """The spectrum that the rank bounds."""
        return self.low_rank or self.update


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor that is trained whole: a norm, an embedding, a bias."""

    name: str
    parameters: int
    weight_norm: float
    update_norm: float
    relative_change: float | None


def layer_of(path: str) -> int | None:
    """Return the first number in a module's path, which is that of its decoder layer."""
    found = re.search(r"(?:^|\.)(\d+)\.", path)
    return int(found[1]) if found else None


def kind_names(paths: Iterable[str]) -> dict[str, str]:
    """Return the kind of each path."""
    ends = {path: [part for part in path.split(".") if not part.isdigit()] for path in paths}
    parents: dict[str, set[str]] = {}
    for parts in ends.values():
        parents.setdefault(parts[-1], set()).add(".".join(parts[-2:-1]))
    return {
        path: ".".join(parts[-2:] if len(parents[parts[-1]]) > 1 else parts[-1:])
        for path, parts in ends.items()
    }


def by_kind(modules: Sequence[Module]) -> list[dict[str, Any]]:
    """Return what the modules of each kind have in common, in the model's order."""
    kinds = kind_names(module.path for module in modules)
    groups: dict[str, list[Module]] = {}
    for module in modules:
        groups.setdefault(kinds[module.path], []).append(module)
    total = math.fsum(module.update_norm**2 for module in modules)
    found = []
    for kind, group in groups.items():
        verdict, suggested = _verdict(group)
        shapes = {(module.out_features, module.in_features) for module in group}
        found.append(
            {
                "kind": kind,
                "modules": len(group),
                "shape": list(shapes.pop()) if len(shapes) == 1 else None,
                "parameters": sum(module.parameters for module in group),
                "update_rank": _range([module.update_rank for module in group]),
                "relative_change": _range([module.relative_change for module in group]),
                "share": math.fsum(module.update_norm**2 for module in group) / total if total else 0.0,
                "rank_99": _range([module.judged.rank_99 for module in group]),
                "effective_rank": _range([module.judged.effective_rank for module in group]),
                "profile": _mean([module.judged.profile for module in group]),
                "verdicts": {name: sum(module.verdict == name for module in group) for name in VERDICTS},
                "verdict": verdict,
                "suggested_rank": suggested,
            }
        )
    return found


def by_layer(modules: Sequence[Module]) -> list[dict[str, Any]]:
    """Return the change of each decoder layer: of its modules together, and their part of the whole change."""
    total = math.fsum(module.update_norm**2 for module in modules)
    found = []
    for layer in sorted({module.layer for module in modules if module.layer is not None}):
        group = [module for module in modules if module.layer == layer]
        update = math.fsum(module.update_norm**2 for module in group)
        weight = math.fsum(module.weight_norm**2 for module in group)
        found.append(
            {
                "layer": layer,
                "modules": len(group),
                "relative_change": math.sqrt(update / weight) if weight else None,
                "share": update / total if total else 0.0,
                "rank_99": _range([module.judged.rank_99 for module in group]),
            }
        )
    return found


def suggest(
    kinds: Sequence[Mapping[str, Any]],
    modules: Sequence[Module],
    keys: Collection[str],
    present: Mapping[str, Mapping[str, Any]],
    power: float,
) -> dict[str, Any]:
    """Return keys of the recipe's adapter block with other ranks where a kind is clearly wasted or short, else nothing.

    `keys` are those of the block: with `rank_pattern` each kind gets its own rank, with `rank` alone all one, if all
    are wasted or all are short. alpha is given besides so that an update keeps its scale, alpha / rank^`power`.
    `present` are the patterns of the recipe, of which stays what other kinds need.
    """
    wanted = {kind["kind"]: kind["suggested_rank"] for kind in kinds if kind["suggested_rank"] is not None}
    names = kind_names(module.path for module in modules)
    verdicts = {kind["verdict"] for kind in kinds if kind["verdict"] != "zero"}
    if not wanted:
        return {}
    if "rank_pattern" in keys:
        alphas = {
            kind: _one([_alpha(module, rank, power) for module in modules if names[module.path] == kind])
            for kind, rank in wanted.items()
        }
        others = [path for path, kind in names.items() if kind not in wanted]
        told = {"rank_pattern": wanted, "alpha_pattern": {k: alpha for k, alpha in alphas.items() if alpha}}
        patterns = {key: value | _needed(present.get(key, {}), others) for key, value in told.items()}
        return {key: value for key, value in patterns.items() if value}
    if "rank" in keys and len(verdicts) == 1 and all(kind["kind"] in wanted for kind in kinds):
        rank = max(wanted.values())
        alpha = _one([_alpha(module, rank, power) for module in modules])
        return {"rank": rank} | ({"alpha": alpha} if alpha else {})
    return {}


def profile_of(values: Sequence[float]) -> list[float]:
    """Return at most BINS means of neighbouring singular values, as parts of the largest value; nothing for zeros."""
    if not values or not values[0]:
        return []
    number = min(BINS, len(values))
    edges = [round(index * len(values) / number) for index in range(number + 1)]
    parts = [values[first:last] for first, last in pairwise(edges)]
    return [math.fsum(part) / len(part) / values[0] for part in parts]


def as_json(record: Module | Whole | Spectrum) -> dict[str, Any]:
    """Return a record as plain values."""
    return asdict(record)


def _verdict(group: Sequence[Module]) -> tuple[str | None, int | None]:
    """Return the verdict that a kind clearly has, and the rank that all its modules can have then.

    A lower rank is a power of two that holds 99 % of every module, also of those that are not wasted.
    """
    verdicts = [module.verdict for module in group]
    opposite = {"wasted": "short", "short": "wasted"}
    for verdict in VERDICTS:
        if verdicts.count(verdict) < CLEAR * len(group) or opposite.get(verdict) in verdicts:
            continue
        ranks = [module.rank or 0 for module in group]
        if verdict == "wasted":
            needed = max(math.ceil(module.judged.rank_99 * _factor(module)) for module in group)
            rank = 2 ** max(needed - 1, 0).bit_length()
            return verdict, rank if rank < min(r for r, m in zip(ranks, group, strict=True) if r) else None
        if verdict == "short":
            rank = max(module.suggested_rank or 0 for module in group)
            return verdict, rank if rank > max(ranks) else None
        return verdict, None
    return None, None


def _factor(module: Module) -> float:
    """Return what a rank of the update is in the recipe's terms."""
    return (module.rank or 0) / module.update_rank if module.update_rank else 0.0


def _alpha(module: Module, rank: int, power: float) -> float | None:
    """Return the alpha with which an update of another rank has the scale that it has now."""
    if module.alpha is None or not module.rank:
        return None
    alpha = round(module.alpha * (rank / module.rank) ** power, 4)
    return int(alpha) if alpha == int(alpha) else alpha


def _one(values: Sequence[float | None]) -> float | None:
    """Return the value that all are."""
    return values[0] if len(set(values)) == 1 else None


def _needed(pattern: Mapping[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """Return the entries of a pattern that match one of `paths`, by the rule of `adapters/_lora_patterns.py`."""
    return {
        key: value
        for key, value in pattern.items()
        if any(re.match(rf"(.*\.)?({key})$", path) for path in paths)
    }


def _range(values: Sequence[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    if not known:
        return {"min": None, "median": None, "max": None}
    return {"min": min(known), "median": median(known), "max": max(known)}


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean of rows by column; of rows of other lengths than the longest, nothing."""
    longest = max((len(row) for row in rows), default=0)
    full = [row for row in rows if len(row) == longest]
    return [math.fsum(column) / len(full) for column in zip(*full, strict=True)]
