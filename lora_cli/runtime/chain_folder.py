"""The folder of several objectives in one recipe: a run, or rows of a constitution, in a folder of its own for each.

recipe.yaml  summary.json  1-sft/  2-dpo/ ...
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_cli import interrupts
from lora_cli.errors import InputError
from lora_cli.paths import check_writable
from lora_cli.publish import remove, sweep, write_json, write_text
from lora_cli.runtime import lock
from lora_cli.runtime.constitution_folder import ConstitutionFolder
from lora_cli.runtime.lock import Lock
from lora_cli.runtime.run_folder import RunFolder

MARK = "# Written by lora-cli: the recipe of these stages, every default written out."
RECIPE_FILE, SUMMARY_FILE = "recipe.yaml", "summary.json"
OURS = (RECIPE_FILE, SUMMARY_FILE, "lora-cli-error.log")
_STAGE = re.compile(r"[1-9][0-9]*-[A-Za-z0-9][A-Za-z0-9_.-]*")


class ChainFolder:
    """One such folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = Lock(path)

    @property
    def recipe_file(self) -> Path:
        """Where the recipe is kept."""
        return self.path / RECIPE_FILE

    def is_chain(self) -> bool:
        """Say whether stages were begun here."""
        try:
            if not self.recipe_file.is_file():  # a pipe would be waited for
                return False
            with self.recipe_file.open(encoding="utf-8") as file:
                return file.readline(len(MARK) + 1).rstrip("\n") == MARK
        except (OSError, ValueError):  # a name that no file can have is told by those who read the target
            return False

    def check(self, place: str, stages: Sequence[str], *, overwrite: bool) -> None:
        """Refuse a folder that cannot be written to, holds what is not ours or other stages, or is in use.

        `stages` are the names of the folders in it; `place` is the recipe's key.

        Raises:
            InputError: it is one of these.
        """
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise InputError(f"{place}: {self.path} is not a folder (choose another name)")
        check_writable(place, self.path)
        entries = sorted(os.listdir(self.path)) if self.path.is_dir() else []
        shown = [name for name in entries if not name.startswith(".")]
        if shown and not self.is_chain():
            raise InputError(
                f"{place}: {self.path} holds other files ({', '.join(shown[:3])}) and no stages of a recipe (choose"
                " another folder)"
            )
        others = [path.name for path in self._stages() if path.name not in stages]
        if others and not overwrite:
            raise InputError(
                f"{place}: {self.path} holds other stages: {', '.join(others)} (--overwrite removes them, or choose"
                " another folder)"
            )
        if lock.is_held(self.path):
            raise InputError(f"{place}: {lock.describe(self.path)}")

    def begin(self, recipe: str, *, overwrite: bool) -> None:
        """Make and lock the folder, and write the recipe where there is none; with `overwrite` remove all stages first.

        The last stage goes first: what a kill leaves is a shorter chain.

        Raises:
            InputError: the folder cannot be made, or is locked.
            ResourceError: the disk is full or failing.
        """
        self.lock.claim()
        sweep(self.path)
        if overwrite:
            remove(self.path / SUMMARY_FILE)
            for path in reversed(self._stages()):
                (RunFolder(path) if RunFolder(path).is_run() else ConstitutionFolder(path)).clear()
        if overwrite or not self.is_chain():
            self.write_recipe(recipe)

    def withdraw(self) -> None:
        """Remove what `begin` made, where no stage was begun: bad input leaves nothing behind."""
        if self.is_chain() and not self._stages():
            remove(self.recipe_file)
            with suppress(OSError):
                self.path.rmdir()

    def write_recipe(self, recipe: str) -> None:
        """Write the recipe by one rename; one that stands there already is left."""
        text = f"{MARK}\n{recipe}"
        if not self.is_chain() or self.recipe_file.read_text(encoding="utf-8") != text:
            write_text(self.recipe_file, text)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json by one rename; a signal waits until it is there."""
        with interrupts.deferred():
            write_json(self.path / SUMMARY_FILE, summary)

    def _stages(self) -> list[Path]:
        """Return the folders of stages that are there, in their order."""
        if not self.path.is_dir():
            return []
        found = [path for path in self.path.iterdir() if _STAGE.fullmatch(path.name)]
        ours = [path for path in found if RunFolder(path).is_run() or ConstitutionFolder(path).is_ours()]
        return sorted(ours, key=lambda path: int(path.name.partition("-")[0]))
