"""The manifest of a published folder: size and sha256 of every file, what it was made of, and its own sha256.

A folder that lora-cli wrote has one, and is read only after it was compared with it; a folder from elsewhere has none.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path, PurePosixPath
from typing import Any

from lora_cli.errors import InputError
from lora_cli.failpoints import reach

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
_TICK_NS = 20_000_000
"""A file system's clock moves on at least this often: two changes within one tick have the same time."""
_UNSIGNED = "0" * 64
"""What stands in place of the manifest's own sha256 while that is computed."""


def write_manifest(folder: Path, target: Path, facts: dict[str, Any]) -> None:
    """Flush every file of a folder that will be `target`, and write its manifest, with `facts` in it, as the last."""
    files = {}
    # safetensors makes its files readable by their owner alone; what is published has the user's usual permissions.
    umask = os.umask(0)
    os.umask(umask)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        reach("half-file", target, path)
        path.chmod(0o666 & ~umask)
        reach("file-written", target, path)
        name = path.relative_to(folder).as_posix()
        files[name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
        reach("before-sync", target, path)
        sync(path)
        reach("after-sync", target, path)
    manifest = {"format_version": FORMAT_VERSION, "sha256": _UNSIGNED, **facts, "files": files}
    # No line break at the end: a manifest that lost its last byte must not parse.
    text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False)
    text = text.replace(_UNSIGNED, _signature(text.encode(), _UNSIGNED), 1)
    reach("before-manifest", target)
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    sync(folder / MANIFEST)
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync(path)
    reach("after-manifest", target, folder / MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a published folder, whose own checksum is right; no other file is looked at.

    Raises:
        InputError: it is missing, damaged, or not one of ours.
    """
    path = folder / MANIFEST
    advice = f"(take another folder; where lora-cli did not write it, remove {MANIFEST})"
    try:
        content = path.read_bytes()
        manifest = json.loads(content)
        stated, version, files = (manifest[key] for key in ("sha256", "format_version", "files"))
    except FileNotFoundError:
        raise InputError(f"{path}: is missing (the folder is damaged)") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: damaged, or not a manifest of lora-cli {advice}") from error
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: has the format {version!r}, this version reads {FORMAT_VERSION} {advice}")
    if not isinstance(stated, str) or _signature(content, stated) != stated or not isinstance(files, dict):
        raise InputError(f"{path}: damaged: it is not what its own sha256 says {advice}")
    return dict(manifest)


def verify(folder: Path, *, contents: bool = True) -> dict[str, Any]:
    """Return the manifest of a published folder after comparing every file with it; without `contents` only sizes.

    Raises:
        InputError: the manifest is missing or damaged, or a file is missing or differs from it.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        path = folder / name
        inside = not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
        try:
            same = inside and path.is_file() and path.stat().st_size == entry["size"]
            same = same and (not contents or sha256_of(path) == entry["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise InputError(f"{path}: missing or damaged (its size or sha256 differs from {MANIFEST})")
    return manifest


def identities(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return, for each file of a folder, what is no longer the same once anyone has written to it or replaced it.

    Nobody can set the time of the last change (ctime), so two equal answers mean that the files were not touched
    between them: what was verified in between is what is there. Of files that were just written the answer waits until
    a further change would have another time.
    """
    found: dict[str, tuple[int, ...]] = {}
    newest = 0
    for path in folder.rglob("*"):
        status = path.lstat()
        if not path.is_dir():
            found[path.relative_to(folder).as_posix()] = (
                status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns,
            )  # fmt: skip
            newest = max(newest, status.st_ctime_ns)
    if time.time_ns() - newest < _TICK_NS:
        time.sleep(_TICK_NS / 1e9)
    return found


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _signature(content: bytes, stated: str) -> str:
    """Return the sha256 of a manifest in which nothing is stated in place of its own."""
    return hashlib.sha256(content.replace(stated.encode(), _UNSIGNED.encode(), 1)).hexdigest()
