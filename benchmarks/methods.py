"""Every adapter method and every variant of LoRA on the same two tasks: tables from one command.

    python benchmarks/methods.py                                    # tickets and GSM8K, seeds 0 1 2
    python benchmarks/methods.py --write                            # written to docs/methods.md besides
    python benchmarks/methods.py --tasks tickets --runs lora dora --seeds 0

Tickets: the bundled rows, each method by its own recipe in configs/. GSM8K: the same adapter and learning rate on
the rows of `--gsm8k FOLDER`, 60 steps of 16 rows, scored on the first 200 test rows; answers are generated for 50 of
them. Both on the bundled `tiny` base.

Scores come first, one run a core; they do not depend on what else the machine does. Then speed and memory, a run at a
time with all cores: 3 of 25 steps for each, in turn, so that a slow minute does not fall on one of them. Finished runs
are kept in `--results` and are not made again: an interrupted comparison goes on. A figure is the median, with the
smallest and largest behind.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RUNS: dict[str, tuple[str, ...]] = {
    "lora": ("quickstart",),
    "qlora": ("qlora",),
    "dora": ("dora",),
    "adalora": ("adalora",),
    "relora": ("relora",),
    "vera": ("vera",),
    "full": ("full",),
    "lora+": ("quickstart", "adapter.plus_ratio=4", "train.learning_rate=1e-3"),
    "four variants": ("lora_plus",),
    "rslora": ("quickstart", "adapter.scaling=rslora"),
    "lora-fa": ("quickstart", "adapter.freeze_a=true"),
    "orthogonal": ("quickstart", "adapter.init=orthogonal"),
    "pissa": ("pissa",),
    "olora": ("pissa", "adapter.init=olora"),
    "eva": ("eva",),
    "loftq": ("loftq",),
}
"""What is compared: a recipe in configs/, and what is changed in it."""
TASKS = ("tickets", "gsm8k")
COLUMNS = (
    "run",
    "recipe",
    "trained parameters",
    "held-out loss",
    "token accuracy",
    "exact match",
    "tokens/s",
    "peak memory",
    "export",
)

Summary = dict[str, Any]


def gsm8k(folder: Path, results: Path) -> list[str]:
    """Return the overrides that put a recipe on GSM8K; the scored rows are written to `results`."""
    train, test = folder / "gsm8k.train.jsonl", folder / "gsm8k.test.jsonl"
    if not (train.is_file() and test.is_file()):
        sys.exit(
            f"methods.py: {folder} has no gsm8k.train.jsonl and gsm8k.test.jsonl (--gsm8k, or --tasks tickets)"
        )
    scored = results / "gsm8k.jsonl"
    with test.open(encoding="utf-8") as file:
        scored.write_text("".join(itertools.islice(file, 200)), encoding="utf-8")
    return [
        f"data.train={train.resolve()}",
        f"data.eval={scored.resolve()}",
        "data.fields={prompt: '{question}', completion: '{answer}'}",
        "data.max_length=512",
        "train.max_steps=60",
        "evaluate.max_generated_rows=50",
    ]


def train(name: str, overrides: Sequence[str], folder: Path, cores: set[int]) -> Summary:
    """Run one recipe on `cores` and return its summary, with the bytes of what it exported; a finished run is read."""
    done = folder / "summary.json"
    if not done.is_file():
        recipe, *changes = RUNS[name]
        command = [sys.executable, "-m", "lora_cli", f"configs/{recipe}.yaml", "--overwrite"]
        threads = {name: str(len(cores)) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        process = subprocess.run(
            [*command, *changes, *overrides, f"run.output={folder}"],
            cwd=ROOT,
            env=os.environ | threads,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
            capture_output=True,
            text=True,
            check=False,
        )
        if process.returncode:
            sys.exit(f"methods.py: {folder.name}: exit {process.returncode}: {process.stderr.strip()[-500:]}")
    summary: Summary = json.loads(done.read_text(encoding="utf-8"))
    weights = [path for place in ("adapter", "merged") for path in (folder / place).glob("*.safetensors")]
    return summary | {"export_bytes": sum(path.stat().st_size for path in weights)}


def scores(task: str, options: argparse.Namespace, overrides: Sequence[str]) -> dict[str, list[Summary]]:
    """Train every run with every seed, one on each core at a time."""
    free: SimpleQueue[int] = SimpleQueue()
    for core in sorted(os.sched_getaffinity(0))[: options.jobs]:
        free.put(core)

    def one(job: tuple[str, int]) -> Summary:
        name, seed = job
        core = free.get()
        try:
            settings = [f"run.seed={seed}", "evaluate.metrics=[loss,exact_match]", *overrides]
            found = train(name, settings, options.results / f"{task}-{name}-{seed}", {core})
        finally:
            free.put(core)
        print(f"{task} {name} seed {seed}: {found['eval']['tuned']}", file=sys.stderr, flush=True)
        return found

    jobs = [(name, seed) for name in options.runs for seed in options.seeds]
    with ThreadPoolExecutor(free.qsize()) as pool:
        found = list(pool.map(one, jobs))
    return {
        name: [one for one, job in zip(found, jobs, strict=True) if job[0] == name] for name in options.runs
    }


def speeds(task: str, options: argparse.Namespace, overrides: Sequence[str]) -> dict[str, list[Summary]]:
    """Run a few steps of every run, three times in turn, alone on the machine."""
    found: dict[str, list[Summary]] = {name: [] for name in options.runs}
    settings = ["train.max_steps=25", "evaluate.metrics=[loss]", "data.max_eval_rows=8"]
    kept = [one for one in overrides if not one.startswith(("train.max_steps", "evaluate."))]
    for turn in range(3):
        for name, summaries in found.items():
            folder = options.results / f"{task}-{name}-speed-{turn}"
            summaries.append(train(name, [*kept, *settings], folder, os.sched_getaffinity(0)))
    return found


def spread(form: str, values: Iterable[float]) -> str:
    """Return the median, and the range where there is one."""
    values = list(values)
    middle, low, high = (
        format(value, form) for value in (statistics.median(values), min(values), max(values))
    )
    return middle if low == high else f"{middle} ({low} to {high})"


def row(name: str, scored: Sequence[Summary], timed: Sequence[Summary]) -> str:
    """Return a run's line of the table."""
    recipe, *changes = RUNS[name]
    tuned = [summary["eval"]["tuned"] for summary in scored]
    cells = [
        name,
        f"[{recipe}](../configs/{recipe}.yaml)" + "".join(f", `{change}`" for change in changes),
        f"{scored[0]['trainable_parameters']:,}",
        spread(".4f", (one["loss"] for one in tuned)),
        spread(".1%", (one["token_accuracy"] for one in tuned)),
        spread(".1%", (one["exact_match"] for one in tuned)),
        spread(",.0f", (one["tokens_per_second"] for one in timed)),
        spread(".2f", (one["peak_memory_bytes"] / 1e9 for one in timed)) + " GB",
        spread(".2f", (one["export_bytes"] / 1e6 for one in scored)) + " MB",
    ]
    return f"| {' | '.join(cells)} |"


