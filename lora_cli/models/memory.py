"""Out of memory: how it is told from other faults, and the size of a forward pass, halved where one does not fit."""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

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
        # What the failed pass held lives on in its frames until the fault is forgotten; cycles among them need this.
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
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
