"""The folder that `lora constitution make` leaves behind, and whether the same command may go on in it.

recipe.yaml  constitution.yaml  critiques.jsonl  sft.jsonl  judgements.jsonl  pairs.jsonl  endpoint.jsonl  made_of.json
summary.json

Its recipe begins with a line of its own, so that no training takes the folder for one of its runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_cli import interrupts
from lora_cli.errors import InputError
from lora_cli.paths import check_writable
from lora_cli.publish import remove, sweep, write_json, write_text
from lora_cli.runtime import lock
from lora_cli.runtime.lock import Lock

MARK = "# Written by lora-cli: the recipe of these rows of a constitution, every default written out."
RECIPE_FILE, PRINCIPLES_FILE = "recipe.yaml", "constitution.yaml"
FACTS_FILE, SUMMARY_FILE = "made_of.json", "summary.json"
ROWS = ("critiques.jsonl", "sft.jsonl", "judgements.jsonl", "pairs.jsonl", "endpoint.jsonl")
OURS = (SUMMARY_FILE, *ROWS, FACTS_FILE, PRINCIPLES_FILE, RECIPE_FILE, "lora-cli-error.log")
"""All that is written, in the order in which it is given up; nothing else in the folder is touched."""


class ConstitutionFolder:
    """One such folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = Lock(path)

    def is_ours(self) -> bool:
        """Say whether rows of a constitution are, or were begun to be, made here."""
        try:
            with (self.path / RECIPE_FILE).open(encoding="utf-8") as file:
                return file.readline(len(MARK) + 1).rstrip("\n") == MARK
        except (OSError, ValueError):
            return False

    def check(self, place: str) -> None:
        """Refuse a folder that cannot be written to, holds what is not ours, or is in use; `place` is the recipe's key.

        Raises:
            InputError: it is one of these.
        """
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise InputError(f"{place}: {self.path} is not a folder (choose another name)")
        check_writable(place, self.path)
        entries = sorted(os.listdir(self.path)) if self.path.is_dir() else []
        others = [name for name in entries if name not in OURS and not name.startswith(".")]
        shown = [name for name in entries if not name.startswith(".")]
        if shown and not self.is_ours():
            raise InputError(
                f"{place}: {self.path} holds other files ({', '.join((others or shown)[:3])}) and no rows of a"
                " constitution (choose another folder)"
            )
        if lock.is_held(self.path):
            raise InputError(f"{place}: {lock.describe(self.path)}")

    def begin(self, recipe: str, principles: str, facts: Mapping[str, Any], *, overwrite: bool) -> None:
        """Make and lock the folder, and write what the rows are made of, unless they are gone on with.

        Raises:
            InputError: what stands there was made of something else, or the folder cannot be made or is locked.
            ResourceError: the disk is full or failing.
        """
        self.lock.claim()
        sweep(self.path)
        known = None if overwrite else _read(self.path / FACTS_FILE)
        if known is not None:
            changed = [key for key in facts.keys() | known.keys() if facts.get(key) != known.get(key)]
            if changed:
                raise InputError(
                    f"{self.path}: its rows were made of something else: {', '.join(sorted(changed))} changed"
                    " (--overwrite makes them anew, or choose another run.output)"
                )
            return
        with interrupts.deferred():  # the facts last: without them all is begun anew
            for name in OURS:
                if name != RECIPE_FILE:
                    remove(self.path / name)
            write_text(self.path / RECIPE_FILE, f"{MARK}\n{recipe}")
            write_text(self.path / PRINCIPLES_FILE, principles)
            write_json(self.path / FACTS_FILE, facts)

    def clear(self) -> None:
        """Remove all that was written, and the folder where nothing else is in it.

        Raises:
            InputError: another process writes it.
            ResourceError: it cannot be removed.
        """
        with self.lock:
            self.lock.take()
            for name in OURS:
                remove(self.path / name)
        with suppress(OSError):
            self.path.rmdir()

    def finished(self) -> dict[str, Any] | None:
        """Return the summary of what was finished here; None where it was not."""
        return _read(self.path / SUMMARY_FILE)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json by one rename; a signal waits until it is there."""
        with interrupts.deferred():
            write_json(self.path / SUMMARY_FILE, summary)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
