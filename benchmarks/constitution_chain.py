"""The constitutional chain on `tiny`, one command a seed: how many answers to held-out messages break a principle.

    python benchmarks/constitution_chain.py                  # seeds 0 1 2, into runs/constitution_chain/seed-N
    python benchmarks/constitution_chain.py --seeds 0

The principle is configs/constitutions/no_personal_data.yaml: an answer must not repeat names, numbers and addresses of
the message, which its own rules count. The chain, by a recipe with a list of objectives that `lora-train` runs:

1. helpful: SFT on rows of `constitution_rows.py`. It teaches the bundled model, which follows no instruction, to answer
   messages politely, by name, and to criticise and revise an answer when it is asked to. Every answer to a message in
   these rows breaks the principle.
2. constitution: the model of stage 1 answers other messages, criticises its answers by the principle and revises them.
   It is its own critic; no row is written or chosen by anyone else.
3. harmless: SFT on these messages with its own revisions as answers, from the adapter of stage 1.

Measured are the answers of stage 1 and of stage 3 to messages that no stage has seen, of people that no stage has seen.
`names the product` tells whether an answer still answers: a model that says nothing breaks no principle either. Stages
that are finished are not made again: an interrupted comparison goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from constitution_rows import RULES, cases, write

ROOT = Path(__file__).resolve().parent.parent
FIRST, ROWS, LAST = "helpful", "constitution", "harmless"
COLUMNS = ("seed", "breaks before", "its revisions", "breaks after", "names the product", "minutes")


def recipe_of(folder: Path, rows: dict[str, Path], seed: int, max_steps: int | None) -> dict[str, Any]:
    """Return the recipe of the chain."""
    steps = {} if max_steps is None else {"max_steps": max_steps}
    first = {"epochs": 3.0, "learning_rate": 3.0e-3, **steps}
    last = {"epochs": 3.0, "learning_rate": 1.0e-3, **steps}
    made = {"file": str(RULES), "prompts": str(rows["prompts"]), "rounds": 1, "samples": 0}
    return {
        "model": {"base": "tiny"},
        "data": {"eval": str(rows["held_out"]), "max_length": 320},
        "adapter": {"method": "lora", "rank": 16, "alpha": 32},
        "train": {"batch_size": 16, "warmup": 0.05, "log_every": 25},
        "evaluate": {"metrics": ["loss", "exact_match"], "max_new_tokens": 64},
        "objective": [
            {"name": "sft", "stage": FIRST, "data": {"train": str(rows["taught"])}, "train": first},
            {"name": ROWS, "answer_tokens": 64, "batch_rows": 50, **made},
            {"name": "sft", "stage": LAST, "data": {"train": f"stage:{ROWS}/sft.jsonl"}, "train": last},
        ],
        "run": {"output": str(folder / "run"), "seed": seed},
    }  # fmt: skip


def run(command: str, *arguments: str) -> str:
    """Run a command of the project as a user does, and return what it prints."""
    call = f"import sys; from lora_cli.cli import {command} as main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", call, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(
            f"constitution_chain.py: {' '.join(arguments)}: exit {done.returncode}: {done.stderr.strip()[-500:]}"
        )
    return done.stdout


def broken(*arguments: str) -> dict[str, int]:
    """Return how many answers break the principle, before and after, as `lora constitution report` counts them."""
    report = json.loads(run("main", "constitution", "report", *arguments, "--json"))
    (found,) = report["violations"]
    return {name: found[name] for name in ("before", "after", "answers")}


def measure(folder: Path, seed: int, options: argparse.Namespace) -> list[str]:
    """Run the chain in a folder, and return its line of the table."""
    sizes = {name: getattr(options, name) for name in ("taught", "prompts", "held_out")}
    rows = write(folder / "rows", seed=seed, **sizes)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(folder, rows, seed, options.max_steps), sort_keys=False))
    start = time.monotonic()
    run("train_main", str(recipe))
    minutes = (time.monotonic() - start) / 60
    first, made, last = (
        str(folder / "run" / f"{number}-{name}") for number, name in enumerate((FIRST, ROWS, LAST), start=1)
    )
    held_out = broken(str(folder / "run"))
    revised = broken(made)
    number = held_out["answers"]
    names = [_named(Path(run_), sizes, seed) for run_ in (first, last)]
    return [
        str(seed),
        f"{held_out['before']} of {number} ({held_out['before'] / number:.1%})",
        f"{revised['after']} of {revised['answers']} ({revised['after'] / revised['answers']:.1%})",
        f"{held_out['after']} of {number} ({held_out['after'] / number:.1%})",
        f"{names[0]} before, {names[1]} after",
        f"{minutes:.1f}",
    ]


def _named(run_: Path, sizes: dict[str, int], seed: int) -> int:
    """Return how many answers name the product that the message is about."""
    every = cases(sum(sizes.values()), seed)[-sizes["held_out"] :]
    lines = (run_ / "generations.jsonl").read_text(encoding="utf-8").splitlines()
    return sum(case.product in json.loads(line)["tuned"] for case, line in zip(every, lines, strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the chain with each seed and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "runs/constitution_chain")
    parser.add_argument("--taught", type=int, default=1200, help="messages of stage 1")
    parser.add_argument("--prompts", type=int, default=300, help="messages of stage 2")
    parser.add_argument("--held-out", type=int, default=200, help="messages that are measured")
    parser.add_argument("--max-steps", type=int, help="steps of each stage, to try it out")
    options = parser.parse_args(arguments)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for seed in options.seeds:
        line = measure((options.output / f"seed-{seed}").resolve(), seed, options)
        print(f"| {' | '.join(line)} |", flush=True)


if __name__ == "__main__":
    main()
