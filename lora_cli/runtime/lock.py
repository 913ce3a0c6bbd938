"""One run at a time in a folder: a lock that the kernel gives back when its process ends, however it ends.

`.lock` holds the process and the host, for messages; whether it is held is the kernel's word (flock), so that a file
that a killed process left behind is taken over. On a folder that several hosts share this holds among processes of one
host, and among hosts as far as the file system passes locks on: NFS 4 does, a mount with `nolock` does not, and a file
system without locks is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO, Self

from lora_cli import disk
from lora_cli.errors import InputError, LoraError

NAME = ".lock"
_ATTEMPTS, _PAUSE = 5, 0.05
"""How often a lock is tried, and the seconds between: one who only asks (`is_held`) has it for a moment."""


class Lock:
    """The lock of a run's folder; leaving its context gives it back, if it was taken."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._file: IO[str] | None = None

    @property
    def held(self) -> bool:
        """True from `take` until its context is left."""
        return self._file is not None

    def claim(self) -> None:
        """Make the folder, where it is not there yet, and take its lock.

        Raises:
            InputError: the folder cannot be made or written to, or another process holds it.
            ResourceError: the disk is full or failing.
        """
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.take()
        except LoraError:
            raise
        except OSError as error:
            if error.errno in disk.NUMBERS:
                raise disk.fault(error, folder) from error
            raise InputError(f"run.output: {folder}: {error.strerror} (choose another folder)") from error

    def take(self) -> None:
        """Take the lock, unless this is its holder already; the folder must exist.

        Raises:
            InputError: another process holds it, the folder cannot be written to, or its file system has no locks.
        """
        for attempt in range(_ATTEMPTS):
            if self.held:
                break
            time.sleep(_PAUSE if attempt else 0)
            self._try()
        if self._file is None:
            raise InputError(f"run.output: {describe(self.path.parent)}")
        self._file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, self._file)
        self._file.flush()

    def _try(self) -> None:
        try:
            file = self.path.open("a+", encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"run.output: {self.path} cannot be written: {error.strerror} (choose another folder)"
            ) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
        except OSError as error:
            file.close()
            raise InputError(
                f"run.output: the file system of {self.path.parent} gives no locks: {error.strerror} (choose another"
                " folder)"
            ) from None
        else:
            # Its holder removes the file before it lets go: who opened it before that has locked a file that is no
            # longer there, and another process may hold the lock of the one that took its place.
            if _is_at(file, self.path):
                self._file = file
            else:
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: object) -> None:
        if self._file is not None:
            if _is_at(self._file, self.path):
                self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def is_held(folder: Path) -> bool:
    """Say whether a process holds the folder's lock."""
    try:
        with (folder / NAME).open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
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


def _is_at(file: IO[str], path: Path) -> bool:
    """Say whether an open file is the one that stands at `path` now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False
