"""Bounds that a score must keep: `--min exact_match=0.9`, `--max perplexity=20`; missing one is exit 5."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lora_cli.errors import GateError, InputError
from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.suggest import nearest

METRIC_OF_SCORE = {
    "loss": "loss",
    "perplexity": "loss",
    "token_accuracy": "loss",
    "exact_match": "exact_match",
    "reward": "loss",
    "win_rate": "win_rate",
    "win_rate_low": "win_rate",
}
"""Score a gate may bound -> entry of `evaluate.metrics` that computes it."""


@dataclass(frozen=True, slots=True)
class Gate:
    """A score and the bound it must keep."""

    name: str
    bound: float
    kind: Literal["min", "max"]

    @classmethod
    def parse(cls, text: str, kind: Literal["min", "max"]) -> Gate:
        """Return the gate that `NAME=VALUE` stands for.

        Raises:
            InputError: no such score, or the bound is not a finite number.
        """
        name, equals, bound = text.partition("=")
        place = f"--{kind} {text}"
        if not equals:
            raise InputError(f"{place}: found no bound (write --{kind} NAME=VALUE)")
        if name not in METRIC_OF_SCORE:
            near = nearest(name, METRIC_OF_SCORE)
            hint = f"did you mean {near}?" if near else f"one of {', '.join(METRIC_OF_SCORE)}"
            raise InputError(f"{place}: unknown score {name!r} ({hint})")
        try:
            value = float(bound)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InputError(f"{place}: the bound {bound!r} is not a finite number")
        return cls(name, value, kind)

    def __str__(self) -> str:
        return f"--{self.kind} {self.name}={self.bound:g}"


def parse_gates(at_least: Iterable[str], at_most: Iterable[str]) -> tuple[Gate, ...]:
    """Return the gates of all `--min` and `--max` options.

    Raises:
        InputError: with a line per option that cannot be read.
    """
    gates: list[Gate] = []
    problems: list[str] = []
    kinds: tuple[tuple[Literal["min", "max"], Iterable[str]], ...] = (("min", at_least), ("max", at_most))
    for kind, texts in kinds:
        for text in texts:
            try:
                gates.append(Gate.parse(text, kind))
            except InputError as error:
                problems.extend(error.lines)
    if problems:
        raise InputError(problems)
    return tuple(gates)


def check_computable(gates: Sequence[Gate], recipe: Recipe) -> None:
    """Refuse, before any work, gates on scores that the recipe does not compute.

    Raises:
        InputError: there are no held-out rows, or the metric is not asked for.
    """
    problems = []
    for gate in gates:
        metric = METRIC_OF_SCORE[gate.name]
        if not recipe.data.holds_out():
            problems.append(f"{gate}: there are no held-out rows to score (set data.eval)")
        elif metric not in recipe.evaluate.metrics:
            problems.append(f"{gate}: {gate.name} is not computed (add {metric} to evaluate.metrics)")
    if problems:
        raise InputError(problems)


def check_gates(gates: Sequence[Gate], scores: Mapping[str, float]) -> None:
    """Compare scores with their bounds; a score that is absent or not a number misses its gate.

    Raises:
        GateError: with a line per missed gate and the figure that missed it.
    """
    missed = []
    for gate in gates:
        score = scores.get(gate.name, math.nan)
        kept = score >= gate.bound if gate.kind == "min" else score <= gate.bound  # False for NaN
        if not kept:
            side = "below" if gate.kind == "min" else "above"
            figure = f"{score:.6g} is {side}" if math.isfinite(score) else f"{score} does not keep"
            missed.append(f"{gate}: {gate.name} {figure} the bound {gate.bound:g}")
    if missed:
        raise GateError(missed)
