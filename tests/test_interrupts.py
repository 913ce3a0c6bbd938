"""SIGINT and SIGTERM as processes meet them: raised, deferred, lost, doubled, and before anything is imported."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_cli import interrupts

HEAD = "import signal, sys, time, os\nfrom lora_cli import interrupts\n"


def begin(program: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a program and return once it has said that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_signal_is_raised_past_broad_handlers() -> None:
    """`except Exception` does not swallow a signal, and the handlers of before are back afterwards."""
    before = signal.getsignal(signal.SIGTERM)
    caught: list[int] = []
    with interrupts.handled():
        with interrupts.handled():  # changes nothing
            try:
                try:
                    signal.raise_signal(signal.SIGTERM)
                except Exception:  # noqa: BLE001 - what a library does
                    caught.append(-1)
            except interrupts.Interrupted as stop:
                caught.append(stop.exit_code)
        assert interrupts.asked() == signal.SIGTERM
    assert caught == [143]
    assert interrupts.asked() == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_is_deferred_is_raised_at_the_end() -> None:
    """Within `deferred` a signal is only noted; one that nobody heeded is raised where the context ends."""
    reached = []
    with interrupts.handled(), pytest.raises(interrupts.Interrupted, match="signal 2"):
        with interrupts.deferred():
            signal.raise_signal(signal.SIGINT)
            reached.append(interrupts.asked())
            interrupts.check()
            reached.append(0)
        reached.append(-1)
    assert reached == [signal.SIGINT, 0]


def test_a_signal_that_python_dropped_is_raised_again() -> None:
    """What is raised in a destructor is lost; the note stays, and `check` raises it."""

    class Fragile:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    with interrupts.handled(), pytest.raises(interrupts.Interrupted):
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        try:
            Fragile()
        finally:
            sys.unraisablehook = hook
        interrupts.check()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_call_that_does_not_return(number: signal.Signals) -> None:
    """In a single long call of C the first signal waits for its end, and the second leaves at once with 128 + n."""
    program = HEAD + (
        "import ctypes\n"
        "with interrupts.handled(), interrupts.deferred():\n"
        "    print('ready')\n"
        "    until = time.monotonic() + 60\n"
        "    while time.monotonic() < until: ctypes.CDLL(None).sleep(60)\n"
    )
    process = begin(program)
    process.send_signal(number)
    time.sleep(0.3)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(number)
    assert process.wait(10) == 128 + number
    assert time.monotonic() - began < 1


def test_a_signal_to_process_and_group_is_one() -> None:
    """Two signals at once, as timeout(1) sends them, do not make a run leave before it has saved."""
    program = HEAD + (
        "with interrupts.handled():\n"
        "    with interrupts.deferred():\n"
        "        print('ready')\n"
        "        until = time.monotonic() + 1\n"
        "        while time.monotonic() < until: pass\n"
        "        print('saved')\n"
        "        os._exit(7)\n"
    )
    process = begin(program)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert (output, process.returncode) == ("saved\n", 7)


@pytest.mark.parametrize("command", ["train_main", "eval_main", "merge_main", "main"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_a_command_is_imported(
    tmp_path: Path, command: str, number: signal.Signals, code: int
) -> None:
    """Before a command has read its arguments, a signal ends it with one line, 130 or 143, and no traceback."""
    program = HEAD + (
        f"from lora_cli.cli import {command} as main\n"
        "import importlib.abc\n"
        "class Slow(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer':\n"
        "            print('ready'); time.sleep(20)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "raise SystemExit(main())\n"
    )
    process = begin(program, str(tmp_path / "missing"))
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code
    assert errors == f"error: stopped by signal {int(number)}, nothing was left half-written\n"


def test_another_thread_handles_no_signals() -> None:
    """In a thread other than the main one, where Python delivers no signals, the contexts change nothing."""
    program = HEAD + (
        "import threading\n"
        "def work():\n"
        "    with interrupts.handled(), interrupts.deferred(): print(interrupts.asked())\n"
        "print('ready')\n"
        "thread = threading.Thread(target=work); thread.start(); thread.join()\n"
    )
    process = begin(program)
    assert process.stdout is not None
    assert process.stdout.read() == "0\n"  # a part may have been read with the line before
    assert process.communicate(timeout=20)[1] == ""
    assert process.returncode == 0
