"""The writer made to fail at each of its steps, in real processes of the real command."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from forked_commands import Ended, ForkServer
from toy import write_recipe

from lora_cli.failpoints import STEPS
from lora_cli.manifest import sha256_of, verify

TARGETS = {"checkpoint": "step-4", "adapter": "adapter", "merged": "merged"}
KINDS = ("kill", "enospc", "eio")
CASES = [
    (step, kind, list(TARGETS)[(turn + i + j) % 3])
    for turn in range(3)
    for i, step in enumerate(STEPS)
    for j, kind in enumerate(KINDS)
]
"""Every step with every kind and every target; the first 36 are every step with every kind."""
RESULTS = ("adapter/adapter_model.safetensors", "merged/model.safetensors")


@dataclass
class Setting:
    """What the cases share: a base, the token cache, and a run that nothing disturbed."""

    server: ForkServer
    base: Path
    cache: Path
    straight: Path

    def run(self, *arguments: str | Path, **how: Any) -> Ended:
        """Run `lora ARGUMENTS`; `how` as `ForkServer.start` has it."""
        return self.server.run(self.cache.parent, *arguments, **how)

    def recipe(self, folder: Path) -> Path:
        """Write the recipe of a run in `folder`: four steps, two saves, two exports."""
        return write_recipe(
            folder, self.base, data__eval=None, train__max_steps=4, train__save_every=2,
            train__keep_checkpoints=1, export__formats=["peft", "merged"],
        )  # fmt: skip


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, base: Path, server: ForkServer) -> Setting:
    """Return what the cases share."""
    folder = tmp_path_factory.mktemp("writer")
    made = Setting(server, base, folder / "cache", folder / "straight" / "run")
    server.succeed(folder, "train", made.recipe(folder / "straight"))
    return made


def public_folders(*places: Path) -> list[Path]:
    """Return every folder below that stands under a public name and should have a manifest."""
    names = ("step-*", "adapter", "merged", "tokens/*")
    found = {path for place in places for name in names for path in place.rglob(name) if path.is_dir()}
    return sorted(path for path in found if not any(part.startswith(".") for part in path.parts))


def hidden(run: Path) -> list[str]:
    """Return what the writer left beside public names, by kind."""
    return sorted(path.name[1:4] for path in run.rglob(".*") if path.name != ".lock")


@pytest.mark.reliability("writer")
@pytest.mark.cases(36, 108)
def test_a_failing_writer_leaves_only_whole_folders(setting: Setting, tmp_path: Path, case: int) -> None:
    """Killed or refused at any step: no folder is half, the checkpoint before stays, the rerun has the same bytes."""
    step, kind, target = CASES[case]
    run, recipe, command = tmp_path / "run", setting.recipe(tmp_path), ["train", tmp_path / "recipe.yaml"]
    name = TARGETS[target]
    if target != "checkpoint":
        # As a run that was stopped after its last save; deletion is of what a finished one had exported.
        shutil.copytree(setting.straight, run)
        if step == "during-delete":
            command.append("--overwrite")
        else:
            for one in ("adapter", "merged"):
                shutil.rmtree(run / one)
            (run / "summary.json").unlink()
    elif step == "during-delete":
        name = "step-2"
    environment = {"LORA_CLI_CACHE": str(setting.cache)}
    failpoint = {"LORA_FAILPOINT": f"{step}:{kind}:{name}"}
    ended = setting.run(*command, environment=environment | failpoint)

    if kind == "kill":
        assert ended.code == -9, ended.errors
    else:
        assert ended.code == 4, ended.errors
        assert ended.errors.startswith("error: ")
        assert len(ended.errors.splitlines()) == 1
        assert hidden(run) == (["del"] if step == "during-delete" else [])
    for folder in public_folders(run, setting.cache):
        verify(folder)
    if target == "checkpoint" and step != "during-delete":
        assert (run / "checkpoints" / "step-2").is_dir()
    assert not (run / "summary.json").exists()

    again = setting.run(*command, environment=environment)
    assert again.code == 0, again.errors
    assert hidden(run) == []
    folders = public_folders(run)
    assert {folder.name for folder in folders} == {"step-4", "adapter", "merged"}
    for folder in folders:
        verify(folder)
    for result in RESULTS:
        assert sha256_of(run / result) == sha256_of(setting.straight / result)
    assert recipe.is_file()


@pytest.mark.parametrize("step", ["half-file", "before-rename", "after-rename"])
def test_a_killed_merge_leaves_no_output(setting: Setting, tmp_path: Path, step: str) -> None:
    """lora-merge killed in its writer leaves a whole output or none; the same command then writes the run's bytes."""
    environment = {"LORA_CLI_CACHE": str(setting.cache)}
    command = ("merge", setting.straight, "--output", tmp_path / "out")
    ended = setting.run(*command, environment=environment | {"LORA_FAILPOINT": f"{step}:kill:out"})
    assert ended.code == -9
    if step == "after-rename":
        verify(tmp_path / "out")
        return
    assert not (tmp_path / "out").exists()
    again = setting.run(*command, environment=environment)
    assert again.code == 0, again.errors
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sha256_of(tmp_path / "out" / "model.safetensors") == sha256_of(setting.straight / RESULTS[1])


