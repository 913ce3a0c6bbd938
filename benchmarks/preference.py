"""Preference optimization: tokens that shared prompts save, parity with TRL, what is learned, speed beside TRL.

    python benchmarks/preference.py tokens parity learn         # minutes
    python benchmarks/preference.py speed --rounds 3            # DPO on the SmolLM-135M shape: an hour on 2 cores
    python benchmarks/preference.py speed --shape smallest --rounds 1 --threads 1   # a minute: whether it all works

Pairs are those of `--rows`, tokenized once; all sides get the same ids. A token is real if it is one of a pair's
chosen answer with its prompt or of its rejected answer with its prompt, on every side, however often it is computed.

tokens   how many fewer are computed where both answers share their prompt
parity   each step's loss of ours and of TRL's DPOTrainer: float32, same weights, same adapters, same order
learn    DPO on `tiny` with three seeds: loss and preference accuracy of held-out pairs, base and tuned
speed    real tokens a second of an optimizer step; every measurement is a process of its own, sides in turn. Both sides
         compute the reference; where TRL has it precomputed, what that took stands in its seconds once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from side_by_side import dpo_ours, dpo_trl, equal, pairs, processes, shapes, work
from side_by_side.cases import ALPHA, LORA, RANK
from side_by_side.processes import ROOT, MeasurementFailed
from side_by_side.records import Job, Record, Recorder, UnequalError

from lora_cli import pipeline
from lora_cli.objectives._answers import common_prompt
from lora_cli.recipe.load import load_recipe
from lora_cli.runtime import dist
from lora_cli.types import PairExample

TINY = ROOT / "lora_cli" / "assets" / "tiny"
RECIPE = ROOT / "configs" / "dpo.yaml"
ALIKE = 1e-4
"""Largest difference of a step's loss from TRL's, relative."""
LEARNING_RATE = 1e-4
PEERS: dict[str, dict[str, Any]] = {
    "trl": {},
    "trl-tuned": {"bf16_model": True, "checkpointing": False, "sorted": True},
    "trl-precomputed": {"bf16_model": True, "checkpointing": False, "sorted": True, "precompute": True},
}
"""DPOTrainer as it comes (float32 weights under bfloat16 autocast, gradient checkpointing, 8 pairs at a time, padded);
with a bfloat16 model, no checkpointing and pairs of like length together; the same with the reference precomputed. Its
padding_free is switched off in TRL 1.16."""


def tokens(options: argparse.Namespace) -> list[str]:
    """Return how many tokens the rows have, and how many are computed."""
    with dist.start("cpu") as rt:
        recipe = _recipe(options, "data.eval_fraction=null", "data.max_length=8192", *options.set)
        examples = pairs.prepared(recipe, rt).train
    assert examples is not None
    every = [examples[index] for index in range(len(examples))]
    whole = sum(pair.tokens for pair in every)
    shared = sum(common_prompt(pair) for pair in every if isinstance(pair, PairExample))
    return [
        f"tokens: {len(every)} pairs, {whole:,} tokens with the prompt in both answers, {whole - shared:,} with it"
        f" once: {whole / (whole - shared):.2f} times fewer"
    ]


def parity(options: argparse.Namespace, folder: Path) -> list[str]:
    """Return how far our losses and TRL's are apart over `options.steps` steps on `tiny`.

    Raises:
        UnequalError: they are further apart than ALIKE, or the sides did not get the same pairs.
    """
    jobs = Jobs(options, folder, TINY, "float32", options.parity_steps, size=8)
    records = {}
    for name, side in (("ours", dpo_ours), ("trl", dpo_trl)):
        job = jobs.job(name, {"rows": 4, "checkpointing": False})
        recorder = Recorder(job)
        side.run(job, recorder)
        records[name] = recorder.record()
        equal.require_documents(name, records[name], jobs.documents)
    apart = _require_alike("parity", records["trl"], records["ours"])
    first, *_, last = (step.loss for step in records["ours"].steps)
    return [
        f"parity: {options.parity_steps} steps of 8 pairs on tiny, float32: loss {first:.6f} to {last:.6f}; TRL's is"
        f" within {apart:.1e} relative in every step"
    ]


def _require_alike(name: str, record: Record, ours: Record) -> float:
    """Return the largest relative difference of a step's loss.

    Raises:
        UnequalError: it is beyond ALIKE.
    """
    apart = equal.largest_difference(record, ours)
    if not apart <= ALIKE:
        raise UnequalError(f"{name}: losses are up to {apart:.1e} apart, more than {ALIKE:g}")
    return apart


def learn(options: argparse.Namespace, folder: Path) -> list[str]:
    """Return the held-out scores of each seed, which also draws the quarter of the rows that is held out."""
    rows = json.loads(options.rows.read_text(encoding="utf-8"))
    lines, right, count = [], 0.0, 0
    for seed in options.seeds:
        random.Random(seed).shuffle(rows)
        files = [folder / f"{split}-{seed}.json" for split in ("held-out", "train")]
        for file, part in zip(files, (rows[: len(rows) // 4], rows[len(rows) // 4 :]), strict=True):
            file.write_text(json.dumps(part), encoding="utf-8")
        places = [f"data.eval={files[0]}", "data.eval_fraction=null", f"data.train={files[1]}"]
        run = [f"run.seed={seed}", f"run.output={folder / f'seed-{seed}'}"]
        summary = pipeline.train(load_recipe(RECIPE, [*places, *run, *options.set]), overwrite=True)
        base, tuned = summary["eval"]["base"], summary["eval"]["tuned"]
        kept = summary["rows"]["eval"]["kept"]
        right, count = right + kept * tuned["preference_accuracy"], count + kept
        lines.append(
            f"learn: seed {seed}: held-out loss {base['loss']:.4f} -> {tuned['loss']:.4f}, preference accuracy"
            f" {base['preference_accuracy']:.1%} -> {tuned['preference_accuracy']:.1%} of {kept} pairs, margin"
            f" {tuned['reward_margin']:.3f}"
        )
    part = right / max(count, 1)
    error = (part * (1 - part) / max(count, 1)) ** 0.5
    return [*lines, f"learn: together {part:.1%} of {count} held-out pairs, standard error {error:.1%}"]


def speed(options: argparse.Namespace, folder: Path) -> list[str]:
    """Return real tokens a second of every side, and its time as a multiple of ours, round by round.

    Raises:
        UnequalError: a side did other work.
        MeasurementFailed: a side did not run.
    """
    made = folder / f"{options.shape}-{options.dtype}"
    model = shapes.make_model(shapes.SHAPES[options.shape], options.dtype, made, TINY)
    steps = options.warmup + options.steps
    jobs = Jobs(options, folder, model, options.dtype, steps, size=options.pairs)
    sides: dict[str, dict[str, Any]] = {"ours": {}, "ours-unshared": {"share": False}, **PEERS}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    numbers: dict[str, Record] = {}
    for turn in range(options.rounds):
        for name, extra in sides.items():
            job = jobs.job(name, extra)
            record = processes.measured(job, jobs.folder, f"{name}-{turn}", sys.executable)
            if record.skipped:
                raise UnequalError(f"{name}: {record.skipped}")
            equal.require_documents(name, record, jobs.documents)
            if options.dtype == "float32":
                _require_alike(name, record, numbers.get("ours", record))
            numbers[name] = record
            timed = record.steps[options.warmup :]
            once = record.numbers.get("reference_seconds", 0.0) / steps
            seconds[name].append(statistics.mean(step.seconds for step in timed) + once)
            print(f"round {turn + 1}, {name}: {seconds[name][-1]:.3f} s a step", file=sys.stderr, flush=True)
    real = statistics.mean(step.real_tokens for step in numbers["ours"].steps[options.warmup :])
    lines = [
        f"speed: {options.shape}, {options.dtype}, {options.threads} threads, {options.rounds} rounds of"
        f" {options.steps} steps of {options.pairs} pairs, {real:,.0f} real tokens a step",
        "",
        "| side | s a step | real tokens/s | times ours | peak GB | first loss |",
        "|---|---|---|---|---|---|",
    ]
    for name, each in seconds.items():
        ratios = [one / ours for one, ours in zip(each, seconds["ours"], strict=True)]
        middle, record = statistics.median(each), numbers[name]
        lines.append(
            f"| {name} | {middle:.3f} | {real / middle:,.0f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to"
            f" {max(ratios):.2f}) | {record.peak_bytes / 1e9:.2f} | {record.steps[0].loss:.4f} |"
        )
    return lines


class Jobs:
    """What each side is asked to do on the pairs of one file."""

    def __init__(
        self, options: argparse.Namespace, folder: Path, model: Path, dtype: str, steps: int, *, size: int
    ) -> None:
        self.options, self.model, self.dtype, self.steps = options, model, dtype, steps
        self.code = processes.fingerprint()
        self.folder = folder / self.code
        self.folder.mkdir(parents=True, exist_ok=True)
        with dist.start("cpu") as rt:
            cut = ("data.overlong=drop", f"data.max_length={options.max_length}")
            recipe = _recipe(options, "data.eval_fraction=null", *cut)
            examples = pairs.prepared(recipe, rt).train
        assert examples is not None
        found = list(pairs.pairs_of(examples))
        self.work = pairs.write_steps(self.folder / f"pairs-{steps}x{size}.json", found, steps, size)
        read = pairs.read_steps(str(self.work))
        self.documents = [pairs.documents(step) for step in read]
        self.start = work.starts(
            model, "lora", RANK, folder / f"{model.parent.name}-{model.name}.safetensors"
        )
        content = {
            "model": {"base": str(model), "dtype": dtype},
            "data": {"max_length": max(len(ids) for step in self.documents for ids, _ in step)},
            "objective": {"name": "dpo"},
            "adapter": LORA,
            "train": {
                "max_steps": steps, "batch_size": size, "learning_rate": LEARNING_RATE, "schedule": "constant",
                "warmup": 0,
            },
            "run": {"device": "cpu"},
        }  # fmt: skip
        self.recipe = self.folder / f"{model.name}-{steps}x{size}.yaml"
        self.recipe.write_text(yaml.safe_dump(content), encoding="utf-8")

    def job(self, name: str, extra: dict[str, Any]) -> Job:
        """Return what a side is asked to do."""
        module = "dpo_ours" if name.startswith("ours") else "dpo_trl"
        return Job(
            side=name, module=module, case="dpo", method="lora", dtype=self.dtype, device="cpu",
            model=str(self.model), tokenizer=str(TINY), work=str(self.work), start=str(self.start),
            recipe=str(self.recipe), steps=self.steps, warmup=self.options.warmup, threads=self.options.threads,
            learning_rate=LEARNING_RATE, rank=RANK, alpha=ALPHA, code=self.code, options={"adapter": LORA, **extra},
        )  # fmt: skip


def _recipe(options: argparse.Namespace, *overrides: str) -> Any:
    rows = [f"data.train={options.rows}", "data.eval=null"]
    return load_recipe(RECIPE, [*rows, *overrides])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description="Preference optimization, measured.")
    parser.add_argument("parts", nargs="+", choices=("tokens", "parity", "learn", "speed"))
    rows = ROOT.parent / "shared" / "data" / "dpo_en_demo.json"
    parser.add_argument("--rows", type=Path, default=rows, metavar="FILE", help="pairs of answers")
    parser.add_argument("--parity-steps", type=int, default=30)
    parser.add_argument(
        "--max-length", type=int, default=1024, help="longer pairs are left out of parity and speed"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="key=value", help="overrides for tokens and learn"
    )
    parser.add_argument("--shape", default="smollm-135m", choices=shapes.SHAPES)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--pairs", type=int, default=16, help="pairs of a step of speed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a measurement")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--results", type=Path, metavar="FOLDER", help="kept there; else in a folder that goes"
    )
    options = parser.parse_args(arguments)
    if not options.rows.is_file():
        parser.error(f"{options.rows}: no such file (--rows FILE: pairs of answers)")
    options.rows = options.rows.resolve()
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for and print it; return the exit code."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="preference-") as aside:
        folder = (options.results or Path(aside)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        parts = {
            "tokens": lambda: tokens(options),
            "parity": lambda: parity(options, folder),
            "learn": lambda: learn(options, folder),
            "speed": lambda: speed(options, folder),
        }
        try:
            for part in options.parts:
                print("\n".join(parts[part]()), flush=True)
        except (UnequalError, MeasurementFailed) as fault:
            print(f"error: {fault}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
