"""Bad adapters on the command line, merged, scored and started from: exit 2, one line, soon, nothing written.

Faults of the format stand in tests/adapters/test_peft_format.py (FAULTS) and are tried by the command there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run_here, snapshot
from safetensors.torch import load_file, save_file
from toy import rows, write_base, write_recipe, write_rows

from lora_cli.cli import train_main

pytestmark = pytest.mark.reliability("malformed")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MERGE = ("merge", "adapter", "--output", "out", "model.base=./base", "model.dtype=float32")
SCORE = ("eval", "adapter", "model.base=./base", "data.eval=eval.jsonl", "model.dtype=float32")
START = ("train", "recipe.yaml", "adapter={method: lora, init_from: ./adapter}", "run.output=out")
INSPECT = ("lora", "inspect", "adapter", "model.base=./base")


def config(**values: Any) -> Callable[[Path], object]:
    """Return a change of adapter_config.json."""

    def change(folder: Path) -> None:
        path = folder / "adapter" / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def write(name: str, content: bytes) -> Callable[[Path], object]:
    """Return a change of a whole file."""
    return lambda folder: (folder / "adapter" / name).write_bytes(content)


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Return a change of the adapter's tensors."""

    def change(folder: Path) -> None:
        content = load_file(folder / "adapter" / WEIGHTS)
        edit(content)
        save_file(content, folder / "adapter" / WEIGHTS)

    return change


def _without_layer_1(content: dict[str, torch.Tensor]) -> None:
    for name in [name for name in content if "layers.1." in name]:
        del content[name]


def _other_base(folder: Path) -> None:
    weights = load_file(folder / "base" / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "base" / "model.safetensors", {"format": "pt"})


