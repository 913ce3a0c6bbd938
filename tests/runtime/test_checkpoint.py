"""What is read of a checkpoint is what was verified: hashed once, and refused where a file was touched since."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_cli.errors import InputError
from lora_cli.runtime.checkpoint import Checkpoints, State
from lora_cli.runtime.optim import MasterAdamW

FILES = ("manifest.json", "method.safetensors", "optimizer.safetensors", "state.json")
Touch = Callable[[Path], None]


def saved(folder: Path, step: int = 4, seed: int = 0) -> Checkpoints:
    """Return the checkpoints of a folder after one of `step` was saved there."""
    weights = torch.randn(64, 8, generator=torch.Generator().manual_seed(seed))
    optimizer = MasterAdamW({"w": nn.Parameter(weights)})
    Checkpoints(folder, keep=2).save(State(step=step), optimizer, {"kept": weights[0].clone()}, {})
    return Checkpoints(folder, keep=2)


def flip(path: Path) -> None:
    """Change the last byte in place, and leave size and time of the last write as they were."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(path: Path) -> None:
    """Put a copy with one other byte in the file's place."""
    other = path.with_name("other")
    shutil.copy2(path, other)
    flip(other)
    other.replace(path)


def test_a_checkpoint_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From being found to being restored each file is hashed one time, and the tensors are those that were saved."""
    checkpoints, hashed = saved(tmp_path), []
    original = hashlib.file_digest

    def digest(file: Any, name: str) -> Any:
        hashed.append(Path(file.name).name)
        return original(file, name)

    monkeypatch.setattr(hashlib, "file_digest", digest)
    assert checkpoints.newest(pytest.fail) == 4
    assert checkpoints.facts(4)["step"] == 4
    kept = checkpoints.method_state(4)["kept"]
    with checkpoints.opened(4) as (state, optimizer, method):
        assert state.step == 4
        assert torch.equal(optimizer["w.master"][0], method["kept"])
        assert torch.equal(method["kept"], kept)
    assert sorted(hashed) == [name for name in FILES if name != "manifest.json"]


@pytest.mark.parametrize("touch", [flip, replace])
@pytest.mark.parametrize("file", FILES)
def test_a_file_that_changes_after_it_was_verified_is_not_used(
    tmp_path: Path, file: str, touch: Touch
) -> None:
    """Between being found and being restored no file can change unseen, whatever its size and its time say."""
    checkpoints = saved(tmp_path)
    assert checkpoints.newest(pytest.fail) == 4
    touch(tmp_path / "step-4" / file)
    for use in (
        checkpoints.facts,
        checkpoints.method_state,
        lambda step: checkpoints.opened(step).__enter__(),
    ):
        with pytest.raises(InputError, match="damaged"):
            use(4)


@pytest.mark.parametrize("touch", [flip, replace, Path.unlink])
@pytest.mark.parametrize("file", FILES)
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, file: str, touch: Touch) -> None:
    """What was read beside a change is refused when the reading ends, for the tensors are pages of the file."""
    checkpoints, read = saved(tmp_path), dict[str, Tensor]()
    with (
        pytest.raises(InputError, match="step-4: was changed while it was read"),
        checkpoints.opened(4) as (_, optimizer, _),
    ):
        touch(tmp_path / "step-4" / file)
        read |= {name: tensor.clone() for name, tensor in optimizer.items()}
    assert read


def test_another_checkpoint_in_its_place_is_refused(tmp_path: Path) -> None:
    """A sound checkpoint of the same step that takes the place of the one whose recipe was compared is not used."""
    checkpoints = saved(tmp_path)
    assert checkpoints.newest(pytest.fail) == 4
    shutil.rmtree(tmp_path / "step-4")
    saved(tmp_path, seed=1)
    with pytest.raises(InputError, match="step-4: is another checkpoint than a moment ago"):
        checkpoints.method_state(4)
    assert Checkpoints(tmp_path, keep=2).newest(pytest.fail) == 4


def test_a_touched_file_with_the_same_content_is_used(tmp_path: Path) -> None:
    """A file that was copied or had its permissions changed since it was verified is verified again, and read."""
    checkpoints = saved(tmp_path)
    assert checkpoints.newest(pytest.fail) == 4
    (tmp_path / "step-4" / "optimizer.safetensors").chmod(0o600)
    os.link(tmp_path / "step-4" / "state.json", tmp_path / "backup")
    assert checkpoints.method_state(4).keys() == {"kept"}
