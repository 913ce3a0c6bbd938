"""A fresh process for each measurement, and environments for peers whose pins clash with ours."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from side_by_side.cases import Side
from side_by_side.records import STARTED, Job, Record

BENCHMARKS = Path(__file__).resolve().parent.parent
ROOT = BENCHMARKS.parent


class MeasurementFailed(Exception):
    """A process ended with a fault; the message has its last words."""


def measured(job: Job, folder: Path, name: str, python: str) -> Record:
    """Return what a fresh process measures; a measurement of the very same job is read where there is one.

    Raises:
        MeasurementFailed: the process did not end well.
    """
    path = folder / f"{name}.json"
    stored = path.with_suffix(".record.json")
    if stored.is_file() and json.loads(path.read_text(encoding="utf-8")) == asdict(job):
        return Record.read(stored)
    stored.unlink(missing_ok=True)
    job.write(path)
    run([python, "-m", f"side_by_side.{job.module}", str(path)], job.threads, path.with_suffix(".log"))
    return Record.read(stored)


def environment(threads: int) -> dict[str, str]:
    """Return the environment of a measured process, the same on every side."""
    count = str(threads)
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(ROOT)]),
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        STARTED: repr(time.monotonic()),
    }


def run(command: list[str], threads: int, log: Path) -> None:
    """Run a command to its end, what it says kept in `log`.

    Raises:
        MeasurementFailed: its exit code is not 0.
    """
    with log.open("w", encoding="utf-8") as words:
        done = subprocess.run(
            command, env=environment(threads), stdout=words, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise MeasurementFailed(
            f"exit {done.returncode}: {said[-1] if said else 'it said nothing'} (see {log})"
        )


def interpreter(name: str, side: Side, cache: Path, device: str, tell: Callable[[str], None]) -> str:
    """Return the Python that a side runs in, its environment made where it needs one of its own.

    Raises:
        MeasurementFailed: the side cannot run here; the message says why.
    """
    if side.cuda_only and device != "cuda":
        raise MeasurementFailed("it needs a CUDA device, and this run has none")
    if not side.own_environment:
        packages = ["trl", "peft", "datasets"] if side.module != "ours" else []
        packages += [need.partition("=")[0].replace("-", "_") for need in side.needs]
        if absent := [one for one in packages if importlib.util.find_spec(one) is None]:
            raise MeasurementFailed(f"{', '.join(absent)} not installed (pip install -e '.[dev]')")
        return sys.executable
    wanted = "\n".join([sys.version, *side.needs])
    folder = cache / "environments" / f"{side.module}-{hashlib.sha256(wanted.encode()).hexdigest()[:8]}"
    python = folder / "bin" / "python"
    stamp = folder / "installed"
    if not stamp.is_file():
        tell(f"{name}: installing {', '.join(side.needs)} into an environment of its own")
        steps = [[sys.executable, "-m", "venv", "--clear", str(folder)]]
        steps.append([str(python), "-m", "pip", "install", "--quiet", *side.needs])
        for step in steps:
            folder.parent.mkdir(parents=True, exist_ok=True)
            done = subprocess.run(step, capture_output=True, text=True, check=False)
            if done.returncode:
                said = (done.stderr or done.stdout).strip().splitlines()
                raise MeasurementFailed(f"cannot be installed: {said[-1] if said else step}")
        stamp.write_text(wanted, encoding="utf-8")
    return str(python)


def fingerprint() -> str:
    """Return a sha256 of all sources that are measured and that measure."""
    whole = hashlib.sha256()
    for path in sorted([*(ROOT / "lora_cli").rglob("*.py"), *BENCHMARKS.rglob("*.py")]):
        whole.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()[:16]
