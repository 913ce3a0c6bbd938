"""Tokenized splits on disk, read through memory maps.

A cache is a folder named after the fingerprint of all that decides its content: the data's bytes, the
tokenizer, its chat template, the recipe's data settings and `CACHE_FORMAT`. It is written beside its place
under a hidden name, synchronised to disk, and published by one rename, so it is complete or it is not there.
The main process checks the sha256 of every file before it uses one; a damaged cache is removed and written
again.

    tokens.bin   int32, all rows one after the other
    trained.bin  uint8, 1 = the token is trained
    offsets.npy  int64 (R + 1,), where each row begins
    lines.npy    int64 (R,), the line (row) of each in its file
    meta.json    counts, and bytes and sha256 of each file
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from lora_cli.errors import InputError, ResourceError
from lora_cli.types import Example

CACHE_FORMAT = 1
LEFTOVER_SECONDS = 24 * 3600
_FILES = ("tokens.bin", "trained.bin", "offsets.npy", "lines.npy")


def cache_root() -> Path:
    """Return `tokens/` under $LORA_CLI_CACHE, else $XDG_CACHE_HOME/lora-cli, else ~/.cache/lora-cli."""
    if own := os.environ.get("LORA_CLI_CACHE"):
        root = Path(own).expanduser()
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-cli"
    return root / "tokens"


def fingerprint(parts: Mapping[str, str]) -> str:
    """Return the sha256 of named strings; their order does not matter."""
    named = json.dumps({**parts, "cache format": str(CACHE_FORMAT)}, sort_keys=True)
    return hashlib.sha256(named.encode()).hexdigest()


class TokenCache:
    """The tokenized rows of a published folder; satisfies `types.Examples`.

    Raises:
        ValueError: if the folder is missing, incomplete or, with `verify`, not what was written.
    """

    def __init__(self, folder: Path, *, verify: bool) -> None:
        try:
            self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            for name in _FILES:
                _check_file(folder / name, self.meta["files"][name], verify=verify)
            self.fingerprint: str = self.meta["fingerprint"]
            self._offsets = np.load(folder / "offsets.npy", allow_pickle=False)
            self._lines = np.load(folder / "lines.npy", allow_pickle=False)
            self._tokens = np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r")
            self._trained = np.memmap(folder / "trained.bin", dtype=np.bool_, mode="r")
        except (OSError, EOFError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder}: not a complete token cache: {error}") from error
        self.lengths: npt.NDArray[np.int64] = np.diff(self._offsets)  # (R,)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        """Return row `index`; its arrays are views into the mapped file, read-only."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = slice(int(self._offsets[index]), int(self._offsets[index + 1]))
        return Example(np.asarray(self._tokens[part]), np.asarray(self._trained[part]))

    def line(self, index: int) -> int:
        """Return the line of row `index` in its file (the row, for parquet and hub data)."""
        return int(self._lines[index])


def _check_file(path: Path, known: Mapping[str, Any], *, verify: bool) -> None:
    if path.stat().st_size != known["bytes"]:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, {known['bytes']} were written")
    if verify:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != known["sha256"]:
                raise ValueError(f"{path}: not the bytes that were written")


class CacheWriter:
    """Writes one cache; leaving the context without `publish`, or by an exception, leaves nothing behind.

    Raises:
        InputError: if the cache folder cannot be written.
        ResourceError: if the disk is full.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self._lengths: list[int] = []
        self._lines: list[int] = []

    def __enter__(self) -> Self:
        try:
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            self._hidden = Path(tempfile.mkdtemp(prefix=f".{self._folder.name}-", dir=self._folder.parent))
            self._tokens: IO[bytes] = (self._hidden / "tokens.bin").open("wb")
            self._trained: IO[bytes] = (self._hidden / "trained.bin").open("wb")
        except OSError as error:
            raise _write_fault(self._folder, error) from error
        return self

    def _remove_leftovers(self) -> None:
        """Remove what killed processes left of this cache; a folder of today may belong to one at work."""
        for left in self._folder.parent.glob(f".{self._folder.name}-*"):
            if time.time() - left.stat().st_mtime > LEFTOVER_SECONDS:
                shutil.rmtree(left, ignore_errors=True)

    def add(self, example: Example, line: int) -> None:
        """Append one row."""
        try:
            self._tokens.write(np.ascontiguousarray(example.input_ids, dtype=np.int32).data)
            self._trained.write(np.ascontiguousarray(example.trained, dtype=np.uint8).data)
        except OSError as error:
            raise _write_fault(self._folder, error) from error
        self._lengths.append(len(example.input_ids))
        self._lines.append(line)

    def publish(self, extra: Mapping[str, Any]) -> None:
        """Complete the folder and give it its name; `extra` joins meta.json."""
        try:
            self._tokens.close()
            self._trained.close()
            offsets = np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)]).astype(np.int64)
            np.save(self._hidden / "offsets.npy", offsets, allow_pickle=False)
            np.save(self._hidden / "lines.npy", np.array(self._lines, dtype=np.int64), allow_pickle=False)
            files = {name: _seal(self._hidden / name) for name in _FILES}
            meta = {**extra, "fingerprint": self._name, "rows": len(self._lines), "files": files}
            (self._hidden / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
            _seal(self._hidden / "meta.json")
            _sync_folder(self._hidden)
            # A folder that is already here is damaged, or another process has just published the same.
            shutil.rmtree(self._folder, ignore_errors=True)
            try:
                self._hidden.rename(self._folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            _sync_folder(self._folder.parent)
        except OSError as error:
            raise _write_fault(self._folder, error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tokens.close()
        self._trained.close()
        shutil.rmtree(self._hidden, ignore_errors=True)


def _seal(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_fault(folder: Path, error: OSError) -> InputError | ResourceError:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(
            f"{folder.parent}: the token cache does not fit: {reason} (LORA_CLI_CACHE names another)"
        )
    return InputError(f"{folder.parent}: the token cache cannot be written: {reason} (set LORA_CLI_CACHE)")
