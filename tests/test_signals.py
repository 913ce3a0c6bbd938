"""SIGINT and SIGTERM at random moments of every phase of a real run: the same command ends in the same bytes.

What is awaited before a signal is sent is what a phase shows from outside: a line, or a hidden folder being written.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from command_line import run_here
from toy import rows, write_base, write_recipe, write_rows

from lora_cli.manifest import verify

SETTINGS: dict[str, Any] = {
    "adapter": {"method": "lora", "rank": 4, "dropout": 0.1, "init": "eva"},
    "train__max_steps": 4,
    "train__batch_size": 128,
    "train__micro_batch_tokens": 256,
    "train__eval_every": 2,
    "train__save_every": 1,
    "train__keep_checkpoints": 9,
    "evaluate__metrics": ["loss", "exact_match"],
    "evaluate__max_generated_rows": 16,
    "export__formats": ["peft", "merged"],
}
TOTAL = SETTINGS["train__max_steps"]


@dataclass
class Process:
    """A real command, and the lines it has printed so far."""

    command: list[str]
    cache: Path
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Start it."""
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "LORA_CLI_CACHE": str(self.cache)},
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    def wait_for(self, seen: Callable[[], object]) -> None:
        """Return once something is seen; the process may have ended by then."""
        deadline = time.monotonic() + 300
        while not seen() and self.process.poll() is None:
            if time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(self.lines)
            time.sleep(0.0005)

    def says(self, pattern: str) -> bool:
        """Say whether a line has a match."""
        return any(re.search(pattern, line) for line in list(self.lines))

    def end(self, number: int) -> tuple[int, str]:
        """Send a signal, and return the exit code and what stands on stderr."""
        self.process.send_signal(number)
        code = self.process.wait(120)
        self._reader.join(10)
        assert self.process.stderr is not None
        return code, self.process.stderr.read()


def in_training(run: Path, cache: Path, done: Process, step: int) -> bool:
    """Say whether a step is done."""
    del run, cache
    return done.says(rf"^step +{step}/")


Seen = Callable[[Path, Path, Process], object]
PHASES: dict[str, tuple[Seen, float]] = {
    # What announces the phase, and how long after it the signal comes at most, in seconds.
    "imports": (lambda run, cache, done: done.says("sft with lora"), 1.0),
    "tokenization": (lambda run, cache, done: list(cache.glob("tokens/.tmp-*")), 0.02),
    "start": (lambda run, cache, done: done.says(r"^data\.eval: "), 0.15),
    "first step": (lambda run, cache, done: (run / "metrics.jsonl").exists(), 0.15),
    "accumulation": (lambda run, cache, done: done.says(r"^step +1/"), 0.25),
    "evaluation meanwhile": (lambda run, cache, done: done.says(r"^step +2/"), 0.1),
    "save": (lambda run, cache, done: list(run.glob("checkpoints/.tmp-step-3-*")), 0.005),
    "last step": (lambda run, cache, done: done.says(r"^step +3/"), 0.4),
    "evaluation": (lambda run, cache, done: (run / f"checkpoints/step-{TOTAL}").exists(), 0.3),
    "export": (lambda run, cache, done: list(run.glob(".tmp-adapter-*")), 0.1),
}


