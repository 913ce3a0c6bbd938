"""`recipe/gates.py`: bounds on scores."""

from __future__ import annotations

import math

import pytest

from lora_cli.errors import GateError, InputError
from lora_cli.recipe.gates import Gate, check_computable, check_gates, parse_gates
from lora_cli.recipe.load import load_recipe


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("los=1", "did you mean loss?"),
        ("bleu=1", "one of loss, perplexity"),
        ("loss", "write --max NAME=VALUE"),
        ("loss=x", "'x' is not a finite number"),
        ("loss=nan", "not a finite number"),
        ("loss=", "not a finite number"),
    ],
)
def test_a_bad_gate_is_an_input_error(text: str, expected: str) -> None:
    """It names the option as it was written."""
    with pytest.raises(InputError) as refusal:
        Gate.parse(text, "max")
    assert refusal.value.lines[0].startswith(f"--max {text}: ")
    assert expected in refusal.value.lines[0]


def test_all_bad_gates_are_told() -> None:
    """One line per option."""
    with pytest.raises(InputError) as refusal:
        parse_gates(["a=1", "loss=1"], ["b=1"])
    assert len(refusal.value.lines) == 2


def test_a_gate_on_a_score_that_is_not_computed_is_refused_before_work() -> None:
    """Without held-out rows, or without the metric, the gate could only miss."""
    gates = parse_gates(["exact_match=0.5"], ["perplexity=9"])
    with pytest.raises(InputError, match=r"set data\.eval"):
        check_computable(gates, load_recipe(None))
    with pytest.raises(InputError) as refusal:
        check_computable(gates, load_recipe(None, ["data.eval=x.jsonl"]))
    assert refusal.value.lines == [
        "--min exact_match=0.5: exact_match is not computed (add exact_match to evaluate.metrics)"
    ]
    check_computable(gates, load_recipe(None, ["data.eval=x.jsonl", "evaluate.metrics=[loss, exact_match]"]))


def test_gates_keep_their_bound_and_miss_beyond_it_or_without_a_number() -> None:
    """The bound itself is kept; NaN and an absent score miss; every miss is a line with the figure."""
    gates = parse_gates(["exact_match=0.5"], ["loss=2"])
    check_gates(gates, {"exact_match": 0.5, "loss": 2.0})
    with pytest.raises(GateError) as missed:
        check_gates(gates, {"exact_match": 0.25, "loss": math.nan})
    assert len(missed.value.lines) == 2
    assert "exact_match 0.25 is below the bound 0.5" in missed.value.lines[0]
    with pytest.raises(GateError):
        check_gates(gates, {"exact_match": 1.0})
    assert GateError.exit_code == 5
