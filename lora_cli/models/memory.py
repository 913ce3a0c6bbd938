"""Memory: how much is free, how a want of it is told from other faults, and how large a pass may be."""

from __future__ import annotations

import gc
import math
import re
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_cli.errors import ResourceError
from lora_cli.types import Batch, Examples

_SIGNS = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)
"""What a RuntimeError says that means a want of memory: of torch's allocator on a CPU, of CUDA and its libraries."""


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether a fault is a want of memory, of the GPU or of the machine."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def peak_memory(device: torch.device) -> int:
    """Return the most memory this process has held, in bytes: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_memory(device: torch.device) -> float:
    """Return the bytes that this process could still take: of the GPU, or of the machine within its limits.

    A CPU's are what the kernel calls available, at most what the control groups and the address space leave; inf where
    nothing says how much that is.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return min(
        [_available(Path("/proc/meminfo")), *_left_in_groups(Path("/proc/self/cgroup")), _address_space()]
    )


def _available(meminfo: Path) -> float:
    try:
        found = re.search(r"^MemAvailable: +(\d+) kB", meminfo.read_text(), re.MULTILINE)
    except OSError:
        return math.inf
    return int(found[1]) * 1024 if found else math.inf


def _left_in_groups(membership: Path, mounts: Path = Path("/sys/fs/cgroup")) -> Iterator[float]:
    """Yield what each control group above this process leaves: version 2, or the memory controller of version 1."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        limit, usage = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else _VERSION_2
        root = mounts / controllers
        # Within a container the path may be that of the host, whose folders are not seen: the root is the container's.
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                yield _left(folder, limit, usage)


_VERSION_2 = ("memory.max", "memory.current")


def _left(folder: Path, limit: str, usage: str) -> float:
    try:
        bound, used = ((folder / name).read_text().strip() for name in (limit, usage))
        stat = (folder / "memory.stat").read_text()
    except OSError:
        return math.inf
    # Pages of files count as used, and are given back where memory is wanted.
    files = [int(size) for size in re.findall(r"^(?:total_)?inactive_file (\d+)$", stat, re.MULTILINE)]
    return math.inf if bound == "max" else int(bound) - int(used) + max(files, default=0)


def _address_space() -> float:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return math.inf
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return float(limit - mapped)


def forget(device: torch.device) -> None:
    """Give back what a failed pass held: it lives on in its frames until the fault is forgotten, and in cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass
class Attempt:
    """Whether a block had the memory it needed."""

    failed: bool = False


@contextmanager
def attempt() -> Iterator[Attempt]:
    """Within it a want of memory ends the block and is noted; any other fault is raised."""
    tried = Attempt()
    try:
        yield tried
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        tried.failed = True


class PassSize:
    """Tokens of a forward pass, padding counted: at most `tokens`, which shrinks where a pass does not fit.

    `passes` is what they are called in messages, `remedy` what a user can change.
    """

    def __init__(self, tokens: int, passes: str, remedy: str, log: Callable[[str], None]) -> None:
        self.tokens = tokens
        self._passes, self._remedy, self._log = passes, remedy, log

    def halve(self, batch: Batch, examples: Examples) -> None:
        """Make room after the pass of a batch failed; its rows are those of `examples`.

        Raises:
            ResourceError: it was one row.
        """
        lengths = [int(examples.lengths[row]) for row in batch.rows]
        first = examples.where(batch.rows[0])
        self.halve_pass(lengths, batch.input_ids.numel(), first, batch.input_ids.device)

    def halve_pass(self, lengths: Sequence[int], tokens: int, first: str, device: torch.device) -> None:
        """Make room after a pass of rows of these `lengths` failed: `tokens` in all, `first` is where a row stands.

        Raises:
            ResourceError: it was one row.
        """
        rows, longest = len(lengths), max(lengths)
        forget(device)
        if rows == 1:
            raise ResourceError(
                f"{self._passes}: out of memory: one row of {longest:,} tokens does not fit: {first}; at most"
                f" {peak_memory(device) / 1e9:.2f} GB were held ({self._remedy})"
            )
        self.tokens = min(self.tokens, tokens * ((rows + 1) // 2) // rows)
        self._log(
            f"{self._passes}: {rows} rows of up to {longest:,} tokens do not fit into memory; from here on at most"
            f" {self.tokens:,} tokens at once"
        )
