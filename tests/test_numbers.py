"""The bundled numbers, and that a model learns them by reward."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import rollouts

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "lora_cli" / "assets" / "tiny"


def test_they_are_what_the_script_writes(tmp_path: Path) -> None:
    """The script writes the bundled bytes; each answer is right, and no held-out set of numbers is trained on."""
    subprocess.run(
        [sys.executable, ROOT / "scripts" / "make_numbers.py", "--output", tmp_path],
        check=True,
        capture_output=True,
    )
    found: dict[str, set[frozenset[int]]] = {}
    for split in ("train", "eval"):
        bundled = (ASSETS / f"numbers.{split}.jsonl").read_bytes()
        assert (tmp_path / f"numbers.{split}.jsonl").read_bytes() == bundled
        for row in map(json.loads, bundled.splitlines()):
            numbers = [int(number) for number in re.findall(r"\d+", row["prompt"])]
            assert row["completion"] == str(max(numbers))
            found.setdefault(split, set()).add(frozenset(numbers))
    assert not found["train"] & found["eval"]


def test_the_pairs_are_what_the_script_writes(tmp_path: Path) -> None:
    """The script writes the bytes of the sample; the larger number is chosen, of a question that is trained on."""
    subprocess.run(
        [sys.executable, ROOT / "scripts" / "make_number_pairs.py", "--output", tmp_path],
        check=True,
        capture_output=True,
    )
    sample = (ROOT / "configs" / "samples" / "number_pairs.jsonl").read_bytes()
    assert (tmp_path / "number_pairs.jsonl").read_bytes() == sample
    trained_on = {
        row["prompt"]: row["completion"]
        for row in map(json.loads, (ASSETS / "numbers.train.jsonl").read_bytes().splitlines())
    }
    for row in map(json.loads, sample.splitlines()):
        assert trained_on[row["prompt"]] == row["chosen"] != row["rejected"]


@pytest.mark.usefixtures("own_cache")
def test_a_few_steps_by_reward_raise_the_held_out_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """benchmarks/rollouts.py in short: the reward rises by 0.1 of its range, and is in table and curves."""
    monkeypatch.setattr(rollouts, "CURVES", tmp_path / "curves.csv")
    runs = rollouts.learn(
        rollouts.options_of(
            ["--objectives", "grpo", "--seeds", "0", "--results", str(tmp_path), "train.max_steps=16",
             "train.eval_every=8", "train.log_every=1"]
        )
    )  # fmt: skip
    (run,) = runs
    assert run.after() - run.before() >= 0.1
    assert f"| {run.before():.3f} | {run.after():.3f} |" in rollouts.table(runs)
    rollouts.write_curves(runs)
    lines = (tmp_path / "curves.csv").read_text().splitlines()
    assert len(lines) == 17
    assert float(lines[8].split(",")[4]) == pytest.approx(-run.metrics[8]["eval_loss"], abs=1e-4)
