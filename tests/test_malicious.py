"""Nothing that was handed to us runs: hostile folders, adapters, runs, recipes and rows under the real commands."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from artefacts import ARTEFACTS, CANARY, Artefact, code, pickled
from command_line import ROOT, Result, run_here
from toy import write_base, write_recipe
from watched import watched

COMMANDS = ("train", "eval", "merge")
NAMES = list(ARTEFACTS)
PLANTED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".py")
"""Endings of planted files that no command may so much as open."""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scene with nothing hostile in it, whose run was trained by the command itself."""
    from lora_cli.cli import train_main

    folder = tmp_path_factory.mktemp("scene") / "template"
    patch = pytest.MonkeyPatch()
    folder.mkdir()
    patch.chdir(folder)
    patch.setenv("LORA_CLI_CACHE", str(folder / "cache"))
    write_base(folder / "base")
    write_recipe(Path("."), Path("base"), train__epochs=1, train__save_every=2)
    assert train_main(["recipe.yaml"]) == 0
    patch.undo()
    return folder


@pytest.fixture()
def scene(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the scene, which is the current folder."""
    folder = tmp_path / "scene"
    shutil.copytree(template, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LORA_CLI_CACHE", str(folder / "cache"))
    return folder


def run(capsys: pytest.CaptureFixture[str], command: str, artefact: Artefact) -> Result:
    """Run a command on what was handed over."""
    if command == "merge":
        return run_here(capsys, "merge", "run", "--output", "merged")
    if command == "eval":
        return run_here(capsys, "eval", "run")
    recipe = "run/recipe.yaml" if artefact.of == "run" else "recipe.yaml"
    start = ["adapter.init_from=run"] if artefact.of == "adapter" else []
    return run_here(capsys, "train", recipe, "run.output=new", *start)


@pytest.mark.reliability("malicious")
@pytest.mark.cases(2 * len(NAMES), 3 * len(NAMES))
def test_nothing_that_was_handed_over_runs(
    scene: Path, capsys: pytest.CaptureFixture[str], case: int
) -> None:
    """The canary stays away, no socket is opened, no pickle is read, and the command succeeds or exits 2 in lines."""
    index = case % len(NAMES)
    name, command = NAMES[index], COMMANDS[(case // len(NAMES) + index) % 3]
    artefact = ARTEFACTS[name]
    artefact.plant(scene)
    with watched() as seen:
        result = run(capsys, command, artefact)
    told = f"{name}, {command}: {result.code} {result.errors}"
    assert not (scene / CANARY).exists(), told
    assert seen.events == [], told
    opened = [path for path in seen.opened if path.startswith(f"{scene}/") and path.endswith(PLANTED)]
    opened = [path for path in opened if not path.startswith(f"{scene}/cache/")]  # tokens.bin is our own
    assert opened == [], told
    assert result.code in ((0, 2) if artefact.code is None else (artefact.code,)), told
    published = [path for name in ("new", "merged") for path in (scene / name).rglob("*") if path.is_file()]
    assert [path for path in published if b"a private key" in path.read_bytes()] == [], told
    if result.code == 2:
        lines = result.errors.splitlines()
        assert {line.startswith("error: ") and len(line) < 700 for line in lines} == {True}, told
        assert not (scene / "new").exists(), told
        assert not (scene / "merged").exists(), told


SCRIPT = "import sys\nfrom lora_cli.cli import train_main\nif __name__ == '__main__':\n    sys.exit(train_main())\n"
"""What pip writes as `lora-train`."""


@pytest.mark.reliability("malicious")
def test_modules_in_the_current_folder_are_not_imported(scene: Path) -> None:
    """A console script, and the workers that it starts, take no module from the folder in which they are run."""
    for name in (
        "json",
        "torch",
        "random",
        "pickle",
        "multiprocessing",
        "sitecustomize",
        "usercustomize",
        "runpy",
    ):
        (scene / f"{name}.py").write_text(code(scene))
    (scene / "bin").mkdir()
    (scene / "bin/lora-train").write_text(SCRIPT)
    (scene / "second.jsonl").write_text((scene / "train.jsonl").read_text())
    # A cache of its own: rows that are in one need no workers.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LORA_CLI_CACHE": str(scene / "empty")}
    done = subprocess.run(
        [sys.executable, "bin/lora-train", "recipe.yaml", "run.output=new", "data.train=[train.jsonl, second.jsonl]"],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (scene / CANARY).exists()


def test_the_artefacts_are_live(scene: Path) -> None:
    """The pickles and modules that are planted do make the canary when they are read or imported."""
    for run_it in (lambda: pickle.loads(pickled(scene)), lambda: exec(code(scene))):
        with watched() as seen:
            run_it()
        assert (scene / CANARY).exists()
        (scene / CANARY).unlink()
    with watched() as seen:
        pickle.loads(pickled(scene))
    assert any("pickle.find_class" in event for event in seen.events)
