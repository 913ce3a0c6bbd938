"""What a disk refuses, as one line that names the path, and what was needed and is free; and how much is free."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_cli.errors import LoraError, ResourceError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_REASONS = {
    errno.ENOSPC: ("the disk is full", "free some space, or choose another folder"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or choose another folder"),
    errno.EIO: ("the disk reports an input/output error", "look at the disk, or choose another folder"),
    errno.EFBIG: (
        "the file is larger than the disk or `ulimit -f` allows",
        "raise it, or choose another folder",
    ),
}
NUMBERS = frozenset(_REASONS)
"""The errors that mean the disk, whatever was being done."""


def fault(error: OSError, path: Path | None = None, *, needed: int | None = None) -> ResourceError:
    """Return the fault that an OSError means for `path`, which takes `needed` bytes (None: not known).

    Without a path it is the one that the error names, which may have been read as well.
    """
    place = path or (Path(os.fsdecode(error.filename)) if error.filename else None)
    reason, advice = _REASONS.get(
        error.errno or 0, (error.strerror or str(error), "look at the folder and its permissions")
    )
    sizes = []
    if error.errno in FULL:
        sizes += [f"{needed:,} bytes are needed"] if needed is not None else []
        sizes += [f"{free_bytes(place):,} bytes are free"] if place is not None else []
    told = f"{reason}: {' and '.join(sizes)}" if sizes else reason
    where = f"{path}: cannot be written: " if path else f"{place}: " if place else ""
    return ResourceError(f"{where}{told} ({advice})")


@contextmanager
def writing(path: Path, *, needed: int | None = None) -> Iterator[None]:
    """Turn any OSError within into a fault of writing `path`.

    Raises:
        ResourceError: for an OSError.
    """
    try:
        yield
    except LoraError:  # some of them are OSErrors as well
        raise
    except OSError as error:
        raise fault(error, path, needed=needed) from error


def free_bytes(path: Path) -> int:
    """Return how many bytes this user may still write on the disk of a path, which need not exist yet."""
    existing = path.absolute()
    while True:
        try:
            return shutil.disk_usage(existing).free
        except OSError:
            if existing == existing.parent:
                return 0
            existing = existing.parent


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder; 0 where there is none."""
    if path.is_file():
        return path.stat().st_size
    total = 0
    for file in path.rglob("*"):
        with suppress(OSError):  # deleted meanwhile
            total += 0 if file.is_dir() else file.lstat().st_size
    return total