def test_a_killed_tokenization_leaves_no_cache(setting: Setting, tmp_path: Path) -> None:
    """A cache whose writer was killed is not there; the rerun writes it and trains to the same bytes."""
    recipe = setting.recipe(tmp_path)
    environment = {"LORA_CLI_CACHE": str(tmp_path / "cache")}
    ended = setting.run("train", recipe, environment=environment | {"LORA_FAILPOINT": "after-sync:kill"})
    assert ended.code == -9
    assert not (tmp_path / "run").exists()
    assert public_folders(tmp_path / "cache") == []
    assert setting.run("train", recipe, environment=environment).code == 0
    (cache,) = public_folders(tmp_path / "cache")
    verify(cache)
    assert [path for path in cache.parent.iterdir() if path.name.startswith(".")] == []
    assert sha256_of(tmp_path / "run" / RESULTS[0]) == sha256_of(setting.straight / RESULTS[0])


@pytest.mark.parametrize("value", ["nowhere:kill", "after-rename:explode", "after-rename:half"])
def test_a_wrong_failpoint_is_refused(setting: Setting, tmp_path: Path, value: str) -> None:
    """A step or a kind that does not exist exits 2 before anything is written."""
    ended = setting.run("train", setting.recipe(tmp_path), environment={"LORA_FAILPOINT": value})
    assert ended.code == 2
    assert ended.errors.startswith("error: LORA_FAILPOINT: ")
    assert not (tmp_path / "run").exists()


def test_a_file_cut_to_half_and_killed_is_not_published(setting: Setting, tmp_path: Path) -> None:
    """The kind `half` cuts a file of the adapter and kills; no adapter is there, and the rerun has it whole."""
    recipe, environment = setting.recipe(tmp_path), {"LORA_CLI_CACHE": str(setting.cache)}
    failpoint = {"LORA_FAILPOINT": "file-written:half:adapter"}
    assert setting.run("train", recipe, environment=environment | failpoint).code == -9
    assert not (tmp_path / "run" / "adapter").exists()
    assert setting.run("train", recipe, environment=environment).code == 0
    assert sha256_of(tmp_path / "run" / RESULTS[0]) == sha256_of(setting.straight / RESULTS[0])


def test_a_file_that_may_not_grow_exits_4(setting: Setting, tmp_path: Path) -> None:
    """Under a real limit on a file's size a save exits 4 with one line and leaves nothing; the rerun completes."""
    recipe, environment = setting.recipe(tmp_path), {"LORA_CLI_CACHE": str(setting.cache)}
    ended = setting.run("train", recipe, environment=environment, file_bytes=50_000)
    assert ended.code == 4, ended.errors
    assert len(ended.errors.splitlines()) == 1
    assert "step-2" in ended.errors
    assert "ulimit" in ended.errors
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert setting.run("train", recipe, environment=environment).code == 0
    assert sha256_of(tmp_path / "run" / RESULTS[0]) == sha256_of(setting.straight / RESULTS[0])
