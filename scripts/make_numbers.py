"""Write questions with one right answer, for learning by reward: which of three numbers is the largest.

The bundled base was trained on such questions in other words, and answers some of them. The numbers of an
evaluation row occur together in no training row, in no order.

The output is a function of the seed only: the same bytes on every run and platform.
Run: python scripts/make_numbers.py
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

from make_tickets import ASSETS, write_jsonl

TRAIN_ROWS, EVAL_ROWS = 2000, 200


def make_rows(count: int, rng: random.Random, used: set[frozenset[int]]) -> list[dict[str, str]]:
    """Return rows of prompt and completion whose numbers are not among those `used`, and add theirs."""
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        numbers = rng.sample(range(10, 100), 3)
        if frozenset(numbers) in used:
            continue
        used.add(frozenset(numbers))
        first, second, third = numbers
        prompt = f"Which is the largest: {first}, {second} or {third}?"
        rows.append({"prompt": prompt, "completion": str(max(numbers))})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Write `numbers.train.jsonl` and `numbers.eval.jsonl`."""
    parser = argparse.ArgumentParser(description="Write questions about numbers, with their answers.")
    parser.add_argument("--output", type=Path, default=ASSETS, help="folder of the two files")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rng, used = random.Random(options.seed), set[frozenset[int]]()
    for split, count in (("eval", EVAL_ROWS), ("train", TRAIN_ROWS)):
        write_jsonl(options.output / f"numbers.{split}.jsonl", make_rows(count, rng, used))
    print(f"wrote {TRAIN_ROWS} + {EVAL_ROWS} rows to {options.output}")


if __name__ == "__main__":
    main()
