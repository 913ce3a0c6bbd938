"""The folder a run leaves behind: who owns it, what stands in it, and the summary.

recipe.yaml  metrics.jsonl  rollouts.jsonl  generations.jsonl  endpoint.jsonl  checkpoints/  adapter/  merged/
portable/  summary.json
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_cli import interrupts
from lora_cli.errors import InputError
from lora_cli.manifest import MANIFEST, sha256_of, verify
from lora_cli.publish import remove, sweep, write_json, write_text
from lora_cli.runtime.lock import Lock

RECIPE_FILE = "recipe.yaml"
SUMMARY_FILE = "summary.json"
CHECKPOINTS = "checkpoints"
MARK = "# Written by lora-cli: the recipe of this run, every default written out."
"""First line of a run's recipe.yaml, by which a run is known from a folder with a recipe of the user's own."""
EXPORTS = {"peft": "adapter", "merged": "merged", "portable": "portable"}
"""Folder of each export format; the first that a run has is what is evaluated: a portable one may be inexact."""
OURS = (
    RECIPE_FILE,
    SUMMARY_FILE,
    "metrics.jsonl",
    "rollouts.jsonl",
    "generations.jsonl",
    "endpoint.jsonl",
    CHECKPOINTS,
    *EXPORTS.values(),
    "lora-cli-error.log",
)
"""All that a run writes; nothing else in the folder is ever touched."""


class RunFolder:
    """One run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = Lock(path)

    def finished(self) -> dict[str, Any] | None:
        """Return the summary of a run that was completed here, or None."""
        try:
            summary: Any = json.loads((self.path / SUMMARY_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        sound = isinstance(summary, dict) and summary.keys() >= {"eval", "fingerprints", "recipe"}
        return summary if sound and summary.get("status") == "done" else None

    def is_run(self) -> bool:
        """Say whether a run of ours was begun here."""
        path = self.path / RECIPE_FILE
        if not path.is_file():  # a pipe would be waited for
            return False
        try:
            with path.open(encoding="utf-8") as file:
                return file.readline(len(MARK) + 1).rstrip("\n") == MARK
        except (OSError, ValueError):
            return False

    def exported(self) -> Path:
        """Return the folder of the first format that the run has exported.

        Raises:
            InputError: there is none yet.
        """
        for name in EXPORTS.values():
            if (self.path / name).is_dir():
                return self.path / name
        raise InputError(f"{self.path}: the run has exported nothing yet (finish it with lora-train)")

    def verify(self, export: Path) -> None:
        """Compare an export of this run with its manifest, and the run's recipe with the one it was made by.

        Raises:
            InputError: a file is damaged or missing.
        """
        if verify(export).get("recipe_sha256") != self.recipe_sha256():
            raise InputError(
                f"{self.path / RECIPE_FILE}: is not the recipe that {export.name}/ was made by (restore it; overrides"
                " change what is scored or merged)"
            )

    def recipe_sha256(self) -> str:
        """Return the sha256 of recipe.yaml, which stands in what the run publishes.

        Raises:
            InputError: it cannot be read.
        """
        path = self.path / RECIPE_FILE
        try:
            return sha256_of(path)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error

    def hold(self) -> None:
        """Lock the folder, if there is one: what stands in it must not change between being judged and being used.

        Raises:
            InputError: another process holds it.
        """
        if self.path.is_dir():
            self.lock.take()

    def begin(self, recipe_text: str, *, fresh: bool) -> None:
        """Make and lock the folder and write the resolved recipe; with `fresh` remove what an earlier run wrote.

        Raises:
            InputError: the folder cannot be made or written to, holds an export that is not ours, or is locked.
            ResourceError: the disk is full or failing.
        """
        judged = self.lock.held
        self.lock.claim()
        if not judged and self.is_run():
            raise InputError(
                f"run.output: another process began a run in {self.path} meanwhile (start again)"
            )
        sweep(self.path)
        # The summary first, by which the run is finished; the recipe, by which it is a run, is there at every moment.
        self._remove(self.given_up(fresh=fresh))
        write_text(self.path / RECIPE_FILE, f"{MARK}\n{recipe_text}")

    def given_up(self, *, fresh: bool) -> list[str]:
        """Return the names of what `begin` removes: what comes after training; with `fresh` all but the recipe."""
        if fresh:
            return [SUMMARY_FILE, *(name for name in OURS if name not in (SUMMARY_FILE, RECIPE_FILE))]
        return [SUMMARY_FILE, "generations.jsonl", *EXPORTS.values()]

    def clear(self) -> None:
        """Remove all that a run wrote, and the folder where nothing else is in it.

        Raises:
            InputError: another process writes it, or an export in it is not ours.
            ResourceError: it cannot be removed.
        """
        with self.lock:
            self.lock.take()
            self._remove([*self.given_up(fresh=True), RECIPE_FILE])
        with suppress(OSError):
            self.path.rmdir()

    def adapter(self) -> Path:
        """Return where a PEFT adapter is kept in a folder: in `adapter/` of a run, else in the folder itself."""
        inner = self.path / EXPORTS["peft"]
        return inner if self.is_run() else self.path

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json by one rename; a signal waits until it is there."""
        with interrupts.deferred():
            write_json(self.path / SUMMARY_FILE, summary)

    def _remove(self, names: list[str]) -> None:
        for path in (self.path / name for name in names):
            if path.is_dir() and not path.is_symlink() and not _is_ours(path):
                raise InputError(f"{path}: was not written by a run, so it stays (choose another run.output)")
        for name in names:
            remove(self.path / name)


def _is_ours(folder: Path) -> bool:
    """Say whether a run wrote this folder: an export has a manifest, `checkpoints/` nothing but checkpoints."""
    if folder.name != CHECKPOINTS:
        return (folder / MANIFEST).is_file()
    return all(re.fullmatch(r"step-\d+|\.(tmp|old|del)-.*", path.name) for path in folder.iterdir())
