"""Folders that are either complete or not there: the one writer of checkpoints, adapters, models and caches.

    target/              absent
    .tmp-target-4711/    files are written here, each flushed to disk, then manifest.json (size and sha256 of each)
    target/              appears by one rename

A crash at any moment leaves a hidden folder that `sweep` removes, never a half-written `target`. safetensors does not
notice damaged content (a flipped bit loads without an error), so `verify` compares every file with the manifest.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lora_cli.errors import InputError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


class Staging:
    """A hidden folder beside `target`; it becomes `target` by `publish`, or vanishes by `discard`."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.parent / f".tmp-{target.name}-{os.getpid()}"
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent, glob.escape(target.name))
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir()

    def publish(self, facts: dict[str, Any]) -> None:
        """Flush every file, write the manifest with `facts`, and take the target's place, whoever stands there."""
        _write_manifest(self.path, facts)
        displaced = self.target.parent / f".old-{self.target.name}-{os.getpid()}"
        while True:
            with suppress(FileNotFoundError):
                os.rename(self.target, displaced)
            try:
                os.rename(self.path, self.target)
                break
            except OSError as error:
                # Another process has published the same target since; ours takes its place in the next round.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                shutil.rmtree(displaced, ignore_errors=True)
        _sync(self.target.parent)
        shutil.rmtree(displaced, ignore_errors=True)

    def discard(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.path, ignore_errors=True)


@contextmanager
def published(target: Path, *, replace: bool = False, facts: dict[str, Any] | None = None) -> Iterator[Path]:
    """Yield a hidden folder to write into; on a normal exit it becomes `target`, on an exception it is removed.

    `facts` are added to the manifest. With `replace` an existing target gives way in the same moment.

    Raises:
        InputError: `target` exists and `replace` is false.
    """
    if target.exists() and not replace:
        raise InputError(f"{target}: exists already (choose another folder or remove it)")
    staging = Staging(target)
    try:
        yield staging.path
        staging.publish(facts or {})
    finally:
        staging.discard()  # nothing is left to discard once it was published


def verify(folder: Path, *, contents: bool = True) -> dict[str, Any]:
    """Return the manifest of a published folder after comparing every file with it; without `contents` only sizes.

    Raises:
        InputError: the manifest is missing or unreadable, or a file is missing or differs from it.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, dict[str, Any]] = manifest["files"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: {MANIFEST} is missing or unreadable") from error
    for name, entry in files.items():
        path = folder / name
        same = path.is_file() and path.stat().st_size == entry["size"]
        if not same or (contents and sha256_of(path) != entry["sha256"]):
            raise InputError(f"{path}: missing or damaged (its size or sha256 differs from {MANIFEST})")
    return manifest


def sweep(parent: Path, target: str = "*") -> list[Path]:
    """Remove what interrupted writers of `target` (a name, or all) left in `parent`, and return it.

    Folders of living processes stay.
    """
    removed = []
    for pattern in (f".tmp-{target}-*", f".old-{target}-*"):
        for path in parent.glob(pattern):
            pid = path.name.rpartition("-")[2]
            if pid.isdigit() and not _alive(int(pid)):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
                removed.append(path)
    return removed


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON to `path` by one rename, so that a reader never sees half a file."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` by one rename."""
    staging = path.parent / f".tmp-{path.name}-{os.getpid()}"
    staging.write_text(text, encoding="utf-8")
    _sync(staging)
    os.replace(staging, path)
    _sync(path.parent)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    files = {}
    # safetensors makes its files readable by their owner alone; what is published has the user's usual permissions.
    umask = os.umask(0)
    os.umask(umask)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        path.chmod(0o666 & ~umask)
        _sync(path)
        name = path.relative_to(folder).as_posix()
        files[name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    manifest = {"format_version": FORMAT_VERSION, **facts, "files": files}
    # No line break at the end: a manifest that lost its last byte must not parse.
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False), encoding="utf-8")
    _sync(folder / MANIFEST)
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
