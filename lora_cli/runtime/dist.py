"""The processes of a run: one, or several started by torchrun. Device, sums over processes, one writer.

Data parallelism needs no wrapper here: the loss is a sum, each process adds its rows' gradients, and one all-reduce
before the update makes the total. gloo on CPU, NCCL on CUDA.

Signals are handled in `interrupts.py`; here the processes agree on whether one of them was asked to stop.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from lora_cli import interrupts
from lora_cli.errors import InputError, LoraError, Stopped

_EXACT_WORKSPACES = (":4096:8", ":16:8")
"""Values of CUBLAS_WORKSPACE_CONFIG with which cuBLAS repeats its bits."""
_PATIENCE = timedelta(minutes=60)
_groups = itertools.count()
"""Numbers of the process groups that a command has one after the other, the same in all of its processes."""


@dataclass
class Runtime:
    """This process among `world_size`."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """True in the one process that writes."""
        return self.rank == 0

    def in_main(self, work: Callable[[], None]) -> None:
        """Do `work` in the main process while the others wait; where it fails, every process raises."""
        fault: LoraError | None = None
        if self.is_main:
            try:
                work()
            except LoraError as error:
                fault = error
        (failed,) = self.sum([float(fault is not None)])
        if fault is not None:
            raise fault
        if failed:
            raise InputError("the main process found a fault, see its message")

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return each value summed over all processes, in float64: exact for counts."""
        if self.world_size == 1:
            return list(values)
        # NCCL reduces only tensors on the GPU; float64 holds any token count exactly.
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        return tensor.tolist()

    def sum_tensors(self, tensors: list[Tensor]) -> None:
        """Sum each tensor over all processes, in place, by one flat all-reduce."""
        if self.world_size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def from_main(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite each tensor, which has the same shape in all processes, with the main process's."""
        if self.world_size > 1:
            for tensor in tensors:
                whole = tensor.contiguous()
                torch.distributed.broadcast(whole, src=0)
                tensor.copy_(whole)

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Return the values of every process by its rank, equally many of each, in float64."""
        slots = [0.0] * (len(values) * self.world_size)
        slots[self.rank * len(values) : (self.rank + 1) * len(values)] = values
        every = self.sum(slots)
        return [every[first : first + len(values)] for first in range(0, len(every), len(values))]

    def gather_bytes(self, content: bytes) -> list[bytes]:
        """Return what every process has, by its rank."""
        sizes = [int(size) for (size,) in self.gather([float(len(content))])]
        slots = torch.zeros(self.world_size, max(*sizes, 1), dtype=torch.uint8, device=self.device)
        slots[self.rank, : len(content)] = torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8)[
            : len(content)
        ]
        self.sum_tensors([slots])
        return [bytes(row[:size].tolist()) for row, size in zip(slots, sizes, strict=True)]

    @property
    def stopping(self) -> bool:
        """Whether this process was asked to stop; another one may not have been yet."""
        return interrupts.asked() != 0

    def stop_requested(self) -> int:
        """Return the number of a signal that any process was asked to stop by, the same in all of them; 0 for none."""
        return max(int(number) for (number,) in self.gather([float(interrupts.asked())]))


@contextmanager
def start(device: str, *, deterministic: bool = False) -> Iterator[Runtime]:
    """Join the process group that torchrun announces in the environment, or be the only process.

    With `deterministic` torch computes by algorithms that repeat their bits on a GPU; on a CPU it does so anyway.

    Raises:
        InputError: `cuda` was asked for and there is none, or an operation has no deterministic algorithm.
        Stopped: SIGINT or SIGTERM came where nothing deferred it.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    try:
        with interrupts.handled(), _deterministic(deterministic):
            chosen = _device(device)
            if world_size > 1:
                backend = "nccl" if chosen.type == "cuda" else "gloo"
                # A prefix of its own: of an earlier group in these processes the store still has the addresses.
                store = torch.distributed.PrefixStore(f"group {next(_groups)}", _store())
                torch.distributed.init_process_group(
                    backend, store=store, rank=rank, world_size=world_size, timeout=_PATIENCE
                )
            try:
                yield Runtime(chosen, rank, world_size)
            except LoraError:
                raise
            except Exception:
                # Of processes that are stopped together, one that waits for another finds it gone.
                interrupts.check()
                raise
            finally:
                if world_size > 1:
                    torch.distributed.destroy_process_group()
    except interrupts.Interrupted as stop:
        raise Stopped(str(stop), stop.number) from None


@cache
def _store() -> torch.distributed.Store:
    """Return where the processes that torchrun started find each other."""
    store: torch.distributed.Store
    store, _, _ = next(rendezvous("env://", timeout=_PATIENCE))
    return store


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("run.device: cuda was asked for, but no CUDA device is available (use cpu or auto)")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(chosen)
    return chosen


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    # cuBLAS reads it once, when CUDA starts in this process.
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in _EXACT_WORKSPACES:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = _EXACT_WORKSPACES[0]
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise InputError(
            f"run.deterministic: found true, but {str(error).partition(',')[0]} (use false)"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]
