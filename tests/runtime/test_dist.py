"""What processes tell each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_processes import free_port
from toy import write_base, write_recipe

from lora_cli import pipeline
from lora_cli.errors import InputError
from lora_cli.recipe.load import load_recipe
from lora_cli.runtime import dist

PROGRAM = """
import torch
from lora_cli.runtime import dist
with dist.start("cpu") as rt:
    tensors = [torch.full((2, 3), 1.5 + rt.rank).T, torch.arange(4) * (rt.rank + 1)]
    rt.from_main(tensors)
    print([tensor.tolist() for tensor in tensors])
"""


def test_all_processes_have_the_main_ones_tensors() -> None:
    """After `from_main` each process holds the first one's numbers, in tensors of any layout and type."""
    names = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | names | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=120)[0].strip() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert told == [str([[[1.5, 1.5]] * 3, [0, 1, 2, 3]])] * 2


def test_each_process_hears_of_every_other() -> None:
    """What `gather` returns in one process is a row for it, whatever its values."""
    assert dist.Runtime(torch.device("cpu")).gather([1.5, float("inf")]) == [[1.5, float("inf")]]


def test_deterministic_holds_within_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `deterministic` torch refuses what does not repeat its bits, as bad input, and is as before afterwards."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    zeros, ones = torch.zeros(3), torch.ones(1)
    refused = pytest.raises(InputError, match=r"run\.deterministic: found true, but put_")
    with refused, dist.start("cpu", deterministic=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        zeros.put_(torch.tensor([0]), ones)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic
    with dist.start("cpu"):
        zeros.put_(torch.tensor([0]), ones)


def test_a_cpu_repeats_its_bits_anyway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU a deterministic run has the bytes of one that is not, and its summary says what it was."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    base, found = write_base(tmp_path / "base"), []
    for wanted in (False, True):
        folder = tmp_path / str(wanted)
        recipe = write_recipe(folder, base, run__deterministic=wanted, run__output=str(folder / "run"))
        pipeline.train(load_recipe(recipe))
        assert json.loads((folder / "run/summary.json").read_text())["deterministic"] is wanted
        found.append((folder / "run/adapter/adapter_model.safetensors").read_bytes())
    assert found[0] == found[1]
