"""Compiled decoder layers: the losses of plain ones, the same bits however often a run is stopped, and no crash."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from toy import write_base, write_recipe

from lora_cli import pipeline
from lora_cli.models.compiled import missing_compiler
from lora_cli.recipe.load import load_recipe

Run = Callable[..., list[float]]
needs_compiler = pytest.mark.skipif(
    "LORA_CLI_COMPILE" not in os.environ or missing_compiler(torch.device("cpu")) is not None,
    reason="compiles for half a minute: set LORA_CLI_COMPILE=1 where there is a C++ compiler",
)
SETTINGS: dict[str, Any] = {"data__eval": None, "train__batch_size": 2, "train__compile": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a model folder that no test changes, with one cache of compiled code for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        patch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
        yield write_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture()
def job(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that trains the toy recipe in a folder, like a process of its own, and returns the losses."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))

    def run(name: str, **changes: Any) -> list[float]:
        torch.compiler.reset()
        pipeline.train(load_recipe(write_recipe(tmp_path / name, base, **{**SETTINGS, **changes})))
        lines = (tmp_path / name / "run/metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    return run


def weights_of(run: Path) -> bytes:
    """Return the bytes of what a run exported."""
    (file,) = [*run.glob("adapter/*.safetensors"), *run.glob("merged/*.safetensors")]
    return file.read_bytes()


@needs_compiler
def test_compiled_layers_train_as_plain_ones(
    job: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses of 20 steps over rows of many lengths agree to 1e-5 in float32; a run that was stopped half-way ends in
    the bytes of the whole one. Without adapters, since each would be one more piece of code to compile."""
    changes: dict[str, Any] = {"train__max_steps": 20, "data__packing": True, "train__save_every": 7}
    changes |= {"adapter": {"method": "full"}, "train__learning_rate": 1e-3, "train__keep_checkpoints": 9}
    plain = job("plain", train__compile=False, **changes)
    assert "compiled: " not in capsys.readouterr().out
    compiled = job("compiled", **changes)
    assert re.search(
        r"^compiled: the decoder layers but the first, in \d+ s$", capsys.readouterr().out, re.MULTILINE
    )
    assert compiled == pytest.approx(plain, rel=1e-5)
    run = tmp_path / "compiled/run"
    whole = weights_of(run)
    assert whole != weights_of(tmp_path / "plain/run")
    (run / "summary.json").unlink()
    for step in (14, 20):
        shutil.rmtree(run / f"checkpoints/step-{step}")
    job("compiled", **changes)
    output = capsys.readouterr().out
    assert "resume: continuing after step 7" in output
    assert "not bit-identical" not in output
    assert weights_of(run) == whole


METHODS: dict[str, dict[str, Any]] = {
    "dora on nf4": {
        "adapter": {"method": "dora", "rank": 4, "targets": ["q_proj"]},
        "model__quantize": "nf4",
    },
    "full": {"adapter": {"method": "full"}},
}
"""One whose layers keep what they know between passes, on packed weights, and one without layers."""


@pytest.mark.parametrize("name", METHODS)
def test_every_method_compiles(
    job: Run, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Traced by torch but computed operation by operation, each kind of method ends in the plain run's bytes, though
    its layers are recomputed."""
    monkeypatch.setattr(torch, "compile", _traced(torch.compile))
    changes = {"train__max_steps": 2, "data__packing": True, **METHODS[name]}
    job("compiled", train__activations="recompute", **changes)
    assert "compiled: the decoder layers" in capsys.readouterr().out
    job("plain", train__compile=False, **changes)
    assert weights_of(tmp_path / "compiled/run") == weights_of(tmp_path / "plain/run")


def _traced(original: Callable[..., Any]) -> Callable[..., Any]:
    def compile_(function: Any, *, dynamic: bool, options: dict[str, Any]) -> Any:
        del options
        return original(function, dynamic=dynamic, backend="eager")

    return functools.wraps(original)(compile_)


@pytest.mark.parametrize("fault", ["compiler", "layers"])
def test_what_cannot_be_compiled_trains_all_the_same(
    job: Run, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a compiler, or where torch fails at it, one line says so and the run has the bytes of a plain one."""
    if fault == "layers":
        monkeypatch.setattr(torch, "compile", _broken(torch.compile))
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)} if fault == "compiler" else {}):
        job("asked", train__max_steps=2)
    (line,) = [one for one in capsys.readouterr().out.splitlines() if one.startswith("train.compile: ")]
    assert line.startswith("train.compile: off: ")
    job("plain", train__max_steps=2, train__compile=False)
    assert weights_of(tmp_path / "asked/run") == weights_of(tmp_path / "plain/run")


def _broken(original: Callable[..., Any]) -> Callable[..., Any]:
    def fail(*_: Any) -> None:
        raise NotImplementedError("no code for this")

    return lambda function, **_: original(function, backend=fail)


def test_a_run_that_is_no_longer_compiled_says_so(
    job: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the code that a run began with cannot be made any more, it goes on, with a warning that its bits differ."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **_: function)
        job("run", train__max_steps=2)
    (tmp_path / "run/run/summary.json").unlink()
    capsys.readouterr()
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        job("run", train__max_steps=4)
    assert (
        "resume: warning: not bit-identical to a run in one piece: decoder layers compiled -> plain"
        in capsys.readouterr().out
    )
