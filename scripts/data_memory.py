"""How much resident memory the preparation of a large file needs beyond that of one a hundredth its size.

    python scripts/data_memory.py [MEGABYTES=100] [KIND ...]

For each kind of file (jsonl, json, csv, gz, txt) a process of its own prepares a file of MEGABYTES / 100 and one of
MEGABYTES, on one core, and the difference of their peaks is printed (goal: below 200 MB), with the rate. Of a .jsonl
file it is also checked, row by row, that every part names the right line.
"""

from __future__ import annotations

import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

KINDS = ("jsonl", "json", "csv", "gz", "txt")
GOAL = 200.0


class Alone:
    """The only process of a run."""

    def in_main(self, work: Callable[[], None]) -> None:
        """Do the work."""
        work()


def rows(size: int) -> Iterator[str]:
    """Yield texts of unequal lengths that are unlike each other, about `size` bytes in all."""
    number = 0
    while size > 0:
        words = " ".join(f"word{(number * 7919 + place * 104729) % 9973}" for place in range(5 + number % 60))
        yield f"row {number}: {words}"
        size -= len(words) + 30
        number += 1


def write(folder: Path, kind: str, size: int) -> Path:
    """Write a file of rows and return it."""
    path = folder / f"rows-{size}.{'jsonl.gz' if kind == 'gz' else kind}"
    with path.open("wb") as raw, gzip.open(raw, "wb", 1) if kind == "gz" else nullcontext(raw) as file:
        file.write({"json": b"[", "csv": b"text\n"}.get(kind, b""))
        for number, text in enumerate(rows(size)):
            line = text if kind in ("txt", "csv") else json.dumps({"text": text})
            file.write(f"{',' if kind == 'json' and number else ''}{line}\n".encode())
        file.write(b"]" if kind == "json" else b"")
    return path


def prepare_here(path: Path) -> tuple[float, float]:
    """Prepare a file in this process; return the peak of resident memory in MB, and the seconds it took."""
    from lora_cli.models.load import load_tokenizer
    from lora_cli.models.safety import TINY
    from lora_cli.recipe.schema import Data
    from lora_cli.stages import prepare

    tokenizer = load_tokenizer(TINY)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    began = time.monotonic()
    train = prepare.run(Data(train=str(path)), "assistant", tokenizer, Alone(), lambda _: None).train
    took = time.monotonic() - began
    assert train is not None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    if path.suffix == ".jsonl":
        for row in range(0, len(train), 97):
            place = f"{path}:{row + 1}"
            assert train.where(row) == place, (train.where(row), place)
            assert tokenizer.decode(train[row].answers()[0].input_ids).startswith(f"row {row}: "), place
    return peak, took


def measure(kind: str, megabytes: float) -> float:
    """Return the MB of resident memory that the larger of two files adds, and print it."""
    peaks = []
    with tempfile.TemporaryDirectory() as name:
        for size in (megabytes * 1e4, megabytes * 1e6):
            path = write(Path(name), kind, int(size))
            done = subprocess.run(
                [sys.executable, __file__, "--prepare", str(path)],
                env=os.environ | {"LORA_CLI_CACHE": str(Path(name) / "cache")},
                capture_output=True,
                text=True,
                check=True,
            )
            peak, took = map(float, done.stdout.split())
            peaks.append(peak)
    print(
        f"{kind:>5}: {peaks[0]:.0f} MB for {megabytes / 100:g} MB of rows, {peaks[1]:.0f} MB for {megabytes:g} MB:"
        f" {peaks[1] - peaks[0]:+.0f} MB, {megabytes / took:.1f} MB/s",
        flush=True,
    )
    return peaks[1] - peaks[0]


def main() -> int:
    """Measure every kind; return 1 if one needs more than the goal."""
    if sys.argv[1:2] == ["--prepare"]:
        print(*prepare_here(Path(sys.argv[2])))
        return 0
    megabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 100.0
    return int(max(measure(kind, megabytes) for kind in sys.argv[2:] or KINDS) >= GOAL)


if __name__ == "__main__":
    sys.exit(main())
