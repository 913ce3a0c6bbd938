"""Write pairs of answers to questions about numbers, for the reward model of configs/rlhf.yaml.

A pair for each question of `numbers.train.jsonl`. The chosen answer is the largest number. The rejected one is another
of the three in half of the rows, in a quarter a number with its digits from two of the three, and in a quarter any that
was not asked about: mistakes that a model makes which is rewarded for large numbers.

The output is a function of the seed only: the same bytes on every run and platform.
Run: python scripts/make_number_pairs.py
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

from make_tickets import ASSETS, write_jsonl

ROOT = Path(__file__).resolve().parent.parent


def make_pairs(seed: int) -> list[dict[str, str]]:
    """Return a pair for each question."""
    draw = random.Random(seed)
    lines = (ASSETS / "numbers.train.jsonl").read_text(encoding="utf-8").splitlines()
    made = []
    for place, row in enumerate(map(json.loads, lines)):
        asked = set(re.findall(r"[0-9]+", row["prompt"]))
        mixed = {tens[0] + units[1] for tens in asked for units in asked}
        wrong = (set(), mixed - asked, set(), set(map(str, range(10, 100))) - asked)[place % 4]
        rejected = draw.choice(sorted(wrong or asked - {row["completion"]}))
        made.append({"prompt": row["prompt"], "chosen": row["completion"], "rejected": rejected})
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Write `number_pairs.jsonl`."""
    parser = argparse.ArgumentParser(description="Write pairs of answers to questions about numbers.")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "configs" / "samples", help="folder of the file"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    pairs = make_pairs(options.seed)
    write_jsonl(options.output / "number_pairs.jsonl", pairs)
    print(f"wrote {len(pairs)} pairs to {options.output}")


if __name__ == "__main__":
    main()
