"""The processes of a run: one, or several started by torchrun. Device, sums over processes, one writer.

Data parallelism needs no wrapper here: the loss is a sum, each process adds its rows' gradients, and one all-reduce
before the update makes the total. gloo on CPU, NCCL on CUDA.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed
from torch import Tensor

from lora_cli.errors import InputError, LoraError, Stopped


@dataclass
class Runtime:
    """This process among `world_size`; `stop_signal` is the signal number that asks the run to save and end."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    stop_signal: int = field(default=0, init=False)

    @property
    def is_main(self) -> bool:
        """True in the one process that writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            torch.distributed.barrier()

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

    def stop_requested(self) -> int:
        """Return the number of a signal that any process was asked to stop by, the same in all of them; 0 for none."""
        (asked,) = self.sum([float(self.stop_signal != 0)])
        return (self.stop_signal or signal.SIGTERM) if asked else 0

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Within it SIGINT and SIGTERM only set `stop_signal`; a second one acts at once."""
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def note(number: int, frame: FrameType | None) -> None:
            self.stop_signal = number
            for each in previous:
                signal.signal(each, signal.SIG_DFL)

        for number in previous:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


@contextmanager
def start(device: str) -> Iterator[Runtime]:
    """Join the process group that torchrun announces in the environment, or be the only process.

    SIGTERM becomes an exception meanwhile, so that what is half written is removed, as it is after SIGINT.

    Raises:
        InputError: `cuda` was asked for and there is none.
        Stopped: SIGTERM came outside of training.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("run.device: cuda was asked for, but no CUDA device is available (use cpu or auto)")
    if device != "cpu" and torch.cuda.is_available():
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    else:
        chosen = torch.device("cpu")
    previous = signal.signal(signal.SIGTERM, _raise_stopped)
    if world_size > 1:
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(minutes=60))
    try:
        yield Runtime(chosen, rank, world_size)
    finally:
        if world_size > 1:
            torch.distributed.destroy_process_group()
        signal.signal(signal.SIGTERM, previous)


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    raise Stopped(f"stopped by signal {number}, nothing was left half-written", number)
