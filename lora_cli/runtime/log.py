"""What the user sees while a run goes on, and metrics.jsonl.

On a terminal a progress line is kept alive under the messages; elsewhere every message is a plain line. Only the main
process speaks.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from lora_cli.disk import writing
from lora_cli.redaction import redacted

METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"


class Log:
    """Messages on stdout, and metric lines in the run folder once it exists."""

    def __init__(self, *, speaks: bool) -> None:
        self.speaks = speaks
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._metrics: IO[str] | None = None
        self._rollouts: Path | None = None

    def line(self, text: str) -> None:
        """Print one message."""
        if self.speaks:
            self.console.print(redacted(text), markup=False)

    def table(self, table: Table) -> None:
        """Print a table."""
        if self.speaks:
            self.console.print(table)

    def open_metrics(self, folder: Path, *, keep_steps: int) -> None:
        """Open metrics.jsonl for appending after dropping the lines of steps beyond `keep_steps`.

        rollouts.jsonl, if there is one, is cut alike.

        Raises:
            ResourceError: it cannot be written.
        """
        if not self.speaks:
            return
        path = folder / METRICS_FILE
        with writing(path):
            if path.exists():
                _cut(path, keep_steps)
            self._metrics = path.open("a", encoding="utf-8")
        self._rollouts = folder / ROLLOUTS_FILE
        with writing(self._rollouts):
            if self._rollouts.exists():
                _cut(self._rollouts, keep_steps)

    def metrics(self, values: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl.

        Raises:
            ResourceError: it cannot be written.
        """
        if self._metrics is not None:
            with writing(Path(self._metrics.name)):
                self._metrics.write(json.dumps(values) + "\n")
                self._metrics.flush()

    def rollouts(self, lines: Sequence[str]) -> None:
        """Append lines to rollouts.jsonl, which the first of them makes.

        Raises:
            ResourceError: they cannot be written.
        """
        if self._rollouts is not None and lines:
            with writing(self._rollouts), self._rollouts.open("a", encoding="utf-8") as file:
                file.write("".join(line + "\n" for line in lines))

    def start_progress(self, total: int, done: int, unit: str = "step") -> None:
        """Show a progress line, on a terminal."""
        if not (self.speaks and self.console.is_terminal):
            return
        self._progress = Progress(
            TextColumn(unit),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}"),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._task = self._progress.add_task(unit, total=total, completed=done, status="")
        self._progress.start()

    def advance(self, done: int, status: str) -> None:
        """Move the progress line to `done` and show `status` in it."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, status=status)

    def stop_progress(self) -> None:
        """Remove the progress line."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def close(self) -> None:
        """Close what is open."""
        self.stop_progress()
        if self._metrics is not None:
            metrics, self._metrics = self._metrics, None
            # What could not be written is tried again, and fails again; it was told the first time.
            with suppress(OSError):
                metrics.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Stopwatch:
    """Seconds since it was made or last asked, by a clock that never runs backwards."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last lap, and start the next."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds


def _cut(path: Path, step: int) -> None:
    """Cut off the lines after `step`, and one that a crash cut short: at once, and reading no more than goes.

    The steps of the lines never fall. Written anew, a file of 10^6 lines would cost seconds, and a kill meanwhile all.
    """
    with path.open("r+b") as file:
        if not file.seek(0, os.SEEK_END):
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            end = text.rfind(b"\n") + 1
            while end:
                start = text.rfind(b"\n", 0, end - 1) + 1
                if step and _step_of(text[start:end]) <= step:
                    break
                end = start
        file.truncate(end)


def _step_of(line: bytes) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize  # a line cut short by a crash is not kept
