"""Ours beside TRL, PEFT and LitGPT on the same work: tokens per second, memory, seconds to the first step.

    python benchmarks/peers.py                                          # every case, 5 rounds: hours
    python benchmarks/peers.py --cases gsm8k dora --peers trl-tuned peft-tuned --rounds 3
    python benchmarks/peers.py --cases dense --shape smallest --rounds 1   # seconds: whether it all works here
    python benchmarks/peers.py --cases scaling                          # ours alone, by length, batch, rank and width

Every measurement is a process of its own. In a round each case has each side in turn; a ratio is that of two sides in
the same round. Finished measurements are kept in `--results` and are not made again unless a source has changed, so
that an interrupted comparison goes on.

Work is equal or the run fails: each side is hashed for what its model was given in every step, and has our losses and
gradient norms. `side_by_side/` says how; the configurations are printed with the tables.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from side_by_side import equal, processes, report, scaling, shapes, starting
from side_by_side.cases import CASES, OURS, PEERS, Side, case_on
from side_by_side.jobs import LEARNING_RATE, Jobs
from side_by_side.processes import ROOT, MeasurementFailed
from side_by_side.records import Job, Record, UnequalError, read_work

BEGIN, END = "<!-- peers -->", "<!-- end of peers -->"


class Comparison:
    """The measurements of one run of this script."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        code = processes.fingerprint()
        self.name = options.model.name if options.model else options.shape
        self.folder = options.results / f"{code}-{self.name}-{options.dtype}-{options.threads}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.jobs = Jobs(options, self.folder, code)
        self.crashed = False
        self.rates: list[Record] = []
        self.starts: list[dict[str, float]] = []
        self.scaled: dict[scaling.Point, list[Record]] = {}
        self.cases: dict[str, report.Measured] = {}
        for name in (one for one in options.cases if one in CASES):
            documents = read_work(str(self.jobs.work(name)))
            self.cases[name] = report.Measured(
                name, case_on(options.device, name), documents, self.jobs.config, options.dtype
            )

    def round(self, number: int) -> None:
        """Measure everything once."""
        roofline = Side("roofline", "")
        if self.cases:
            job = self.jobs.job(next(iter(self.cases)), "roofline", roofline)
            self.rates.append(self.measure(job, f"roofline-{number}", roofline))
        for case, found in self.cases.items():
            for name, side in [("ours", OURS), *((name, PEERS[name]) for name in self.options.peers)]:
                if name not in found.skipped:
                    self.side(found, case, name, side, number)
        if "start" in self.options.cases:
            folder, with_trl = self.folder / "start", "trl" in self.options.peers
            found_seconds = starting.seconds(
                self.jobs.model, self.options.dtype, folder, self.options.threads, with_trl=with_trl
            )
            self.starts.append(found_seconds)
            self.tell(f"start: {', '.join(f'{name} {one:.2f} s' for name, one in found_seconds.items())}")
        if "scaling" in self.options.cases:
            for point in scaling.points():
                self.scale(point, number)

    def side(self, found: report.Measured, case: str, name: str, side: Side, number: int) -> None:
        """Measure one side of a case, and see that its work is the file's and its numbers are ours."""
        measured_as = case if name == "ours" else found.case.peers_of or case
        method = CASES[measured_as].method
        if name != "ours" and method not in side.methods:
            found.skipped[name] = f"it has no {method}"
            return
        if side.packs and found.case.data == "dense":
            found.skipped[name] = "all documents are of one length, there is nothing to pack"
            return
        job = self.jobs.job(measured_as, name, side)
        try:
            record = self.measure(job, f"{measured_as}-{name}-{number}", side)
        except MeasurementFailed as fault:
            if name == "ours":
                raise
            found.skipped[name] = str(fault)
            self.crashed |= str(fault).startswith("exit")
            self.tell(f"{case}: {name}: {fault}")
            return
        if record.skipped:
            found.skipped[name] = record.skipped
            self.tell(f"{case}: {name}: {record.skipped}")
            return
        title = f"{case}: {name}"
        equal.require_documents(title, record, found.work)
        if name != "ours":
            # TRL's loss leaves AdaLoRA's penalty out, and with it the penalty's gradient.
            norms = not (found.case.method == "adalora" and side.module != "peft_side")
            mine, rounded = found.sides["ours"][-1], side.rounds_loss
            equal.require_numbers(title, record, mine, self.options.dtype, norms=norms, rounded=rounded)
        found.sides.setdefault(name, []).append(record)
        found.warmup[name] = job.warmup
        steps = "; ".join(
            f"{one.sha256[:8]} {one.real_tokens} {one.labelled_tokens} loss {one.loss:.6f} {one.seconds:.3f} s"
            for one in record.steps
        )
        self.tell(f"round {number + 1}, {title}: {steps}; {record.peak_bytes / 1e9:.2f} GB")

    def scale(self, point: scaling.Point, number: int) -> None:
        """Measure ours at one setting."""
        job = self.jobs.point(point)
        record = self.measure(job, f"scaling-{point.name}-{number}", OURS)
        equal.require_documents(f"scaling: {point.name}", record, read_work(job.work))
        self.scaled.setdefault(point, []).append(record)
        self.tell(
            f"round {number + 1}, scaling, {point.along} {point.value}: {record.steps[-1].seconds:.3f} s"
        )

    def measure(self, job: Job, name: str, side: Side) -> Record:
        """Return a measurement, made or kept."""
        python = processes.interpreter(job.side, side, self.options.results, job.device, self.tell)
        return processes.measured(job, self.folder, name, python)

    def tell(self, line: str) -> None:
        """Say what was done."""
        print(line, file=sys.stderr, flush=True)

    def text(self) -> str:
        """Return all tables as Markdown."""
        options = self.options
        parts = [
            f"{self.name}, {options.dtype}, {options.device}, {options.threads} threads, {options.rounds} rounds of"
            f" {options.steps} timed steps after {options.warmup}; learning rate {LEARNING_RATE:g}."
            + " All sides compute in float32, whatever their configuration says."
            * (options.dtype == "float32")
        ]
        parts[0] += f" {report.machine(options.device)}"
        rows = report.goal_rows(self.cases, self.rates) + (
            report.start_rows(self.starts) if self.starts else []
        )
        parts += [report.goal_table(rows)] if rows else []
        parts += [report.share_lines(self.cases, self.rates)] if self.cases else []
        for case, found in self.cases.items():
            parts.append(report.case_table(found))
            parts += [report.restart_line(found)] if case == "relora" else []
        parts += [report.scaling_table(self.scaled, options.warmup)] if self.scaled else []
        sides = dict.fromkeys(side for found in self.cases.values() for side in found.sides)
        parts += [report.configurations(sides)] if sides else []
        return "\n\n".join(parts)


