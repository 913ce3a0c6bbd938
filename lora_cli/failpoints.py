"""Named steps of the writer at which a test makes it fail: LORA_FAILPOINT=STEP:KIND, or STEP:KIND:TARGET.

    LORA_FAILPOINT=before-rename:kill            whenever that step is reached
    LORA_FAILPOINT=half-file:enospc:step-*       for folders and files whose final name fits the pattern

The variable is read once; where it is not set, a step costs one call.
"""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from lora_cli.errors import InputError

VARIABLE = "LORA_FAILPOINT"
OF_A_FILE = ("half-file", "file-written", "before-sync", "after-sync", "after-manifest")
"""Steps at which a file has just been written; at the first of them half of it is."""
STEPS = (
    "folder-made",
    "half-file",
    "file-written",
    "before-sync",
    "after-sync",
    "before-manifest",
    "after-manifest",
    "before-rename",
    "after-rename",
    "after-parent-sync",
    "after-verify",
    "during-delete",
)
"""In the order of a save."""
_ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO, "efbig": errno.EFBIG}
_SIGNALS = {"kill": signal.SIGKILL, "half": signal.SIGKILL, "stop": signal.SIGSTOP}
KINDS = (*_SIGNALS, *_ERRORS)
"""kill: SIGKILL to this process. half: the file just written is cut to half, then kill. stop: wait for SIGCONT, so that
a test can do something to the disk, or send a signal, at this very step. The others: an OSError."""


@dataclass(frozen=True, slots=True)
class Failpoint:
    """Where to fail, how, and for which target."""

    step: str
    kind: str
    target: str


@cache
def armed() -> Failpoint | None:
    """Return what the variable asks for; None where it is not set.

    Raises:
        InputError: there is no such step or kind.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    step, _, rest = text.partition(":")
    kind, _, target = rest.partition(":")
    if step not in STEPS:
        raise InputError(f"{VARIABLE}: {step!r} is no step of the writer (one of: {', '.join(STEPS)})")
    if kind not in KINDS:
        raise InputError(f"{VARIABLE}: {kind!r} is no kind of failure (one of: {', '.join(KINDS)})")
    if kind == "half" and step not in OF_A_FILE:
        raise InputError(f"{VARIABLE}: no file was just written at {step} (half: {', '.join(OF_A_FILE)})")
    return Failpoint(step, kind, target or "*")


def reach(step: str, target: Path, file: Path | None = None) -> None:
    """Fail here if it is asked for; `target` is what is being written, `file` the file of it that was.

    Raises:
        OSError: as the variable says.
    """
    point = armed()
    if point is None or point.step != step or not fnmatchcase(target.name, point.target):
        return
    if file is not None and "half" in (point.kind, step.removesuffix("-file")):
        os.truncate(file, file.stat().st_size // 2)
    if point.kind in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[point.kind])
    else:
        number = _ERRORS[point.kind]
        raise OSError(number, os.strerror(number), str(file or target))
