"""The token cache: what was written is what is read, or it is not there."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from lora_cli.data.cache import CacheWriter, TokenCache, cache_root, fingerprint
from lora_cli.errors import InputError, ResourceError
from lora_cli.types import Example

FILES = ["tokens.bin", "trained.bin", "offsets.npy", "lines.npy", "identities.npy", "manifest.json"]


def examples() -> list[Example]:
    random = np.random.default_rng(0)
    lengths = [1, 7, 300, 2]
    return [
        Example(random.integers(0, 150_000, n, dtype=np.int32), random.integers(0, 2, n).astype(np.bool_))
        for n in lengths
    ]


def write(folder: Path) -> None:
    with CacheWriter(folder, "f" * 64) as writer:
        for line, example in enumerate(examples(), start=3):
            writer.add(example, line, 2**64 - 1)
        writer.publish({"tally": {"rows": 4}})


def test_round_trip(tmp_path):
    """Ids, masks, lengths, lines, fingerprint and counts come back; rows are read-only views."""
    write(tmp_path / "tokens" / "a")
    cache = TokenCache(tmp_path / "tokens" / "a", check=True)
    assert len(cache) == 4
    assert cache.lengths.tolist() == [1, 7, 300, 2]
    assert cache.lines.tolist() == [3, 4, 5, 6]
    assert cache.identities.tolist() == [2**64 - 1] * 4
    assert cache.fingerprint == "f" * 64
    assert cache.meta["tally"] == {"rows": 4}
    for found, expected in zip((cache[index] for index in range(4)), examples(), strict=True):
        assert found.input_ids.dtype == np.int32
        assert found.trained.dtype == np.bool_
        np.testing.assert_array_equal(found.input_ids, expected.input_ids)
        np.testing.assert_array_equal(found.trained, expected.trained)
        assert not found.input_ids.flags.writeable
    for index in (-1, 4):
        with pytest.raises(IndexError):
            cache[index]
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == ["a"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "shorter", "longer", "flipped"])
def test_damage_is_found(tmp_path, name, damage):
    """Any file that is missing, cut, longer or has one flipped bit is refused."""
    write(tmp_path / "a")
    path = tmp_path / "a" / name
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 0x80]) + content[middle + 1 :]
    if damage == "missing":
        path.unlink()
    else:
        changed = {"empty": b"", "shorter": content[:-1], "longer": content + b"}", "flipped": flipped}
        path.write_bytes(changed[damage])
    with pytest.raises(ValueError):
        TokenCache(tmp_path / "a", check=True)
    # A file of another size is found without reading it, as processes beside the main one do.
    if damage != "flipped" and name != "manifest.json":
        with pytest.raises(ValueError):
            TokenCache(tmp_path / "a", check=False)


def test_nothing_is_left_without_publish(tmp_path):
    """An exception, or the end of the context without publish, leaves no file."""
    bad = Example(np.array(["not a token"]), np.array([True]))
    with pytest.raises(ValueError), CacheWriter(tmp_path / "a", "f") as writer:
        writer.add(bad, 1, 2**64 - 1)
        writer.publish({})
    with CacheWriter(tmp_path / "a", "f") as writer:
        writer.add(examples()[0], 1, 2**64 - 1)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_folder_is_replaced(tmp_path):
    """Publishing over a damaged cache leaves a sound one."""
    write(tmp_path / "a")
    (tmp_path / "a" / "tokens.bin").write_bytes(b"")
    write(tmp_path / "a")
    assert len(TokenCache(tmp_path / "a", check=True)) == 4


def test_leftovers_of_killed_processes(tmp_path):
    """A hidden folder of a process that is gone is removed when a cache is written; one of a living process stays."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    for pid in (dead.pid, os.getppid()):
        (tmp_path / f".tmp-b-{pid}").mkdir()
    write(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".tmp-b-{os.getppid()}", "a"]


def test_a_full_disk_and_a_forbidden_folder(tmp_path, monkeypatch):
    """No space is a ResourceError, no permission an InputError; both name the folder, and nothing is left."""
    for number, kind in (
        (errno.ENOSPC, ResourceError),
        (errno.EDQUOT, ResourceError),
        (errno.EROFS, InputError),
    ):

        def fail(*_: object, number: int = number) -> None:
            raise OSError(number, "simulated")

        with monkeypatch.context() as patched:
            patched.setattr("os.fsync", fail)
            with pytest.raises(kind, match=str(tmp_path)):
                write(tmp_path / "a")
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="LORA_CLI_CACHE"):
        write(tmp_path / "file" / "a")


def test_root_follows_the_environment(monkeypatch, tmp_path):
    """LORA_CLI_CACHE, then XDG_CACHE_HOME, then ~/.cache decide where caches are."""
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.delenv("LORA_CLI_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root() == Path("/home/x/.cache/lora-cli/tokens")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root() == Path("/xdg/lora-cli/tokens")
    monkeypatch.setenv("LORA_CLI_CACHE", "~/own")
    assert cache_root() == Path("/home/x/own/tokens")


def test_fingerprint_depends_on_every_part():
    """Any changed part, and any changed name of a part, changes the fingerprint; the order does not."""
    base = fingerprint({"a": "1", "b": "2"})
    assert base == fingerprint({"b": "2", "a": "1"})
    assert (
        len(
            {
                base,
                fingerprint({"a": "1", "b": "3"}),
                fingerprint({"a": "1", "c": "2"}),
                fingerprint({"a": "1"}),
            }
        )
        == 4
    )
