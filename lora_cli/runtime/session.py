"""What every command runs in: its processes, no network, one line for each fault of the machine; a clock of its stages.

Signals are heeded in it, and between two stages.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from lora_cli import failpoints, interrupts
from lora_cli.network import closed
from lora_cli.recipe.schema import Run
from lora_cli.runtime import dist
from lora_cli.runtime.dist import Runtime
from lora_cli.runtime.faults import resource_faults
from lora_cli.runtime.log import Log


@contextmanager
def started(settings: Run) -> Iterator[tuple[Runtime, Log]]:
    """Join the other processes of the command, if there are any, and yield them and the log.

    Raises:
        InputError: the device that is asked for is not there.
        ResourceError: the machine has too little memory or disk for what is done within.
        Stopped: SIGINT or SIGTERM came where nothing deferred it.
    """
    failpoints.armed()  # a wrong name is told before anything is read
    runtime = dist.start(settings.device, deterministic=settings.deterministic)
    with closed(), resource_faults(), runtime as rt, Log(speaks=rt.is_main) as log:
        yield rt, log


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Note how many seconds a stage took, under its name."""
    interrupts.check()
    began = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - began, 3)
