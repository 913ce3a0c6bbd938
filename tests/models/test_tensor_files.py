"""Tensors are written finite or not at all, and what the disk says is told as it is."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy import write_base, write_recipe

from lora_cli import adapters, pipeline
from lora_cli.errors import DivergedError
from lora_cli.models.tensor_files import require_finite, save_tensors
from lora_cli.recipe.load import load_recipe

VALUES = (float("nan"), float("inf"), -float("inf"))


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_value_is_enough(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    """A NaN or an infinity anywhere in a tensor of any type is found, named and counted, and no file is written."""
    for place in (0, 17, 4095):
        tensor = torch.randn(4096).to(dtype)
        tensor[place] = value
        with pytest.raises(DivergedError, match=r"tensor bad: 1 of 4,096 values are not finite, and 1 more"):
            save_tensors({"good": torch.ones(3), "bad": tensor, "worse": tensor}, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_finite_tensors_are_written_as_they_are(tmp_path: Path) -> None:
    """The largest values, empty tensors, integers, shared and strided memory come back bit for bit."""
    shared = torch.arange(12.0).view(3, 4)
    tensors = {
        "large": torch.tensor([torch.finfo(torch.float32).max] * 99),
        "empty": torch.empty(0, 4),
        "bytes": torch.arange(256).to(torch.uint8),
        "count": torch.tensor(3),
        "one": shared,
        "same": shared,
        "turned": shared.T,
    }
    save_tensors(tensors, tmp_path / "x.safetensors")
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_a_refusal_of_the_disk_keeps_its_number(tmp_path: Path) -> None:
    """What safetensors reports as text is an OSError with its number and path again."""
    with pytest.raises(OSError) as caught:
        save_tensors({"x": torch.ones(3)}, tmp_path / "nowhere" / "x.safetensors")
    assert caught.value.errno == errno.ENOENT
    assert str(tmp_path) in str(caught.value.filename)


@pytest.mark.parametrize("forms", [["peft"], ["merged"], ["portable"]])
@pytest.mark.parametrize("value", VALUES)
def test_no_export_holds_what_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, forms: list[str]
) -> None:
    """A weight that went bad after the last step is exported in no format; the tensor is named, exit code 3."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    recipe = load_recipe(
        write_recipe(
            tmp_path,
            write_base(tmp_path / "base"),
            data__eval=None,
            train__max_steps=1,
            export__formats=forms,
        )
    )
    report = adapters._base.Method.report

    def spoil(method: Any) -> list[str]:  # asked after the last step and before the export
        with torch.no_grad():
            next(iter(method.layers.values())).lora_B[0, 0] = value
        return list(report(method))

    monkeypatch.setattr(adapters._base.Method, "report", spoil)
    with pytest.raises(DivergedError, match="not finite"):
        pipeline.train(recipe)
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} <= {"recipe.yaml", "metrics.jsonl", "checkpoints"}
    for file in run.rglob("*.safetensors"):
        require_finite(load_file(file))


def test_no_checkpoint_holds_what_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment that went bad stops the save with exit code 3; the checkpoint before stays, and none has a NaN."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    recipe = load_recipe(
        write_recipe(
            tmp_path, write_base(tmp_path / "base"), data__eval=None, train__max_steps=4, train__save_every=1,
            train__keep_checkpoints=1,
        )
    )  # fmt: skip
    after = adapters._base.Method.after_step

    def spoil(method: Any, optimizer: Any, progress: Any) -> None:
        after(method, optimizer, progress)
        if progress.step == 2:
            weight = next(iter(optimizer.weights.values()))
            weight.moments.exp_avg_sq[0, 0] = float("inf")

    monkeypatch.setattr(adapters._base.Method, "after_step", spoil)
    with pytest.raises(DivergedError, match=r"exp_avg_sq: 1 of .* not finite"):
        pipeline.train(recipe)
    (left,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert left.name == "step-2"
    require_finite(load_file(left / "optimizer.safetensors"))
    assert json.loads((left / "state.json").read_text())["step"] == 2
