"""Tokenized splits on disk, read through memory maps.

A cache is a folder named after the fingerprint of all that decides its content: the data's bytes, the
tokenizer, its chat template, the recipe's data settings and `CACHE_FORMAT`. `publish.py` makes it appear by one
rename, so it is complete or it is not there. The main process compares every file with the manifest before it
uses one; a damaged cache is written again.

    tokens.bin     int32, all rows one after the other
    trained.bin    uint8, 1 = the token is trained
    offsets.npy    int64 (R + 1,), where each row begins
    lines.npy      int64 (R,), the line (row) of each, counted from the beginning of what was read
    identities.npy uint64 (R,), a hash of what each row says, equal for equal rows
    values.npy     float32 (R,), what a row says of its answers: 1 or 0 (wanted or not), a pair's margin, else NaN
    manifest.json  counts, and size and sha256 of each file
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from array import array
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from lora_cli import disk
from lora_cli.errors import InputError, ResourceError
from lora_cli.manifest import verify
from lora_cli.paths import expanded
from lora_cli.publish import Staging, sweep
from lora_cli.types import Example

CACHE_FORMAT = 8
_WRITTEN_TOGETHER = 512
"""Rows: written one by one they would take a third of the time that Python needs for a row."""


def cache_root() -> Path:
    """Return `tokens/` under $LORA_CLI_CACHE, else $XDG_CACHE_HOME/lora-cli, else ~/.cache/lora-cli."""
    if own := os.environ.get("LORA_CLI_CACHE"):
        root = expanded("LORA_CLI_CACHE", own)
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-cli"
    return root / "tokens"


def fingerprint(parts: Mapping[str, str]) -> str:
    """Return the sha256 of named strings; their order does not matter."""
    named = json.dumps({**parts, "cache format": str(CACHE_FORMAT)}, sort_keys=True)
    return hashlib.sha256(named.encode()).hexdigest()


class TokenCache:
    """The tokenized rows of a published folder.

    Raises:
        ValueError: if the folder is missing, incomplete or, with `check`, not what was written (without it only
            sizes are compared).
    """

    def __init__(self, folder: Path, *, check: bool) -> None:
        self.meta: dict[str, Any] = verify(folder, contents=check)
        try:
            self.fingerprint: str = self.meta["fingerprint"]
            self.max_token: int = self.meta["max_token"]
            self._offsets = np.load(folder / "offsets.npy", allow_pickle=False)
            self.lines: npt.NDArray[np.int64] = np.load(folder / "lines.npy", allow_pickle=False)
            self.identities: npt.NDArray[np.uint64] = np.load(folder / "identities.npy", allow_pickle=False)
            self.values: npt.NDArray[np.float32] = np.load(folder / "values.npy", allow_pickle=False)
            self._tokens, self._trained = (
                # A part of a file may hold no row that was kept, and an empty file cannot be mapped.
                np.memmap(folder / name, dtype=kind, mode="r") if len(self.lines) else np.empty(0, kind)
                for name, kind in (("tokens.bin", np.int32), ("trained.bin", np.bool_))
            )
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

    def flat(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """Return all rows one after the other, tokens and trained (T,), and where each begins and ends, (R + 1,)."""
        return np.asarray(self._tokens), np.asarray(self._trained), self._offsets


class CacheWriter:
    """Writes one cache; leaving the context without `publish`, or by an exception, leaves nothing behind.

    Raises:
        InputError: if the cache folder cannot be written.
        ResourceError: if the disk is full or failing.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        # 28 bytes a row; lists of numbers would take 150.
        self._lengths, self._lines, self._identities = array("q"), array("q"), array("Q")
        self._values = array("f")
        self._max_token = 0
        self._rows: list[Example] = []

    def __enter__(self) -> Self:
        try:
            sweep(self._folder.parent)
            self._staging = Staging(self._folder)
            try:
                self._tokens: IO[bytes] = (self._staging.path / "tokens.bin").open("wb")
                self._trained: IO[bytes] = (self._staging.path / "trained.bin").open("wb")
            except BaseException:  # a signal too: nothing else would remove the folder yet
                self._staging.discard()
                raise
        except OSError as error:
            raise _write_fault(self._folder, error) from error
        return self

    def add(self, example: Example, line: int, identity: int, value: float = math.nan) -> None:
        """Append one row; `identity` is equal for equal rows, `value` what the row says of its answers."""
        self._rows.append(example)
        self._lengths.append(len(example.input_ids))
        self._lines.append(line)
        self._identities.append(identity)
        self._values.append(value)
        if len(self._rows) == _WRITTEN_TOGETHER:
            self._write()

    def _write(self) -> None:
        if not self._rows:
            return
        tokens = np.concatenate([row.input_ids for row in self._rows]).astype(np.int32, copy=False)
        trained = np.concatenate([row.trained for row in self._rows]).astype(np.uint8, copy=False)
        self._max_token = max(self._max_token, int(tokens.max(initial=0)))
        self._rows.clear()
        try:
            self._tokens.write(tokens.data)
            self._trained.write(trained.data)
        except OSError as error:
            raise _write_fault(self._folder, error) from error

    def publish(self, extra: Mapping[str, Any]) -> None:
        """Complete the folder and give it its name; `extra` joins the manifest."""
        self._write()
        try:
            self._tokens.close()
            self._trained.close()
            offsets = np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)]).astype(np.int64)
            np.save(self._staging.path / "offsets.npy", offsets, allow_pickle=False)
            lines = np.array(self._lines, dtype=np.int64)
            np.save(self._staging.path / "lines.npy", lines, allow_pickle=False)
            identities = np.array(self._identities, dtype=np.uint64)
            np.save(self._staging.path / "identities.npy", identities, allow_pickle=False)
            values = np.array(self._values, dtype=np.float32)
            np.save(self._staging.path / "values.npy", values, allow_pickle=False)
            facts = {"fingerprint": self._name, "rows": len(self._lines), "max_token": self._max_token}
            self._staging.publish({**extra, **facts})
        except OSError as error:
            raise _write_fault(self._folder, error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tokens.close()
        self._trained.close()
        self._staging.discard()


def _write_fault(folder: Path, error: OSError) -> InputError | ResourceError:
    reason = error.strerror or str(error)
    if error.errno in disk.FULL:
        free = f"{reason}, {disk.free_bytes(folder):,} bytes are free"
        return ResourceError(
            f"{folder.parent}: the token cache does not fit: {free} (LORA_CLI_CACHE names another)"
        )
    if error.errno is None or error.errno in disk.NUMBERS:
        return ResourceError(
            f"{folder.parent}: the token cache cannot be written: {reason} (LORA_CLI_CACHE names another)"
        )
    return InputError(f"{folder.parent}: the token cache cannot be written: {reason} (set LORA_CLI_CACHE)")
