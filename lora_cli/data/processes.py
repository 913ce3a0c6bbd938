"""Tasks of the tokenization in several processes, which end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from typing import Any

from lora_cli import interrupts
from lora_cli.data.tokenize import Outcome, Task, Tokenization
from lora_cli.errors import ResourceError
from lora_cli.publish import sweep
from lora_cli.recipe.data_block import Data

CORES = 4
"""Cores that one process keeps busy: the tokenizer's threads take about four times what Python takes beside them."""

_worker: Tokenization | None = None
"""In a process of the pool: what it tokenizes with."""


def _start(
    data: Data, train_on: str, tokenizer: Any, template: str, spelled: Sequence[str], threads: int
) -> None:
    global _worker
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    _worker = Tokenization(data, train_on, tokenizer, template, spelled)


def _serve(task: Task) -> Outcome:
    assert _worker is not None
    return _worker.run(task)


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Keep Ctrl-C, which reaches every process of the terminal, from those started within: the main one decides."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_all(tokenization: Tokenization, tasks: Sequence[Task]) -> Generator[Outcome, None, None]:
    """Yield the outcome of each task in order; several at a time where there are several, and cores for them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores // CORES, len(tasks))
    if workers < 2:
        yield from map(tokenization.run, tasks)
        return
    one = tokenization
    settings = (one.data, one.train_on, one.tokenizer, one.template, one.spelled)
    # A worker begins as `python -c`, which would look for its modules in the current folder first.
    os.environ["PYTHONSAFEPATH"] = "1"
    # Not forked: the tokenizer's threads, and torch's, would not survive it.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start, (*settings, max(1, cores // workers)))
    try:
        with interrupts.deferred(), _deaf_children():
            outcomes = pool.map(_serve, tasks)
        yield from outcomes
        pool.shutdown()
    except BaseException as fault:
        workers_left = multiprocessing.active_children()
        for process in workers_left:
            process.terminate()
        with suppress(OSError):  # of a broken pool: it closes its pipe from a thread of its own
            pool.shutdown(cancel_futures=True)
        for process in workers_left:
            process.join()
        sweep(tasks[0].folder.parent)  # what they were writing
        interrupts.check()  # a signal to the whole group ends the workers too
        # Of the same thread comes an OSError without a number, where rows are still handed out.
        if isinstance(fault, BrokenProcessPool) or (isinstance(fault, OSError) and fault.errno is None):
            raise ResourceError(
                "a process that prepared the data was killed, most likely for want of memory (start again: what is done"
                " is kept; fewer cores need less memory)"
            ) from fault
        raise
