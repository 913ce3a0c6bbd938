"""Folders that are either complete or not there: the one writer of checkpoints, adapters, models and caches.

    target/              absent, or what was published before
    .tmp-target-4711/    files are written here, each flushed to disk, then manifest.json (size and sha256 of each)
    .old-target-4711/    what stood there, until ours was read back and compared; put back if anything fails
    .del-target-4711/    what is being deleted: it loses its name first, so that no half of it is ever seen
    target/              appears by one rename

A kill at any moment leaves hidden folders, which `sweep` removes, and a `target` that is whole or absent; where it
falls between the two renames of a replacement, `sweep` puts the old one back. safetensors does not notice damaged
content (a flipped bit loads without an error), so `verify` compares every file with the manifest, and the manifest with
its own checksum. `failpoints.py` names the steps.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lora_cli.disk import writing
from lora_cli.errors import InputError, ResourceError
from lora_cli.failpoints import reach
from lora_cli.manifest import sync, verify, write_manifest

_HIDDEN = re.compile(r"\.(tmp|old|del)-(.+)-(\d+)", re.DOTALL)


class Staging:
    """A hidden folder beside `target`; it becomes `target` by `publish`, or vanishes by `discard`."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = _hidden("tmp", target)
        _make_folder(target.parent)
        sweep(target.parent, target.name)
        try:
            self.path.mkdir()
            reach("folder-made", target)
        except BaseException:
            self.discard()
            raise

    def publish(self, facts: dict[str, Any], *, replace: bool = True) -> None:
        """Flush every file, write the manifest with `facts`, take the target's place, and compare all with it.

        What stood there is put back if any of it fails, and deleted only then. `replace`: whoever stands there.

        Raises:
            InputError: another target has appeared meanwhile, and `replace` is false.
            ResourceError: what is read back is not what was written.
        """
        write_manifest(self.path, self.target, facts)
        displaced = _hidden("old", self.target)
        self._take_place(displaced, replace=replace)
        try:
            reach("after-rename", self.target)
            sync(self.target.parent)
            reach("after-parent-sync", self.target)
            _compare(self.target)
        except BaseException:
            with suppress(OSError):
                os.rename(self.target, self.path)
            _put_back(displaced, self.target)
            raise
        reach("after-verify", self.target)
        if os.path.lexists(displaced):
            reach("during-delete", self.target)
            _delete(displaced)

    def discard(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _take_place(self, displaced: Path, *, replace: bool) -> None:
        while True:
            if replace:
                with suppress(FileNotFoundError):
                    os.rename(self.target, displaced)
            try:
                reach("before-rename", self.target)
                os.rename(self.path, self.target)
                return
            except OSError as error:
                # Another process has published the same target since; ours takes its place in the next round.
                others = error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
                if not (others and os.path.lexists(self.target)):
                    _put_back(displaced, self.target)
                    raise
                if not replace:
                    raise _exists(self.target) from error
                _delete(displaced)
            except BaseException:
                _put_back(displaced, self.target)
                raise


@contextmanager
def published(
    target: Path, *, replace: bool = False, facts: dict[str, Any] | None = None, needed: int | None = None
) -> Iterator[Path]:
    """Yield a hidden folder to write into; on a normal exit it becomes `target`, on an exception it is removed.

    `facts` are added to the manifest. With `replace` an existing target gives way in the same moment. `needed` is how
    many bytes it takes, for the message where there is no room.

    Raises:
        InputError: `target` exists and `replace` is false.
        ResourceError: it cannot be written, or not be read back as it was written.
    """
    if os.path.lexists(target) and not replace:
        raise _exists(target)
    with writing(target, needed=needed):
        staging = Staging(target)
        try:
            yield staging.path
            staging.publish(facts or {}, replace=replace)
        finally:
            staging.discard()  # nothing is left to discard once it was published


def remove(target: Path) -> None:
    """Delete a folder, or file, that was published: it loses its name before any of it is deleted.

    Raises:
        ResourceError: it cannot be deleted.
    """
    hidden = _hidden("del", target)
    with writing(target):
        _delete(hidden)
        try:
            os.rename(target, hidden)
        except FileNotFoundError:
            return
        reach("during-delete", target)
        _delete(hidden)


def sweep(parent: Path, target: str | None = None) -> list[Path]:
    """Remove what interrupted writers of `target` (a name; None: of all) left in `parent`, and return it.

    A folder that was displaced, and whose place is empty, gets it back. Folders of living processes stay. What bears
    this process' own number is an earlier one's, which had the same, where a `target` is named: its writer asks.
    """
    removed = []
    for path in sorted(parent.iterdir()) if parent.is_dir() else ():
        match = _HIDDEN.fullmatch(path.name)
        if match is None or target not in (None, match[2]):
            continue
        kind, place, pid = match[1], parent / match[2], int(match[3])
        if kind == "old" and not os.path.lexists(place) and _is_sound(path):
            _put_back(path, place)
        elif kind == "del" or not _alive(pid) or (target is not None and pid == os.getpid()):
            with suppress(OSError):
                _delete(path)
                removed.append(path)
    return removed


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, see `write_text`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8 by one rename, so that a reader never sees half of it, nor a kill leaves half.

    Raises:
        ResourceError: it cannot be written.
    """
    write_lines(path, [text.encode()], needed=len(text.encode()))


def write_lines(path: Path, lines: Iterable[bytes], *, needed: int | None = None) -> None:
    """Write a file as `write_text` does, line by line as they come; `needed` is for the message where there is no room.

    Raises:
        ResourceError: it cannot be written.
    """
    staging = _hidden("tmp", path)
    with writing(path, needed=needed):
        try:
            with staging.open("wb") as file:
                file.writelines(lines)
            sync(staging)
            os.replace(staging, path)
            sync(path.parent)
        finally:
            with suppress(OSError):
                staging.unlink(missing_ok=True)


def _compare(target: Path) -> None:
    try:
        verify(target)
    except InputError as error:
        raise ResourceError(
            f"{target}: read back it is not what was written: {error} (look at the disk and the memory)"
        ) from error


def _is_sound(folder: Path) -> bool:
    try:
        verify(folder)
    except InputError:
        return False
    return True


def _put_back(displaced: Path, target: Path) -> None:
    """Give a displaced folder its place again, where that is empty; another process may have done so."""
    if not os.path.lexists(target):
        with suppress(OSError):
            os.rename(displaced, target)


def _hidden(kind: str, target: Path) -> Path:
    return target.parent / f".{kind}-{target.name}-{os.getpid()}"


def _exists(target: Path) -> InputError:
    return InputError(f"{target}: exists already (choose another folder or remove it)")


def _delete(path: Path) -> None:
    """Delete a file or folder, which may not be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _make_folder(path: Path) -> None:
    """Make a folder and those above it, whose names are on disk as well when it is."""
    missing = [one for one in (path, *path.parents) if not one.is_dir()]
    path.mkdir(parents=True, exist_ok=True)
    for one in missing:
        sync(one.parent)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