def write(text: str) -> None:
    """Put the tables into docs/performance.md, between its two marks."""
    page = ROOT / "docs" / "performance.md"
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description="Run ours and the peers on the same work, side by side.")
    names = [*CASES, "start", "scaling"]
    parser.add_argument("--cases", nargs="+", default=names[:-1], choices=names)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a measurement")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--length", type=int, default=512, help="tokens of a document of the dense case")
    parser.add_argument("--shape", default="smollm-135m", choices=shapes.SHAPES)
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="in place of a random one of --shape")
    rows = ROOT.parent / "shared" / "data" / "gsm8k.train.jsonl"
    parser.add_argument("--rows", type=Path, default=rows, metavar="FILE", help="GSM8K: question and answer")
    parser.add_argument("--step-tokens", type=int, default=8192, help="most tokens of a step of these rows")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "peers", metavar="FOLDER")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    options = parser.parse_args(arguments)
    options.results = options.results.resolve()
    if options.model is not None:
        options.model = options.model.resolve()
        if "start" in options.cases and not (options.model / "tokenizer.json").is_file():
            parser.error(f"{options.model}: has no tokenizer.json, which the case start needs")
    answers = [name for name in options.cases if name in CASES and CASES[name].data == "answers"]
    if answers and not options.rows.is_file():
        parser.error(
            f"{options.rows}: no such file, and {', '.join(answers)} train on its rows (--rows FILE)"
        )
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for and print the tables as Markdown; return the exit code."""
    options = parse(arguments)
    try:
        comparison = Comparison(options)
        for number in range(options.rounds):
            comparison.round(number)
    except (UnequalError, MeasurementFailed, ValueError) as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 1
    text = comparison.text()
    print(text, flush=True)
    if options.write:
        write(text)
    return int(comparison.crashed)


if __name__ == "__main__":
    sys.exit(main())
