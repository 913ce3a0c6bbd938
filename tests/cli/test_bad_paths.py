"""Pipes, devices, loops of links and folders of the kernel in the place of files: exit 2, and no waiting."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import run_here, snapshot
from model_folders import write_model
from toy import rows, write_rows

pytestmark = pytest.mark.reliability("malformed")
GOOD = "model: {base: ./base}\ndata: {train: rows.jsonl}\nrun: {output: out}\n"


def pipe(name: str) -> Callable[[Path], object]:
    """Return a change that puts a pipe, which nobody writes into, in the place of a file."""

    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        os.mkfifo(path)

    return change


def shards_in_a_pipe(folder: Path) -> None:
    """Put a pipe in the place of the list of shards, which is read where the weights are not one file."""
    (folder / "base/model.safetensors").unlink()
    pipe("base/model.safetensors.index.json")(folder)


def loop(folder: Path) -> None:
    (folder / "loop").symlink_to("loop")


def _folder_for_a_recipe(folder: Path) -> None:
    (folder / "r.yaml").unlink()
    (folder / "r.yaml").mkdir()


def _nothing(folder: Path) -> None:
    pass


TRAIN = ("train", "r.yaml")
BAD: dict[str, tuple[tuple[str, ...], Callable[[Path], object], str]] = {
    "a recipe that is a pipe": (TRAIN, pipe("r.yaml"), "is not a plain file (give a recipe file)"),
    "a recipe that is a folder": (TRAIN, _folder_for_a_recipe, "is a folder"),
    "a recipe without end": (("train", "/dev/zero"), _nothing, "is not a plain file"),
    "a recipe in a loop": (("train", "loop"), loop, "Too many levels of symbolic links"),
    "a recipe below a file": (("train", "rows.jsonl/r.yaml"), _nothing, "rows.jsonl/r.yaml"),
    "rows in a pipe": ((*TRAIN, "data.train=./p.jsonl"), pipe("p.jsonl"), "is not a regular file"),
    "rows without end": ((*TRAIN, "data.train=/dev/zero"), _nothing, "data.train: /dev/zero"),
    "rows in a loop": ((*TRAIN, "data.train=./loop"), loop, "is a broken symbolic link"),
    "rows below a file": ((*TRAIN, "data.train=./rows.jsonl/a.jsonl"), _nothing, "no such file"),
    "a template in a pipe": ((*TRAIN, "data.template=./p.jinja"), pipe("p.jinja"), "is not a file"),
    "a template without end": ((*TRAIN, "data.template=/dev/zero"), _nothing, "is not a file"),
    "a template in a loop": ((*TRAIN, "data.template=./loop"), loop, "Too many levels of symbolic links"),
    "a config in a pipe": (TRAIN, pipe("base/config.json"), "config.json: is not a plain file"),
    "a tokenizer in a pipe": (TRAIN, pipe("base/tokenizer.json"), "tokenizer.json: is not a plain file"),
    "tokens in a pipe": (TRAIN, pipe("base/tokenizer_config.json"), "is not a plain file"),
    "settings in a pipe": (TRAIN, pipe("base/generation_config.json"), "is not a plain file"),
    "shards in a pipe": (TRAIN, shards_in_a_pipe, "is not a plain file"),
    "a start in a loop": ((*TRAIN, "adapter.init_from=./loop"), loop, "there is no adapter_config.json"),
    "a start in a pipe": (
        (*TRAIN, "adapter.init_from=./a"), pipe("a/adapter_config.json"), "there is no adapter_config.json"
    ),
    "a run in a pipe": ((*TRAIN, "run.output=r"), pipe("r/recipe.yaml"), "is not a run of lora-cli"),
    "an output in a loop": ((*TRAIN, "run.output=loop"), loop, "is a loop of symbolic links"),
    "an output below a loop": ((*TRAIN, "run.output=loop/x"), loop, "is a loop of symbolic links"),
    "an output that is a device": ((*TRAIN, "run.output=/dev/full"), _nothing, "is not a folder"),
    "a target in a pipe": (("eval", "r"), pipe("r/recipe.yaml"), "neither a run, an adapter nor a model"),
    "a key without end": ((*TRAIN, "--allow", "x" * 5000), _nothing, "[...]"),
    "a target without end": (("eval", "x" * 5000), _nothing, "has a part of 5000 bytes"),
    "a target in a loop": (("eval", "loop"), loop, "loop"),
    "an adapter in a pipe": (
        ("merge", "a", "--output", "out", "model.base=./base"),
        pipe("a/adapter_config.json"),
        "neither a run, an adapter",
    ),
    "a page of the kernel's": (("lora", "data", "r.yaml", "--html", "/proc/x/x.html"), _nothing, "--html"),
    "a merge in a loop": (("merge", "base", "--output", "loop/x"), loop, "loop"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """One line that names the path, at once, and nothing written."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", rows(3))
    (tmp_path / "r.yaml").write_text(GOOD)
    arguments, change, message = BAD[name]
    change(tmp_path)
    before = snapshot(tmp_path)
    began = os.times()
    result = run_here(capsys, *arguments)
    ended = os.times()
    assert (
        ended.elapsed - began.elapsed < 20
    )  # of a machine under load; a pipe would be waited for without end
    assert result.code == 2, result.errors
    (line,) = result.errors.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert snapshot(tmp_path) == before
