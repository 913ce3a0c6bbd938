"""SIGINT and SIGTERM: what they do in every phase of a command.

    anywhere      the first is raised as `Interrupted`, so that what is half-written is removed on the way out
    `deferred`    the first is only noted; the code within asks for it where it may stop
    everywhere    a second one leaves at once, with exit code 128 + its number

`Interrupted` is no Exception: a library that catches its own faults broadly must not catch it. Where it is lost all the
same (Python drops what is raised in a destructor), the note stays, and `check` raises it again.

A second signal is seen by a thread of its own, since a handler in Python waits until a long call of C returns. A
launcher such as timeout(1) signals the process and then its group: what comes within TOGETHER is one signal.

No torch here: the command line needs this before anything else.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TOGETHER = 0.05
"""Seconds."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM came where nothing keeps the command from stopping."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by signal {number}, nothing was left half-written")
        self.number = number
        self.exit_code = 128 + number


@dataclass
class _Noted:
    """What this process knows of its signals."""

    handled: bool = False
    number: int = 0
    deferrals: int = 0


_noted = _Noted()


def asked() -> int:
    """Return the number of the signal that this process was asked to stop by; 0 for none."""
    return _noted.number


def check() -> None:
    """Raise Interrupted where a signal has come and nothing defers it."""
    if _noted.number and not _noted.deferrals:
        raise Interrupted(_noted.number)


@contextmanager
def handled() -> Iterator[None]:
    """Within it SIGINT and SIGTERM are handled as this module says; inside another such context it changes nothing.

    Python gives signals to its main thread alone, so in another one there is nothing to handle either.
    """
    if _noted.handled or threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=_leave_at_the_second, args=(reader,), daemon=True).start()
    _noted.handled = True
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    told_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(told_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)  # ends the thread
        _noted.handled, _noted.number = False, 0


@contextmanager
def deferred() -> Iterator[None]:
    """Within it a signal is only noted, for `asked`; one that nobody has heeded by its end is raised there."""
    _noted.deferrals += 1
    try:
        yield
    finally:
        _noted.deferrals -= 1
    check()


def let_go() -> None:
    """Give both signals back to the kernel, for a process that has nothing more to do: the interpreter, which takes a
    while to end, would answer SIGINT with a traceback."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def _note(number: int, frame: FrameType | None) -> None:
    if not _noted.number:
        _noted.number = number
        check()


def _leave_at_the_second(reader: int) -> None:
    """Read the number of each signal, a byte, as it comes in; leave at the second that ends a command."""
    first: float | None = None
    while told := os.read(reader, 1):
        if told[0] not in SIGNALS:
            continue  # the timer of a chat template
        now = time.monotonic()
        if first is None:
            first = now
        elif now - first > TOGETHER:
            os._exit(128 + told[0])
    os.close(reader)
