"""Which model folders may run Python code of their own: those that the recipe trusts, and what is exported of them.

The answer belongs to a folder, not to the process, and is given anew each time a base is opened: an adapter or a second
model that is read in the same run gains nothing by it. A tokenizer's code is never run.
"""

from __future__ import annotations

import re
from pathlib import Path

from lora_cli.errors import InputError

_COMMIT = re.compile(r"[0-9a-f]{40}")
_trusted: set[Path] = set()


def settle(folder: Path, *, runs_code: bool) -> None:
    """Say whether the code in a folder may run from now on."""
    (_trusted.add if runs_code else _trusted.discard)(folder.resolve())


def require_pinned(place: str, base: str, revision: str | None) -> None:
    """Refuse to run code of a hub id that may be other code tomorrow; `place` is where the key was written.

    Raises:
        InputError: `revision` is not a commit.
    """
    if not _COMMIT.fullmatch(revision or ""):
        raise InputError(
            f"{place}: {base} is a hub id, whose code runs only from one commit (set model.revision to its 40"
            " hexadecimal digits, or use a local folder)"
        )


def may_run(folder: Path) -> bool:
    """Say whether the code in a folder may run."""
    return folder.resolve() in _trusted
