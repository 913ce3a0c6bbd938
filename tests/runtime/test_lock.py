"""One run at a time in a folder, whatever ended the one before."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
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


def test_a_lock_on_a_file_that_was_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who opened the file before its holder removed it does not take the lock of the file that came after."""
    path = tmp_path / lock.NAME
    opened = Path.open

    def then_replaced(self: Path, *arguments: object, **more: object) -> object:
        file = opened(self, *arguments, **more)  # type: ignore[arg-type]
        if self == path and file.writable() and not holder:
            # Between opening and locking: the one before leaves, and another process comes.
            path.unlink()
            holder.append(hold(tmp_path))
        return file

    holder: list[subprocess.Popen[str]] = []
    monkeypatch.setattr(Path, "open", then_replaced)
    try:
        with pytest.raises(InputError, match=r"written by process \d+ on "), Lock(tmp_path) as mine:
            mine.take()
        assert lock.is_held(tmp_path)
        assert path.exists()
    finally:
        holder[0].kill()
        holder[0].wait(10)


def test_a_moments_question_does_not_refuse_a_run(tmp_path: Path) -> None:
    """While another process only asks whether the lock is held, it can be taken."""
    (tmp_path / lock.NAME).touch()
    with (tmp_path / lock.NAME).open() as asked:
        fcntl.flock(asked, fcntl.LOCK_SH)
        threading.Timer(0.07, asked.close).start()
        with Lock(tmp_path) as mine:
            mine.take()
            mine.take()  # by its holder once more: nothing to do
            assert mine.held


def test_many_processes_at_once(tmp_path: Path) -> None:
    """Of processes that take and give back the lock over and over no two ever hold it at the same time."""
    code = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from lora_cli.errors import InputError\n"
        "from lora_cli.runtime import lock\n"
        "lock._PAUSE = 0.0005\n"
        "folder, taken = Path(sys.argv[1]), 0\n"
        "while taken < 60:\n"
        "    try:\n"
        "        with lock.Lock(folder) as mine:\n"
        "            mine.take()\n"
        "            os.close(os.open(folder / 'alone', os.O_CREAT | os.O_EXCL))\n"
        "            os.unlink(folder / 'alone')\n"
        "            taken += 1\n"
        "    except InputError:\n"
        "        pass\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == []
