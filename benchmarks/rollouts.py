"""Held-out reward before and after learning from rewarded completions, on the bundled numbers: a table, and curves.

    python benchmarks/rollouts.py                                   # grpo, rloo and ppo, seeds 0 1 2
    python benchmarks/rollouts.py --write                           # put into docs/rollouts.md and docs/curves
    python benchmarks/rollouts.py --objectives grpo --seeds 0 train.max_steps=20

Each objective learns by its own recipe in configs/ from the bundled base, one run a core. A reward is the part of the
200 held-out questions whose most likely completion is the answer, so its range is 0 to 1. Finished runs are kept in
`--results` and are not made again: an interrupted comparison goes on. Keys at the end are for all runs.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OBJECTIVES = ("grpo", "rloo", "ppo")
CURVES = ROOT / "docs" / "curves" / "rollouts.csv"
HEADER = ("objective", "seed", "step", "reward", "heldout_reward", "kl", "entropy", "completion_tokens")
"""`reward` is that of the sampled completions of a step, `heldout_reward` that of the most likely ones."""


@dataclass(frozen=True)
class Learned:
    """One learning run, finished."""

    objective: str
    seed: int
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]

    def before(self) -> float:
        """Return the held-out reward of the base."""
        return float(self.summary["eval"]["base"]["reward"])

    def after(self) -> float:
        """Return the held-out reward of what was learned."""
        return float(self.summary["eval"]["tuned"]["reward"])

    def kl(self) -> float:
        """Return the largest divergence from the base that a step had, in nats by token."""
        return max(line["kl"] for line in self.metrics if "kl" in line)

    def minutes(self) -> float:
        """Return how long learning took, with the evaluations meanwhile."""
        return float(self.summary["seconds"]["train"]) / 60

    def curve(self) -> list[dict[str, Any]]:
        """Return its lines of the table of curves."""
        lines: dict[int, dict[str, Any]] = {}
        for line in self.metrics:
            one = lines.setdefault(
                line["step"], {"objective": self.objective, "seed": self.seed, "step": line["step"]}
            )
            if "eval_loss" in line:
                one["heldout_reward"] = f"{-line['eval_loss']:.4f}"
            one |= {name: f"{line[name]:.4f}" for name in (*HEADER[5:], "reward") if name in line}
        return [lines[step] for step in sorted(lines)]


def train(recipe: str, overrides: Sequence[str], folder: Path, core: int) -> None:
    """Run one recipe on a core, where it is not finished already."""
    if (folder / "summary.json").is_file():
        return
    process = subprocess.run(
        [sys.executable, "-m", "lora_cli", f"configs/{recipe}.yaml", *overrides, f"run.output={folder}"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        sys.exit(f"rollouts.py: {folder.name}: exit {process.returncode}: {process.stderr.strip()[-500:]}")


def learn(options: argparse.Namespace) -> list[Learned]:
    """Make every run of every seed, one on each core at a time."""
    free: SimpleQueue[int] = SimpleQueue()
    for core in sorted(os.sched_getaffinity(0))[: options.jobs]:
        free.put(core)

    def one(job: tuple[str, int]) -> Learned:
        objective, seed = job
        folder = options.results / f"{objective}-{seed}"
        core = free.get()
        try:
            train(objective, [f"run.seed={seed}", *options.overrides], folder, core)
        finally:
            free.put(core)
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        found = Learned(objective, seed, summary, [json.loads(line) for line in lines])
        print(
            f"{objective} seed {seed}: {found.before():.3f} -> {found.after():.3f}",
            file=sys.stderr,
            flush=True,
        )
        return found

    jobs = [(objective, seed) for objective in options.objectives for seed in options.seeds]
    with ThreadPoolExecutor(free.qsize()) as pool:
        return list(pool.map(one, jobs))


def table(runs: Iterable[Learned]) -> str:
    """Return the table as Markdown: a line of each run, and of each objective the least rise."""
    lines = [
        "| objective | seed | reward before | after | rise | largest KL | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    rises: dict[str, list[float]] = {}
    for run in runs:
        rise = run.after() - run.before()
        rises.setdefault(run.objective, []).append(rise)
        lines.append(
            f"| {run.objective} | {run.seed} | {run.before():.3f} | {run.after():.3f} | {rise:+.3f} | {run.kl():.3f} |"
            f" {run.minutes():.1f} |"
        )
    told = (
        f"{name}: median {statistics.median(each):+.3f}, least {min(each):+.3f}"
        for name, each in rises.items()
    )
    return "\n".join(lines) + "\n\nRise by objective: " + "; ".join(told) + "."


def write_table(text: str) -> None:
    """Put the table into docs/rollouts.md, between its two marks."""
    page = ROOT / "docs" / "rollouts.md"
    begin, end = "<!-- measured -->", "<!-- end of measured -->"
    before, rest = page.read_text(encoding="utf-8").split(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def write_curves(runs: Iterable[Learned]) -> None:
    """Write every logged step of every run as a line."""
    CURVES.parent.mkdir(exist_ok=True)
    with CURVES.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, HEADER, lineterminator="\n")
        writer.writeheader()
        for run in runs:
            writer.writerows(run.curve())


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return what is asked for; its folder of results is there."""
    parser = argparse.ArgumentParser(description="Learn the numbers by reward, and say by how much it rose.")
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=OBJECTIVES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="runs at a time; default: one a core"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "rollouts", metavar="FOLDER")
    parser.add_argument(
        "--write", action="store_true", help="write docs/rollouts.md and docs/curves/rollouts.csv"
    )
    parser.add_argument("overrides", nargs="*", help="key=value for all runs, e.g. train.max_steps=20")
    options: argparse.Namespace = parser.parse_intermixed_args(arguments)
    options.results = options.results.resolve()
    options.results.mkdir(parents=True, exist_ok=True)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is asked for and print the table as Markdown."""
    options = options_of(arguments)
    runs = learn(options)
    text = table(runs)
    print(text, flush=True)
    if options.write:
        write_table(text)
        write_curves(runs)


if __name__ == "__main__":
    main()
