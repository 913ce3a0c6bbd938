"""Whether a folder can be written to, and is what a command may write into; told before torch is imported."""

from __future__ import annotations

import os
from pathlib import Path

from lora_cli.errors import InputError
from lora_cli.models.safety import TINY
from lora_cli.paths import check_name, check_writable, expanded
from lora_cli.recipe.schema import Recipe
from lora_cli.runtime import lock
from lora_cli.runtime.run_folder import OURS, RunFolder


def check(recipe: Recipe, *, resume: bool | None, overwrite: bool) -> str | None:
    """Check `run.output` and say what will become of it; None in a process beside the first, which may be writing.

    Raises:
        InputError: it cannot be made or written to, is not a run's, is in use, or holds a run that must not go on.
    """
    name, place = recipe.run.output, recipe.at("run.output")
    check_name(place, name)
    if os.environ.get("RANK", "0") != "0":
        return None
    folder = expanded(place, name)
    check_outside_base(place, folder, recipe)
    if os.path.lexists(folder) and not folder.is_dir():
        raise InputError(f"{place}: {name} is not a folder (choose another name)")
    check_writable(place, folder)
    entries = sorted(os.listdir(folder)) if folder.is_dir() else []
    others = [entry for entry in entries if entry not in OURS and not entry.startswith(".")]
    is_run = RunFolder(folder).is_run()
    if not entries:
        return f"run.output: {name}: new"
    if not is_run and any(not entry.startswith(".") for entry in entries):
        kept = ", ".join(others[:3] or entries[:3])
        raise InputError(
            f"{place}: {name} holds other files ({kept}) and is not a run of lora-cli (choose another folder)"
        )
    if RunFolder(folder).finished() is not None:
        return f"run.output: {name}: holds a finished run" + (", to be overwritten" if overwrite else "")
    if lock.is_held(folder):
        raise InputError(f"{place}: {lock.describe(folder)}")
    if is_run and resume is False and not overwrite:
        raise InputError(
            f"{place}: {name} holds an unfinished run (--no-resume forbids to go on; --overwrite starts again)"
        )
    return f"run.output: {name}: {'to be overwritten' if overwrite else 'to be resumed'}"


def check_outside_base(place: str, folder: Path, recipe: Recipe) -> None:
    """Refuse to write into the base model: replacing a file that is mapped into memory zeroes the model.

    Raises:
        InputError: `folder` is in it, or is a loop of links.
    """
    base = TINY if recipe.model.base == "tiny" else expanded("model.base", recipe.model.base)
    if not base.is_dir():
        return
    try:
        inside = folder.resolve().is_relative_to(base.resolve())
    except (OSError, RuntimeError):  # RuntimeError: a loop of symbolic links, on Python 3.11 and 3.12
        raise InputError(f"{place}: {folder} is a loop of symbolic links (choose another folder)") from None
    if inside:
        raise InputError(f"{place}: {folder} is in the base model's folder {base} (choose another folder)")
