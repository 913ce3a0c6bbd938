"""Folders that are complete or absent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_cli import failpoints, publish
from lora_cli.errors import InputError, ResourceError
from lora_cli.failpoints import STEPS
from lora_cli.manifest import FORMAT_VERSION, MANIFEST, verify
from lora_cli.publish import Staging, published, remove, sweep


def write(target: Path, text: str = "content", **settings: bool) -> None:
    """Publish a folder with two files."""
    with published(target, facts={"step": 3}, **settings) as staging:  # type: ignore[arg-type]
        (staging / "a.txt").write_text(text)
        (staging / "sub").mkdir()
        (staging / "sub" / "b.bin").write_bytes(b"\x00" * 100)


def test_a_published_folder_verifies(tmp_path: Path) -> None:
    """What was published verifies, its facts stand in the manifest, and nothing hidden is left."""
    write(tmp_path / "out")
    manifest = verify(tmp_path / "out")
    assert manifest["step"] == 3
    assert set(manifest["files"]) == {"a.txt", "sub/b.bin"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_fault_leaves_nothing(tmp_path: Path) -> None:
    """An exception while writing leaves neither the target nor a temporary folder, and an old target untouched."""
    write(tmp_path / "out", "old")
    with pytest.raises(RuntimeError), published(tmp_path / "out", replace=True) as staging:
        (staging / "a.txt").write_text("half")
        raise RuntimeError
    assert (tmp_path / "out" / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_existing_target_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    """Without `replace` an existing folder is refused and stays as it is; with it the new one stands there."""
    write(tmp_path / "out", "old")
    with pytest.raises(InputError):
        write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "a.txt").read_text() == "old"
    write(tmp_path / "out", "new", replace=True)
    assert (tmp_path / "out" / "a.txt").read_text() == "new"


@pytest.mark.parametrize(
    "damage", ["empty", "short", "flipped bit", "missing", "no manifest", "manifest cut"]
)
def test_damage_is_found(tmp_path: Path, damage: str) -> None:
    """Every kind of damage to a file or to the manifest is found."""
    write(tmp_path / "out")
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


def killed(program: str, *arguments: str | Path) -> None:
    """Run a program that a failpoint kills."""
    done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], check=False)
    assert done.returncode == -9


REPLACE = (
    "import os, sys; from pathlib import Path; os.environ['LORA_FAILPOINT'] = sys.argv[2] + ':kill'\n"
    "from lora_cli.publish import published\n"
    "with published(Path(sys.argv[1]), replace=True) as staging:\n"
    "    (staging / 'a.txt').write_text('new')\n"
)
PLACED = STEPS[STEPS.index("after-rename") :]


@pytest.mark.parametrize("step", STEPS)
def test_a_killed_replacement_leaves_the_old_or_the_new(tmp_path: Path, step: str) -> None:
    """Killed at any step of a replacement, after the next start the old folder is there whole, or the new one is."""
    write(tmp_path / "out", "old")
    killed(REPLACE, tmp_path / "out", step)
    if (tmp_path / "out").exists():
        verify(tmp_path / "out")
    sweep(tmp_path)
    verify(tmp_path / "out")
    assert (tmp_path / "out" / "a.txt").read_text() == ("new" if step in PLACED else "old")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["enospc", "eio", "efbig"])
@pytest.mark.parametrize("step", STEPS)
def test_a_failed_replacement_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, kind: str
) -> None:
    """Refused at any step the writer raises a ResourceError, and a whole folder is there: ours once it verified."""
    write(tmp_path / "out", "old")
    monkeypatch.setattr(failpoints, "armed", lambda: failpoints.Failpoint(step, kind, "*"))
    with pytest.raises(ResourceError, match=r"out: cannot be written: "):
        write(tmp_path / "out", "new", replace=True)
    ours = step in ("after-verify", "during-delete")
    verify(tmp_path / "out")
    assert (tmp_path / "out" / "a.txt").read_text() == ("new" if ours else "old")
    left = [path.name for path in tmp_path.iterdir() if path.name != "out"]
    assert len(left) == (1 if ours else 0)
    assert all(name.startswith(".old-") for name in left)


def test_what_reads_back_differently_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block that the disk loses between the rename and the comparison: the old folder is back, and the fault told."""
    write(tmp_path / "out", "old")

    def lose(step: str, target: Path, file: Path | None = None) -> None:
        if step == "after-parent-sync":
            (target / "sub" / "b.bin").write_bytes(b"\x00" * 99 + b"\x01")

    monkeypatch.setattr(publish, "reach", lose)
    with pytest.raises(ResourceError, match=r"read back it is not what was written: .*b\.bin"):
        write(tmp_path / "out", "new", replace=True)
    verify(tmp_path / "out")
    assert (tmp_path / "out" / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_target_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    """Without `replace` a folder or file that came into being while ours was written stays, and ours is refused."""
    target = tmp_path / "out"
    for is_folder in (True, False):
        with pytest.raises(InputError, match="exists already"), published(target) as staging:
            (staging / "a.txt").write_text("ours")
            theirs = target / "a.txt" if is_folder else target
            theirs.parent.mkdir(exist_ok=True)
            theirs.write_text("theirs")
        assert theirs.read_text() == "theirs"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        remove(target)


def test_a_deleted_folder_loses_its_name_first(tmp_path: Path) -> None:
    """Killed while it deletes, a folder is not there under its name; what is left of it goes at the next start."""
    write(tmp_path / "out")
    killed(
        "import os, sys; from pathlib import Path; os.environ['LORA_FAILPOINT'] = 'during-delete:kill'\n"
        "from lora_cli.publish import remove; remove(Path(sys.argv[1]))",
        tmp_path / "out",
    )
    assert not (tmp_path / "out").exists()
    assert len(sweep(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == []


def test_every_step_is_reached_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replacement passes every step that is named, the file's for each file, in the order of the list."""
    write(tmp_path / "out", "old")
    seen: list[str] = []
    for module in ("publish", "manifest"):
        monkeypatch.setattr(f"lora_cli.{module}.reach", lambda step, *_: seen.append(step))
    write(tmp_path / "out", "new", replace=True)
    assert tuple(dict.fromkeys(seen)) == STEPS
    assert seen.count("half-file") == 2


def test_any_changed_byte_of_a_manifest_is_found(tmp_path: Path) -> None:
    """Each byte of a manifest changed in one bit, and a number in it changed by hand, is found, though it parses."""
    write(tmp_path / "out")
    manifest = tmp_path / "out" / MANIFEST
    content = manifest.read_bytes()
    for place in range(len(content)):
        for bit in (0, 5):
            manifest.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            with pytest.raises(InputError):
                verify(tmp_path / "out")
    manifest.write_bytes(content.replace(b'"step": 3', b'"step": 4'))
    with pytest.raises(InputError, match="not what its own sha256 says"):
        verify(tmp_path / "out")
    manifest.write_bytes(content.replace(b'version": %d' % FORMAT_VERSION, b'version": 99'))
    with pytest.raises(InputError, match="has the format 99"):
        verify(tmp_path / "out")


def test_a_leftover_of_the_same_process_number_is_swept(tmp_path: Path) -> None:
    """In a container every process may be number 7: what an earlier one of our number left does not stop us."""
    for kind in ("tmp", "old", "del"):
        (tmp_path / f".{kind}-out-{os.getpid()}").mkdir()
    write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    staging = Staging(tmp_path / "other")
    assert sweep(tmp_path) == []  # of a process that lives
    staging.discard()