def base_row(summary: Summary) -> str:
    """Return the line of the base, which no training has touched."""
    base = summary["eval"]["base"]
    cells = [f"{base['loss']:.4f}", f"{base['token_accuracy']:.1%}", f"{base['exact_match']:.1%}"]
    return f"| base | | 0 | {' | '.join(cells)} | | | |"


def table(task: str, options: argparse.Namespace) -> str:
    """Run everything on one task and return the table as Markdown."""
    overrides = [*(gsm8k(options.gsm8k, options.results) if task == "gsm8k" else ()), *options.overrides]
    scored = scores(task, options, overrides)
    timed = speeds(task, options, overrides)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines.append(base_row(scored[options.runs[0]][0]))
    return "\n".join(lines + [row(name, scored[name], timed[name]) for name in options.runs])


def write(task: str, text: str) -> None:
    """Put a table into docs/methods.md, between its two marks."""
    page = ROOT / "docs" / "methods.md"
    begin, end = f"<!-- {task} -->", f"<!-- end of {task} -->"
    before, rest = page.read_text(encoding="utf-8").split(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is asked for and print the tables as Markdown."""
    parser = argparse.ArgumentParser(description="Compare every method on the tickets and on GSM8K.")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="scored runs at a time; default: one a core"
    )
    parser.add_argument("--gsm8k", type=Path, default=ROOT.parent / "shared" / "data", metavar="FOLDER")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "methods", metavar="FOLDER")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/methods.md")
    parser.add_argument("overrides", nargs="*", help="key=value for every recipe, e.g. train.max_steps=20")
    options = parser.parse_args(arguments)
    options.results = options.results.resolve()
    options.results.mkdir(parents=True, exist_ok=True)
    for task in options.tasks:
        text = table(task, options)
        print(f"\n{task}\n\n{text}", flush=True)
        if options.write:
            write(task, text)


if __name__ == "__main__":
    main()