@dataclass
class Job:
    """A recipe's parts that all runs share, and what a run that was never stopped left."""

    folder: Path
    base: Path
    results: dict[str, bytes]

    def recipe(self, folder: Path, *more: str) -> Path:
        """Write the recipe of a run in a folder; `more` are training files besides the first."""
        train = [str(self.folder / f"{name}.jsonl") for name in ("a", *more)]
        return write_recipe(
            folder, self.base, data__train=train, data__eval=str(self.folder / "held.jsonl"), **SETTINGS
        )


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Return the job, run once without a signal."""
    folder = tmp_path_factory.mktemp("signals")
    for name, number in (("a", 800), ("b", 800), ("held", 120)):
        content = rows(number)
        for index, row in enumerate(content):
            row["prompt"] += f" {name} {index}"
        write_rows(folder / f"{name}.jsonl", content)
    found = Job(folder, write_base(folder / "base"), {})
    recipe = found.recipe(folder / "straight")
    process = Process([sys.executable, "-m", "lora_cli", str(recipe)], folder / "cache")
    assert process.process.wait(300) == 0, process.process.stderr
    found.results = results_of(folder / "straight" / "run")
    return found


def results_of(run: Path) -> dict[str, bytes]:
    """Return all that a run came to: every exported file that holds no path of its own, answers, scores and losses."""
    names = [
        "adapter/adapter_model.safetensors",
        "merged/model.safetensors",
    ]
    found = {name: (run / name).read_bytes() for name in [*names, "generations.jsonl"]}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("tokens_per_second", None)
    summary = json.loads((run / "summary.json").read_text())
    return found | {"metrics": repr(lines).encode(), "scores": repr(summary["eval"]).encode()}


@pytest.mark.reliability("signals")
@pytest.mark.cases(10, 50)
def test_a_signal_in_any_phase_loses_at_most_a_step(
    case: int, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a random moment of each phase a signal ends the run with 130 or 143 and one line, every public folder
    verifies, the last full step is saved, and the same command ends in the bytes of the run that was never stopped."""
    draw = random.Random(case)
    phase, (seen, most) = list(PHASES.items())[case % len(PHASES)]
    number = (signal.SIGINT, signal.SIGTERM)[(case + case // len(PHASES)) % 2]
    cache = tmp_path / "cache" if phase == "tokenization" else job.folder / "cache"
    for _ in range(5):
        recipe, run = job.recipe(tmp_path), tmp_path / "run"
        process = Process([sys.executable, "-m", "lora_cli", str(recipe)], cache)
        process.wait_for(lambda process=process, run=run: seen(run, cache, process))
        time.sleep(draw.uniform(0, most))
        code, errors = process.end(number)
        if not process.says("^done: "):
            break
        # On a machine under load the signal may come after the end: once more, sooner.
        most /= 2
        shutil.rmtree(run)
        if cache != job.folder / "cache":
            shutil.rmtree(cache)
    assert code == 128 + number, (phase, process.lines, errors)
    assert re.fullmatch(rf"error: stopped by signal {int(number)}[ ,].*\n", errors), (phase, errors)
    assert not list(tmp_path.rglob(".tmp-*")), phase
    published = [folder for folder in run.glob("*") if (folder / "manifest.json").exists()]
    published += list(run.glob("checkpoints/*"))
    for folder in [*published, *cache.glob("tokens/*")]:
        verify(folder)
    assert not (run / "summary.json").exists()
    made = [int(step) for line in process.lines for step in re.findall(r"^step +(\d+)/", line)]
    saved = [int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/*")]
    assert max(saved, default=0) >= max(made, default=0), (phase, errors)

    monkeypatch.setenv("LORA_CLI_CACHE", str(cache))
    again = run_here(capsys, "train", str(recipe))
    assert again.code == 0, (phase, again.errors)
    if phase in ("evaluation", "export"):
        assert not re.search(r"^step ", again.output, re.MULTILINE)
    found = results_of(run)
    assert [name for name, value in job.results.items() if found[name] != value] == [], phase


def test_workers_end_with_the_command(job: Job, tmp_path: Path) -> None:
    """A signal while several processes tokenize leaves none of them, and nothing half-written in the cache."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core: the rows are tokenized in the main process")
    cache = tmp_path / "cache"
    recipe = job.recipe(tmp_path, "b")
    several = "from lora_cli.data import processes; processes.CORES = 1"
    command = f"{several}; from lora_cli.cli import train_main; raise SystemExit(train_main())"
    process = Process([sys.executable, "-c", command, str(recipe)], cache)
    children: set[int] = set()

    def started() -> bool:
        children.update(children_of(process.process.pid))
        return len(children) >= 3  # two workers, and the tracker of what they share

    process.wait_for(started)
    time.sleep(0.3)
    # As Ctrl-C does: to every process of the terminal's group.
    for pid in [process.process.pid, *children]:
        os.kill(pid, signal.SIGINT)
    code = process.process.wait(120)
    assert process.process.stderr is not None
    assert (code, process.process.stderr.read()) == (
        130,
        "error: stopped by signal 2, nothing was left half-written\n",
    )
    deadline = time.monotonic() + 10
    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, children))
    assert not list(cache.glob("tokens/.tmp-*"))
    for folder in cache.glob("tokens/*"):
        verify(folder)
    assert not (tmp_path / "run").exists()


def children_of(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    try:
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def is_running(pid: int) -> bool:
    """Say whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_two_processes_stop_as_one(job: Job, tmp_path: Path) -> None:
    """Under torchrun a signal ends both processes, one of them tells, the state is saved once, and the run goes on."""
    recipe, run = job.recipe(tmp_path), tmp_path / "run"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    endpoint = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    command = [*torchrun, *endpoint, "-m", "lora_cli", str(recipe)]
    process = Process(command, job.folder / "cache")
    process.wait_for(lambda: in_training(run, job.folder, process, 1))
    time.sleep(0.1)
    workers = children_of(process.process.pid)
    _, errors = process.end(signal.SIGTERM)
    told = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    step = int(re.fullmatch(r"error: stopped by signal 15 after step (\d) of 4, saved", told[0])[1])  # type: ignore[index]
    assert not any(map(is_running, workers))
    saved = sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())
    assert saved == list(range(1, step + 1))
    again = Process(command, job.folder / "cache")
    assert again.process.wait(120) == 0
    again._reader.join(10)
    assert again.says(f"continuing after step {step}")
    losses = [
        [line["loss"] for line in map(json.loads, (each / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
        for each in (run, job.folder / "straight" / "run")
    ]  # fmt: skip
    assert len(losses[0]) == TOTAL


@pytest.mark.parametrize(
    ("command", "number", "code"),
    [("eval", signal.SIGINT, 130), ("merge", signal.SIGTERM, 143), ("data", signal.SIGINT, 130)],
)
def test_the_other_commands_stop_too(
    job: Job, tmp_path: Path, command: str, number: signal.Signals, code: int
) -> None:
    """`lora eval`, `lora merge` and `lora data` end with 130 or 143 and one line, and leave nothing half-written."""
    run = job.folder / "straight" / "run"
    page = tmp_path / "page.html"
    arguments = {
        "eval": ["eval", str(run)],
        "merge": ["merge", str(run), "--output", str(tmp_path / "merged")],
        "data": ["data", str(job.recipe(tmp_path)), "--html", str(page)],
    }[command]
    call = "import sys; from lora_cli.cli import main; sys.exit(main())"
    process = Process([sys.executable, "-c", call, *arguments], tmp_path / "cache")
    signs: dict[str, Callable[[], object]] = {
        "eval": lambda: list(tmp_path.glob("cache/tokens/.tmp-*")),
        "merge": lambda: list(tmp_path.glob(".tmp-merged-*")),
        "data": lambda: list(tmp_path.glob("cache/tokens/.tmp-*")),
    }
    process.wait_for(signs[command])
    assert process.end(number) == (
        code,
        f"error: stopped by signal {int(number)}, nothing was left half-written\n",
    )
    assert not (tmp_path / "merged").exists()
    assert not page.exists()
    assert not list(tmp_path.rglob(".tmp-*"))
