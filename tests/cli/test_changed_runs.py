"""A run of any method continued, repeated, merged and scored as it was not meant to be: told in a line, or right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import Result, run_here
from toy import write_base, write_recipe

from lora_cli.cli import train_main

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "qlora": {"rank": 4},
    "dora": {"rank": 4},
    "vera": {"rank": 16},
    "adalora": {"initial_rank": 4, "target_rank": 2},
    "relora": {"rank": 4, "restart_every": 2},
}
CHANGES = {
    "lora": "adapter.rank: 4 -> 8",
    "qlora": "adapter.alpha: 32.0 -> 3.0",
    "dora": "adapter.targets: 'all-linear' -> 'attention'",
    "vera": "adapter.projection_seed: 0 -> 5",
    "adalora": "adapter.tinit: None -> 0",
    "relora": "adapter.reset: 'magnitude' -> 'zero'",
}
"""A key of each method that enters its updates, from its value to another."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base and a finished run of each method, `NAME/run` by `NAME/recipe.yaml`."""
    folder = tmp_path_factory.mktemp("runs")
    base = write_base(folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_CLI_CACHE", str(folder / "cache"))
        for name, keys in METHODS.items():
            recipe = write_recipe(folder / name, base, adapter={"method": name, **keys}, train__max_steps=4)
            assert train_main([str(recipe)]) == 0
    return folder


@pytest.fixture()
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return a function that runs a command in this process."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))

    def run(name: str, *arguments: object) -> Result:
        return run_here(capsys, name, *map(str, arguments))

    return run


def a_copy(runs: Path, folder: Path, name: str) -> Path:
    """Return the recipe of a copy of a finished run."""
    shutil.copytree(runs / name, folder / name)
    recipe = folder / name / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(runs / name), str(folder / name)))
    return recipe


@pytest.mark.parametrize("name", METHODS)
def test_another_setting_is_another_run(tmp_path: Path, runs: Path, command: Any, name: str) -> None:
    """A key that enters the updates is named with both values; --resume is not offered, and refuses it as well."""
    recipe = a_copy(runs, tmp_path, name)
    key, _, values = CHANGES[name].partition(": ")
    override = f"{key}={values.partition(' -> ')[2]}"
    for options in ([], ["--resume"]):
        result = command("train", recipe, override, *options)
        (line,) = result.errors.splitlines()
        assert result.code == 2
        assert CHANGES[name] in line
        assert "--resume goes on" not in line
        assert "--overwrite" in line


def test_another_method_is_named_alone(tmp_path: Path, runs: Path, command: Any) -> None:
    """Where the method differs the line names the two, and none of the keys that only one of them has."""
    recipe = a_copy(runs, tmp_path, "lora")
    result = command("train", recipe, "adapter.method=dora")
    assert result.code == 2
    assert "differs: adapter.method: 'lora' -> 'dora' (--overwrite" in result.errors


def test_relora_is_exported_at_another_rank(tmp_path: Path, runs: Path, command: Any) -> None:
    """A finished ReLoRA run is written again at another rank by --resume, without a step of training."""
    recipe = a_copy(runs, tmp_path, "relora")
    before = (tmp_path / "relora" / "run" / "metrics.jsonl").read_text()
    told = command("train", recipe, "adapter.export_rank=3")
    assert told.code == 2
    assert "adapter.export_rank: None -> 3 (--resume goes on from its last checkpoint" in told.errors
    done = command("train", recipe, "adapter.export_rank=3", "--resume")
    assert done.code == 0, done.errors
    config = json.loads((tmp_path / "relora" / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 3
    losses = [
        [line for line in text.splitlines() if '"loss"' in line]
        for text in (before, (tmp_path / "relora" / "run" / "metrics.jsonl").read_text())
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", METHODS)
def test_merged_twice_it_is_the_same(tmp_path: Path, runs: Path, command: Any, name: str) -> None:
    """Two merges of a run are equal bit for bit; one onto the merged model, or into the same folder, is refused."""
    run, merged = runs / name / "run", [tmp_path / "first", tmp_path / "second"]
    for target in merged:
        assert command("merge", run, "--output", target).code == 0
    first, second = (target / "model.safetensors" for target in merged)
    assert first.read_bytes() == second.read_bytes()
    again = command("merge", run, "--output", merged[0])
    assert (again.code, "exists already" in again.errors) == (2, True)
    onto = command(
        "merge",
        run / "adapter",
        "--output",
        tmp_path / "third",
        f"model.base={merged[0]}",
        "model.dtype=float32",
    )
    assert (onto.code, "was trained on another base" in onto.errors) == (2, True)
    assert not (tmp_path / "third").exists()
