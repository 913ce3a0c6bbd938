"""One run at a time in a folder, whatever ended the one before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_cli.errors import InputError
from lora_cli.runtime import lock
from lora_cli.runtime.lock import Lock

HOLD = """
import sys, time
from pathlib import Path
from lora_cli.runtime.lock import Lock
with Lock(Path(sys.argv[1])) as held:
    held.take()
    print("taken", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """Return a process that holds the folder's lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    return process


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    """While a process holds the lock another is refused, with the holder's number; SIGKILL gives it back at once."""
    process = hold(tmp_path)
    try:
        assert lock.is_held(tmp_path)
        with pytest.raises(InputError, match=f"written by process {process.pid} on "):
            Lock(tmp_path).take()
        assert lock.is_held(tmp_path)  # asking did not take it away
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    deadline = time.monotonic() + 10
    while lock.is_held(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / lock.NAME).exists()
    with Lock(tmp_path) as mine:
        mine.take()
        assert f"process {os.getpid()} on" in lock.describe(tmp_path)
    assert not (tmp_path / lock.NAME).exists()


def test_a_folder_without_a_lock_is_free(tmp_path: Path) -> None:
    """No file, an empty one and one that is not ours hold nobody up."""
    assert not lock.is_held(tmp_path)
    assert not lock.is_held(tmp_path / "none")
    (tmp_path / lock.NAME).write_text("")
    assert not lock.is_held(tmp_path)
    assert "another process" in lock.describe(tmp_path)
    with Lock(tmp_path) as mine:
        mine.take()
