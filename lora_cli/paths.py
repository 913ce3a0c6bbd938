"""Paths that a user wrote: whether they can be meant, what is near a wrong one, whether one can be written to."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from lora_cli.errors import InputError

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")


def expanded(place: str, name: str) -> Path:
    """Return the path with `~` resolved.

    Raises:
        InputError: it names the home of a user who does not exist.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise InputError(f"{place}: {name}: there is no user of that name (write the path out)") from error


def check_name(place: str, name: str) -> None:
    """Refuse names that no file can have, or that would break a line of a log."""
    place = place if len(place) <= 200 else f"{place[:40]}..."  # it may be the name itself
    if any(character in name for character in "\0\n\r"):
        raise InputError(f"{place!r}: {name!r} holds a NUL or a line break (use a plain name)")
    if not name.strip():
        raise InputError(f"{place}: the name is empty (give one)")
    longest = max(len(os.fsencode(part)) for part in Path(name).parts or (".",))
    if longest > 255 or len(os.fsencode(name)) > 4000:
        raise InputError(
            f"{place}: {name[:40]!r}... has a part of {longest} bytes (at most 255 are possible)"
        )


def near_matches(path: Path) -> str:
    """Return ` (did you mean ...?)` with the names in the parent folder that look alike."""
    parent = Path(os.path.expanduser(path)).parent  # which leaves the `~name` of no user as it is
    try:
        names = [entry.name for entry in os.scandir(parent)]
    except OSError:
        return f" (there is no folder {parent} either)"
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(str(path.parent / name) for name in near)}?)" if near else ""


def is_path(name: str) -> bool:
    """Say whether a name can only be meant as a path, not as a hub id."""
    return (
        name.startswith(("./", "../", "/", "~"))
        or name in (".", "..")
        or name.count("/") > 1
        or Path(name).suffix.lower() in DATA_SUFFIXES
    )


def check_writable(place: str, folder: Path) -> None:
    """Refuse a folder that cannot be made or written to; the nearest parent that exists decides."""
    existing = folder.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"{place}: {existing} is not a folder (choose another one)")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{place}: {existing} is not writable (choose another folder)")
