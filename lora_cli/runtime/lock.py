"""One run at a time in a folder: a lock that the kernel gives back when its process ends, however it ends.

`.lock` holds the process and the host, for messages; whether it is held is the kernel's word, so that a file that a
killed process left behind is taken over.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import IO, Self

from lora_cli.errors import InputError

NAME = ".lock"


class Lock:
    """The lock of a run's folder; leaving its context gives it back, if it was taken."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._file: IO[str] | None = None

    def take(self) -> None:
        """Take the lock; the folder must exist.

        Raises:
            InputError: another process holds it.
        """
        file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise InputError(f"run.output: {describe(self.path.parent)}") from None
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
        file.flush()
        self._file = file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: object) -> None:
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def is_held(folder: Path) -> bool:
    """Say whether a process holds the folder's lock."""
    try:
        with (folder / NAME).open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def describe(folder: Path) -> str:
    """Say who holds the folder's lock."""
    try:
        holder = json.loads((folder / NAME).read_text(encoding="utf-8"))
        who = f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"
    return f"{folder} is being written by {who} (wait for it, or choose another run.output)"
