"""Folders that are complete or absent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_cli.errors import InputError
from lora_cli.publish import MANIFEST, published, sweep, verify


def publish(target: Path, text: str = "content", **settings: bool) -> None:
    """Publish a folder with two files."""
    with published(target, facts={"step": 3}, **settings) as staging:  # type: ignore[arg-type]
        (staging / "a.txt").write_text(text)
        (staging / "sub").mkdir()
        (staging / "sub" / "b.bin").write_bytes(b"\x00" * 100)


def test_a_published_folder_verifies(tmp_path: Path) -> None:
    """What was published verifies, its facts stand in the manifest, and nothing hidden is left."""
    publish(tmp_path / "out")
    manifest = verify(tmp_path / "out")
    assert manifest["step"] == 3
    assert set(manifest["files"]) == {"a.txt", "sub/b.bin"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_fault_leaves_nothing(tmp_path: Path) -> None:
    """An exception while writing leaves neither the target nor a temporary folder, and an old target untouched."""
    publish(tmp_path / "out", "old")
    with pytest.raises(RuntimeError), published(tmp_path / "out", replace=True) as staging:
        (staging / "a.txt").write_text("half")
        raise RuntimeError
    assert (tmp_path / "out" / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_existing_target_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    """Without `replace` an existing folder is refused and stays as it is; with it the new one stands there."""
    publish(tmp_path / "out", "old")
    with pytest.raises(InputError):
        publish(tmp_path / "out", "new")
    assert (tmp_path / "out" / "a.txt").read_text() == "old"
    publish(tmp_path / "out", "new", replace=True)
    assert (tmp_path / "out" / "a.txt").read_text() == "new"


@pytest.mark.parametrize(
    "damage", ["empty", "short", "flipped bit", "missing", "no manifest", "manifest cut"]
)
def test_damage_is_found(tmp_path: Path, damage: str) -> None:
    """Every kind of damage to a file or to the manifest is found."""
    publish(tmp_path / "out")
    path = tmp_path / "out" / "sub" / "b.bin"
    content = path.read_bytes()
    manifest = tmp_path / "out" / MANIFEST
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "short":
        path.write_bytes(content[:-1])
    elif damage == "flipped bit":
        path.write_bytes(content[:50] + b"\x01" + content[51:])
    elif damage == "missing":
        path.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text()[:40])
    with pytest.raises(InputError):
        verify(tmp_path / "out")


def test_a_killed_writer_is_swept(tmp_path: Path) -> None:
    """A writer killed before the rename leaves no target; the next start removes what it left."""
    program = (
        "import os, signal, sys; from pathlib import Path; from lora_cli.publish import published\n"
        "with published(Path(sys.argv[1])) as staging:\n"
        "    (staging / 'a.txt').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], check=False)
    left = list(tmp_path.iterdir())
    assert len(left) == 1
    assert left[0].name.startswith(".tmp-out-")
    assert sweep(tmp_path) == left
    assert list(tmp_path.iterdir()) == []


def test_published_files_have_the_users_permissions(tmp_path: Path) -> None:
    """A file that was made readable by its owner alone is published with the permissions the umask gives."""
    with published(tmp_path / "out") as staging:
        (staging / "plain").write_text("x")
        (staging / "private").write_text("x")
        (staging / "private").chmod(0o600)
    assert (tmp_path / "out" / "private").stat().st_mode == (tmp_path / "out" / "plain").stat().st_mode
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "out" / "private").stat().st_mode & 0o777 == 0o666 & ~umask
