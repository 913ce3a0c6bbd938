"""Disks that are full, too small, or read-only, and paths that are taken away: one line, exit 4, nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT, run_here
from toy import write_recipe

from lora_cli import disk, pipeline
from lora_cli.errors import ResourceError
from lora_cli.manifest import sha256_of
from lora_cli.recipe.load import load_recipe
from lora_cli.runtime.run_folder import RunFolder

NAMESPACE = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]


@pytest.fixture(scope="module")
def mounts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skip, saying why, where this user may not mount a tmpfs even in a namespace of its own."""
    folder = tmp_path_factory.mktemp("mount")
    try:
        tried = subprocess.run(
            [*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        pytest.skip(f"no tmpfs can be mounted: {error}")
    if tried.returncode:
        pytest.skip(f"no tmpfs can be mounted: {tried.stderr.strip()}")


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory, base: Path, mounts: None) -> dict[str, Any]:
    """Return what tests/full_disk.py tells, and the sha256 of the adapter of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("full")
    recipe = write_recipe(folder, base, train__max_steps=6, train__save_every=2)
    environment = {"LORA_CLI_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    done = subprocess.run(
        [*NAMESPACE, sys.executable, str(ROOT / "tests" / "full_disk.py"), str(folder)],
        capture_output=True, text=True, env=os.environ | environment, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_CLI_CACHE", str(folder / "cache"))
        pipeline.train(load_recipe(recipe))
    undisturbed = sha256_of(folder / "run" / "adapter" / "adapter_model.safetensors")
    return {**json.loads(done.stdout), "undisturbed": undisturbed}


@pytest.mark.reliability("disk")
@pytest.mark.parametrize("moment", ["checkpoint", "export"])
def test_a_disk_that_fills_up(stories: dict[str, Any], moment: str) -> None:
    """A save, or an export, that does not fit exits 4 with the path and both numbers; the rerun has the same bytes."""
    told = stories[moment]
    assert told["code"] == 4, told
    assert len(told["errors"].splitlines()) == 1
    name = "step-4" if moment == "checkpoint" else "adapter"
    assert f"{name}: cannot be written: the disk is full: " in told["errors"]
    assert "bytes are needed and " in told["errors"]
    assert " bytes are free" in told["errors"]
    assert told["folders"] == (["step-2"] if moment == "checkpoint" else ["step-4", "step-6"])
    assert told["hidden"] == []
    assert told["code again"] == 0, told
    assert told["state again"]["hidden"] == []
    assert told["sha256"] == stories["undisturbed"]


def test_a_disk_that_becomes_read_only(stories: dict[str, Any]) -> None:
    """A save that is not allowed any more exits 4 with the path; the rerun has the same bytes, and nothing is left."""
    told = stories["read-only"]
    assert told["code"] == 4, told
    assert len(told["errors"].splitlines()) == 1
    assert "step-4: cannot be written: Read-only file system (" in told["errors"]
    assert told["folders"] == ["step-2"]
    assert told["code again"] == 0, told
    assert told["state again"]["hidden"] == []
    assert told["sha256"] == stories["undisturbed"]


@pytest.mark.parametrize("forms", [["peft"], ["merged"], ["peft", "portable"]])
def test_what_will_not_fit_is_refused_before_the_first_step(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, forms: list[str]
) -> None:
    """One byte too few is refused with both numbers and nothing written; the estimate is what is written, to 20 %."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    recipe = load_recipe(
        write_recipe(
            tmp_path, base, train__max_steps=6, train__save_every=1, train__keep_checkpoints=2, export__formats=forms,
            adapter__rank=16,
        )
    )  # fmt: skip
    monkeypatch.setattr(disk, "free_bytes", lambda path: 0)
    with pytest.raises(
        ResourceError, match=r"about [\d,]+ bytes are needed \(3 checkpoints .* 0 are free"
    ) as caught:
        pipeline.train(recipe)
    assert not (tmp_path / "run").exists()
    needed = int(str(caught.value).split("about ")[1].split(" bytes")[0].replace(",", ""))
    monkeypatch.setattr(disk, "free_bytes", lambda path: needed - 1)
    with pytest.raises(ResourceError):
        pipeline.train(recipe)
    monkeypatch.setattr(disk, "free_bytes", lambda path: needed)
    pipeline.train(recipe)
    run = tmp_path / "run"
    kept = disk.size_of(run / "checkpoints")
    written = kept * 3 // 2 + sum(disk.size_of(run / name) for name in ("adapter", "merged", "portable"))
    assert needed == pytest.approx(written, rel=0.2)


def test_a_merge_that_will_not_fit_is_refused(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """lora-merge tells that there is no room before it writes, with exit 4 and both numbers."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    pipeline.train(load_recipe(write_recipe(tmp_path, base, train__max_steps=1)))
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1000)
    ended = run_here(capsys, "merge", str(tmp_path / "run"), "-o", str(tmp_path / "out"))
    assert ended.code == 4
    assert "bytes are needed, 1,000 are free" in ended.errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["checkpoints", "metrics.jsonl", "recipe.yaml", "summary.json", "generations.jsonl"]
)
def test_a_path_that_is_taken_away(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Something else under a name that the run writes, appearing while it goes on: exit 4, one line with the path."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    recipe = write_recipe(tmp_path, base, train__max_steps=2, evaluate__metrics=["loss", "exact_match"])
    path = tmp_path / "run" / name
    begin = RunFolder._remove

    def take_away(folder: RunFolder, names: list[str]) -> None:
        begin(folder, names)
        if name == "checkpoints":
            path.write_text("a file where a folder is wanted")
        else:
            path.mkdir()

    monkeypatch.setattr(RunFolder, "_remove", take_away)
    ended = run_here(capsys, "train", str(recipe))
    assert ended.code == 4
    assert len(ended.errors.splitlines()) == 1
    assert str(path) in ended.errors