def _narrow(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    def edit(content: dict[str, torch.Tensor]) -> None:
        for key in [key for key in content if name in key]:
            content[key] = content[key][..., :3].contiguous()

    return edit


def _first(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda content: content[min(content)].view(-1)[0].fill_(value)


def _occupied(folder: Path) -> None:
    (folder / "out").mkdir()


def _pickled(folder: Path) -> None:
    (folder / "adapter" / WEIGHTS).rename(folder / "adapter" / "adapter_model.bin")


def _nothing(folder: Path) -> None:
    pass


BAD: dict[str, tuple[tuple[str, ...], Callable[[Path], object], str]] = {
    "config of another world": (MERGE, write(CONFIG, b'{"a": 1}'), "target_modules is None"),
    "config in UTF-16": (MERGE, write(CONFIG, '{"peft_type": "LORA"}'.encode("utf-16")), CONFIG),
    "config nests too deep": (MERGE, write(CONFIG, b'{"a":' + b"[" * 100_000), CONFIG),
    "config passes arguments": (SCORE, config(tokenizer_kwargs={"trust_remote_code": True}), "tokenizer_kwargs"),
    "rank of 2^63": (MERGE, config(r=2**63), "rank 9223"),
    "rank is true": (MERGE, config(r=True), "r is"),
    "alpha NaN": (MERGE, write(CONFIG, b'{"peft_type": "LORA", "r": 4, "lora_alpha": NaN}'), CONFIG),
    "alpha negative": (SCORE, config(lora_alpha=-1), "lora_alpha"),
    "targets a number": (MERGE, config(target_modules=7), "target_modules"),
    "targets a bad expression": (MERGE, config(target_modules="("), "target_modules"),
    "targets with a path": (MERGE, config(target_modules=["../q_proj"]), "target_modules"),
    "one of another method": (START, config(peft_type="VERA"), "is vera, the recipe lora"),
    "weights are pickled": (MERGE, _pickled, WEIGHTS),
    "weights empty": (SCORE, write(WEIGHTS, b""), WEIGHTS),
    "weights are text": (START, write(WEIGHTS, b"hello, world, this is no tensor"), WEIGHTS),
    "header of 2^62 bytes": (MERGE, write(WEIGHTS, (2**62).to_bytes(8, "little") + b"{}"), WEIGHTS),
    "a layer missing": (SCORE, tensors(_without_layer_1), "missing tensors"),
    "a layer too many": (
        START,
        tensors(lambda content: content.update({min(content).replace("layers.0", "layers.9"): torch.ones(4, 32)})),
        "unexpected tensors",
    ),
    "A too narrow": (MERGE, tensors(_narrow("lora_A")), "the layer needs"),
    "B of another rank": (SCORE, tensors(_narrow("lora_B")), "the layer needs"),
    "NaN": (SCORE, tensors(_first(float("nan"))), "not finite"),
    "infinity": (START, tensors(_first(float("inf"))), "not finite"),
    "whole numbers": (
        MERGE, tensors(lambda content: content.update({min(content): content[min(content)].int()})), "int32"
    ),
    "inspected without weights": (INSPECT, write(WEIGHTS, b""), WEIGHTS),
    "inspected without a config": (INSPECT, write(CONFIG, b"[]"), CONFIG),
    # What it is merged into, scored on, and written to
    "another base": (MERGE, _other_base, "was trained on another base"),
    "scored on another base": (SCORE, _other_base, "was trained on another base"),
    "started on another base": (START, _other_base, "was trained on another base"),
    "no base": ((*MERGE[:-2], "model.base=./nowhere"), _nothing, "model.base: ./nowhere: no such folder"),
    "no base named": (MERGE[:-2], _nothing, "say what it adapts: model.base=..."),
    "output there": (MERGE, _occupied, "out exists already"),
    "output in the base": (
        ("merge", "adapter", "--output", "base/out", *MERGE[-2:]), _nothing, "in the base model's folder"
    ),
    "output in the adapter": (("merge", "adapter", "--output", "adapter/out", *MERGE[-2:]), _nothing, "that is read"),
    "output below a file": (
        ("merge", "adapter", "--output", "recipe.yaml/out", *MERGE[-2:]), _nothing, "is not a folder"
    ),
    "nothing to merge": (("merge", "base", "--output", "out"), _nothing, "has no adapter to merge"),
    "a portable one of a model": (("merge", "base", "--output", "out", "--adapter", "portable"), _nothing, "adapter"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base and an adapter that was trained on it, which no test changes."""
    folder = tmp_path_factory.mktemp("adapters")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_CLI_CACHE", str(folder / "cache"))
        recipe = write_recipe(folder, write_base(folder / "base"), train__max_steps=1)
        assert train_main([str(recipe)]) == 0
    shutil.rmtree(folder / "cache")
    (folder / "run" / "adapter").rename(folder / "adapter")
    shutil.rmtree(folder / "run")
    return folder


@pytest.fixture()
def folder(tmp_path: Path, sound: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a base, an adapter, rows and a recipe."""
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    write_recipe(tmp_path, Path("base"), model={"base": "./base", "dtype": "float32"}, run__output="run")
    write_rows(tmp_path / "eval.jsonl", rows(3))
    return tmp_path


@pytest.mark.parametrize("name", BAD)
def test_a_bad_adapter(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """A line for what was found, no traceback, under 5 s, and nothing is left but tokens of sound rows."""
    arguments, change, message = BAD[name]
    change(folder)
    if "another base" not in message:
        (
            folder / "adapter" / "manifest.json"
        ).unlink()  # as of an adapter that others wrote: nothing says it is damaged
    before = snapshot(folder)
    began = os.times()
    result = run_here(capsys, *arguments)
    ended = os.times()
    assert ended.user + ended.system - began.user - began.system < 5
    assert result.code == 2, result.errors
    lines = result.errors.splitlines()
    assert len(lines) <= 6  # of tensors that do not fit five are named
    assert all(line.startswith("error: ") and len(line) < 1000 for line in lines)
    assert message in lines[0]
    assert {
        path: content for path, content in snapshot(folder).items() if not path.startswith("cache")
    } == before
