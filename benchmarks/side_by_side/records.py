"""What a process of the comparison is asked to do, and what it measured of each optimizer step.

A step's seconds run from the end of the update before it to the end of its own, on every side, so that reading rows,
collation, all passes, clipping and the update are in them. On a GPU the device is waited for at that point.

What a step consumed is taken from the tensors that the model is given, not from the file: documents are cut out of
padded or packed batches, and hashed after the last step.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

IGNORED = -100
STARTED = "SIDE_BY_SIDE_STARTED"
"""Environment variable with the monotonic clock, in seconds, at which the process was started."""

Document = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""Token ids and labels, (T,) each; IGNORED where a token is not trained."""


class UnequalError(Exception):
    """A side cannot do the case's work, or did another; the message says why."""


@dataclass(frozen=True)
class Job:
    """One measurement."""

    side: str
    module: str
    case: str
    method: str
    dtype: str
    device: str
    model: str
    tokenizer: str
    work: str
    start: str | None
    recipe: str
    steps: int
    """Steps in all, the first `warmup` of which are not timed."""
    warmup: int
    threads: int
    learning_rate: float
    rank: int
    alpha: float
    code: str
    """Fingerprint of the sources that are measured."""
    options: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Store it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Step:
    """What a side did in an optimizer step."""

    sha256: str
    """Of the documents, sorted: the gradient is a sum over them, so their order within the step is free."""
    real_tokens: int
    labelled_tokens: int
    loss: float
    grad_norm: float
    seconds: float


@dataclass(frozen=True)
class Record:
    """What a process measured. With `skipped` it could not do the work, and the rest is empty."""

    steps: list[Step]
    first_step_seconds: float
    """From the start of the process to the end of its first update."""
    peak_bytes: int
    """Most memory: VmHWM of the process, or what the GPU had allocated."""
    reserved_bytes: int = 0
    numbers: dict[str, float] = field(default_factory=dict)
    skipped: str | None = None

    @classmethod
    def read(cls, path: Path) -> Record:
        """Return what `write` stored."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**values | {"steps": [Step(**step) for step in values["steps"]]})

    def write(self, path: Path) -> None:
        """Store it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def read_work(path: str) -> list[list[Document]]:
    """Return the documents of every step of a file that `work.py` wrote."""
    steps = json.loads(Path(path).read_text(encoding="utf-8"))["steps"]
    return [[(np.asarray(ids), np.asarray(labels)) for ids, labels in step] for step in steps]


def digest(documents: list[Document]) -> tuple[str, int, int]:
    """Return sha256, real tokens and labelled tokens; the first token of a document has no prediction."""
    whole = hashlib.sha256()
    for one in sorted(_bytes(*document) for document in documents):
        whole.update(len(one).to_bytes(8, "little") + one)
    labelled = sum(int((labels[1:] != IGNORED).sum()) for _, labels in documents)
    return whole.hexdigest(), sum(len(ids) for ids, _ in documents), labelled


def _bytes(ids: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> bytes:
    return np.stack([ids, np.concatenate([[IGNORED], labels[1:]])]).astype("<i8").tobytes()


def documents_of(ids: Any, labels: Any, *, mask: Any = None, positions: Any = None) -> Iterator[Document]:
    """Yield the documents in tensors (B, T): padded by `mask`, or packed with `positions` from 0 in each document."""
    ids, labels = ids.cpu().numpy(), labels.cpu().numpy()
    if positions is not None:
        starts = np.flatnonzero(positions.cpu().numpy()[0] == 0)
        yield from zip(np.split(ids[0], starts[1:]), np.split(labels[0], starts[1:]), strict=True)
        return
    kept = np.ones(ids.shape, bool) if mask is None else mask.cpu().numpy().astype(bool)
    for row, real in enumerate(kept):
        yield ids[row][real], labels[row][real]


class Recorder:
    """Collects what the steps of this process did."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.seen: list[list[dict[str, Any]]] = [[]]
        self.loss: Any = 0.0
        self.norm: Any = float("nan")
        self.ends: list[tuple[float, float, float]] = []
        self.began = 0.0
        self.numbers: dict[str, float] = {}
        """What a process measures besides, by name."""

    def begin(self) -> None:
        """Say that the first step begins."""
        self.began = time.monotonic()

    def see(self, ids: Any, labels: Any, *, mask: Any = None, positions: Any = None) -> None:
        """Remember a batch that the model is given."""
        self.seen[-1].append({"ids": ids, "labels": labels, "mask": mask, "positions": positions})

    def add_loss(self, loss: Any) -> None:
        """Add a micro-batch's share of the step's mean loss."""
        self.loss = self.loss + loss

    def end(self) -> None:
        """Say that a step's update is done."""
        loss, norm = float(self.loss), float(self.norm)
        if self.job.device == "cuda":
            import torch

            torch.cuda.synchronize()
        self.ends.append((time.monotonic(), loss, norm))
        self.seen.append([])
        self.loss = 0.0

    def record(self) -> Record:
        """Return what was measured."""
        peak, reserved = peak_memory(self.job.device)
        before, steps = self.began, []
        for (ended, loss, norm), batches in zip(self.ends, self.seen, strict=False):
            found = digest([one for batch in batches for one in documents_of(**batch)])
            steps.append(Step(*found, loss, norm, ended - before))
            before = ended
        started = float(os.environ.get(STARTED, self.began))
        first = self.ends[0][0] - started if self.ends else 0.0
        return Record(steps, first, peak, reserved, self.numbers)


def peak_memory(device: str) -> tuple[int, int]:
    """Return the most bytes that this process had at once, and on a GPU what torch reserved."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024, 0


def measure(side: Callable[[Job, Recorder], None]) -> None:
    """Do the job that the command line names, and write what was measured beside it."""
    path = Path(sys.argv[1])
    job = Job(**json.loads(path.read_text(encoding="utf-8")))
    import torch

    torch.set_num_threads(job.threads)
    recorder = Recorder(job)
    try:
        side(job, recorder)
        record = recorder.record()
    except UnequalError as fault:
        record = Record([], 0.0, 0, skipped=str(fault))
    record.write(path.with_suffix(".record.json"))
