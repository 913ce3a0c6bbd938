"""Out of memory in training, evaluation and generation: what does not fit is made in parts, with the same result.

What raises is simulated, but for the last test, which takes the memory away.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_in_two
from safetensors.torch import load_file
from toy import rows, write_recipe, write_rows

from lora_cli import pipeline
from lora_cli.errors import ResourceError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.memory import is_out_of_memory
from lora_cli.objectives.sft import Sft
from lora_cli.recipe.load import load_recipe
from lora_cli.runtime import order
from lora_cli.stages import _gradient_step
from lora_cli.types import Batch

Run = Callable[..., dict[str, Any]]


@pytest.fixture()
def job(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that trains the toy recipe in a folder with changes and returns the summary."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))

    def run(name: str, **changes: Any) -> dict[str, Any]:
        return pipeline.train(load_recipe(write_recipe(tmp_path / name, base, **changes)))

    return run


class _FailBackward(torch.autograd.Function):
    """The identity, whose gradient does not fit into memory."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Return the input."""
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Fail as CUDA's allocator does."""
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@contextmanager
def room_for(
    tokens: int, *, training: bool = True, fault: Exception | None = None, backward: bool = False
) -> Iterator[list[int]]:
    """Within it a pass of more tokens fails, in training or else in evaluation; yields the tokens that were tried."""
    original, tried = Sft.loss_sum, []

    def loss_sum(self: Sft, model: AdaptedModel, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        if model.model.training is not training:
            return original(self, model, batch)
        tried.append(batch.input_ids.numel())
        too_many = tried[-1] > tokens
        if too_many and not backward:
            raise fault or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if too_many:
            # Fails where part of the gradients has been accumulated: below the last layer.
            block = model.model.model.layers[1]
            hook = block.register_forward_pre_hook(
                lambda _, inputs: (_FailBackward.apply(inputs[0]), *inputs[1:])
            )
            loss, metrics = original(self, model, batch)
            hook.remove()
            return loss, metrics
        return original(self, model, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sft, "loss_sum", loss_sum)
        yield tried


def state_of(run: Path, step: int) -> dict[str, Any]:
    """Return the state of a checkpoint."""
    state: dict[str, Any] = json.loads((run / f"checkpoints/step-{step}/state.json").read_text())
    return state


def weights_of(run: Path) -> bytes:
    """Return the bytes of a run's adapter."""
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: ..."
            ),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError(12, "Cannot allocate memory"), False),
    ],
)
def test_a_want_of_memory_is_told_from_other_faults(error: BaseException, is_one: bool) -> None:
    """CUDA's, the C library's and torch's own are one; a wrong shape is none."""
    assert is_out_of_memory(error) is is_one


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_step_that_does_not_fit_is_made_in_parts(
    job: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], packing: bool, backward: bool
) -> None:
    """With room for 90 tokens, a step of eight rows has the gradient of the one that had room for all, to 1e-6 in
    float32, and the run the bytes of one that was asked for the smaller passes; the size is told and kept."""
    changes = {
        "train__save_every": 1,
        "train__keep_checkpoints": 99,
        "data__packing": packing,
        "data__eval": None,
    }
    job("straight", **changes)
    capsys.readouterr()
    with room_for(90, backward=backward) as tried:
        job("short", **changes)
    told = re.findall(r"train\.micro_batch_tokens: .* at most (\d+) tokens at once", capsys.readouterr().out)
    size = int(told[-1])
    assert [int(one) for one in told] == sorted({int(one) for one in told}, reverse=True)
    assert size <= 90 < max(tried)
    straight, short = tmp_path / "straight/run", tmp_path / "short/run"
    assert state_of(short, 1)["micro_batch_tokens"] == size
    assert state_of(short, 10)["micro_batch_tokens"] == size
    # After one step Adam's first moment is the gradient times 1 - beta_1.
    first, second = (load_file(run / "checkpoints/step-1/optimizer.safetensors") for run in (straight, short))
    names = [name for name in first if name.endswith("exp_avg")]
    assert sum(float(first[name].norm()) for name in names) > 0
    for name in names:
        assert float((first[name] - second[name]).norm()) <= 1e-6 * max(float(first[name].norm()), 1e-12)
    job("asked", **changes, train__micro_batch_tokens=size)
    assert weights_of(tmp_path / "asked/run") == weights_of(short)


def test_a_resumed_run_keeps_the_size_and_the_draws(job: Run, tmp_path: Path) -> None:
    """With a dropout, a resumed run keeps the smaller passes, and has the bytes of the one that had to split."""
    changes: dict[str, Any] = {"train__save_every": 1, "train__keep_checkpoints": 9, "adapter__dropout": 0.2}
    changes |= {"data__eval": None, "train__max_steps": 5}
    with room_for(90):
        job("run", **changes)
    run = tmp_path / "run" / "run"
    assert state_of(run, 1)["micro_batch_tokens"] is not None
    weights = weights_of(run)
    for step in (4, 2):
        (run / "summary.json").unlink()
        for later in range(step + 1, 6):
            shutil.rmtree(run / f"checkpoints/step-{later}", ignore_errors=True)
        with room_for(90) as tried:
            job("run", **changes)
        assert max(tried) <= 90
        assert weights_of(run) == weights


def test_a_row_that_does_not_fit_exits_4(job: Run, tmp_path: Path) -> None:
    """Where one row has no room, the fault names it, its length, the memory held and what to change; nothing is left
    half-written."""
    with room_for(20), pytest.raises(ResourceError) as caught:
        job("run")
    told = str(caught.value)
    assert caught.value.exit_code == 4
    assert re.search(
        r"^train\.micro_batch_tokens: out of memory: one row of \d+ tokens does not fit: .*train\.jsonl:\d+; at most"
        r" \d+\.\d\d GB were held \(lower data\.max_length",
        told,
    )
    assert {path.name for path in (tmp_path / "run/run").iterdir()} <= {"recipe.yaml", "metrics.jsonl"}


@pytest.mark.parametrize("fault", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_evaluation_goes_on_in_parts(
    job: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: Exception
) -> None:
    """Held-out losses that do not fit, while training and at the end, are taken in parts: the same to 1e-6."""
    straight = job("straight", train__eval_every=5)
    capsys.readouterr()
    with room_for(60, training=False, fault=fault) as tried:
        short = job("short", train__eval_every=5)
    assert min(tried) <= 60 < max(tried)
    output = capsys.readouterr().out
    assert output.count("train.micro_batch_tokens: ") >= 1
    assert output.count("evaluate.batch_tokens: ") >= 1
    for state in ("base", "tuned"):
        assert short["eval"][state] == pytest.approx(straight["eval"][state], rel=1e-6)
    metrics = [
        [line.get("eval_loss") for line in map(json.loads, path.read_text().splitlines())]
        for path in (tmp_path / f"{name}/run/metrics.jsonl" for name in ("straight", "short"))
    ]
    assert metrics[0] == [pytest.approx(value, rel=1e-6) if value else None for value in metrics[1]]


def test_generation_goes_on_in_parts(
    job: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers that are not generated for want of memory are generated a few at a time, and are the same."""
    straight = job("straight", evaluate__metrics=["exact_match"])
    original, sizes = AdaptedModel.generate, []

    def generate(self: AdaptedModel, prompts: Any, **settings: Any) -> list[list[int]]:
        sizes.append(len(prompts))
        if len(prompts) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, prompts, **settings)

    monkeypatch.setattr(AdaptedModel, "generate", generate)
    short = job("short", evaluate__metrics=["exact_match"])
    assert max(sizes) > 3 >= sizes[-1]
    assert short["eval"] == straight["eval"]
    answers = [
        (tmp_path / name / "run/generations.jsonl").read_text().replace(f"/{name}/", "/")
        for name in ("straight", "short")
    ]
    assert answers[0] == answers[1]
    assert "evaluate.batch_tokens: 11 rows" in capsys.readouterr().out


@pytest.mark.parametrize(("first", "last"), [(0, 100), (0, 2), (3, 100), (5, 6), (7, 9), (11, 100)])
def test_the_step_of_the_longest_row_is_found(first: int, last: int) -> None:
    """It is the one that a search through the rows of every step to the end of the epoch finds."""
    lengths = np.random.Generator(np.random.PCG64(3)).permutation(43)
    found = order.step_of_longest(lengths, first, last, batch_size=7, seed=5)
    steps = range(first, min(last, 7 * (first // 7 + 1)))  # 7 steps an epoch, the last of one row
    longest = {
        step: max(lengths[order.rows_of_step(step, num_rows=43, batch_size=7, seed=5)]) for step in steps
    }
    assert found == max(longest, key=lambda step: longest[step])


def test_the_longest_row_is_tried_first(
    job: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pass with the longest row of a run fails before the first update, though its step is a later one."""
    monkeypatch.setattr(_gradient_step, "_TRIAL_SHARE", 1.0)
    monkeypatch.setattr(_gradient_step, "_SURE", 0.0)
    long = {"prompt": "big " * 120, "completion": "x"}
    data = str(write_rows(tmp_path / "data.jsonl", [*rows(40), long]))
    with (
        room_for(120),
        pytest.raises(ResourceError, match=r"one row of \d+ tokens does not fit: .*data\.jsonl:41"),
    ):
        job("run", data__train=data)
    assert not (tmp_path / "run/run/checkpoints").exists()
    assert (tmp_path / "run/run/metrics.jsonl").read_text() == ""
    capsys.readouterr()
    with room_for(150):
        job("fits", data__train=data, data__max_length=100)
    lines = capsys.readouterr().out.splitlines()
    first_step = next(index for index, line in enumerate(lines) if line.startswith("step "))
    assert any("tokens at once" in line for line in lines[:first_step])


def test_the_trial_changes_nothing(job: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a dropout, in bfloat16, a run whose longest passes were tried out first has the bytes of one without; where
    they need little of the memory that is free, they are not tried."""
    found = []
    for number, (share, sure) in enumerate([(0.0, 0.0), (1.0, 0.0), (1.0, 0.25)]):
        monkeypatch.setattr(_gradient_step, "_TRIAL_SHARE", share)
        monkeypatch.setattr(_gradient_step, "_SURE", sure)
        with room_for(10**9) as tried:
            job(f"run{number}", adapter__dropout=0.2, model__dtype="bfloat16", data__eval=None)
        found.append((len(tried), weights_of(tmp_path / f"run{number}" / "run")))
    assert found[1][0] > found[0][0] == found[2][0]
    assert found[0][1] == found[1][1] == found[2][1]


def test_two_processes_agree_on_the_size(tmp_path: Path, base: Path, job: Run) -> None:
    """Where the second of two processes has less room, both make smaller passes from then on, with the losses of one
    process that has room for all, to 1e-6."""
    changes = {"data__eval": None, "train__save_every": 1}
    program = (
        "import os, sys, torch\n"
        "from lora_cli.objectives.sft import Sft\n"
        "original = Sft.loss_sum\n"
        "def loss_sum(self, model, batch):\n"
        "    if os.environ['RANK'] == '1' and batch.input_ids.numel() > 60: raise MemoryError\n"
        "    return original(self, model, batch)\n"
        "Sft.loss_sum = loss_sum\n"
        "from lora_cli.cli import train_main\n"
        "raise SystemExit(train_main([sys.argv[1]]))\n"
    )
    job("alone", **changes)
    both = run_in_two(program, str(write_recipe(tmp_path / "two", base, **changes)))
    assert [one.returncode for one in both] == [0, 0], both[0].stderr + both[1].stderr
    assert state_of(tmp_path / "two/run", 10)["micro_batch_tokens"] <= 60
    losses = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / f"{name}/run/metrics.jsonl").read_text().splitlines()
        ]
        for name in ("alone", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is Linux's")
def test_a_real_want_of_memory_is_survived(tmp_path: Path, base: Path) -> None:
    """A process that may map only so much more memory splits what does not fit, and ends with the losses of one with
    room, to 1e-5."""
    big = [{"prompt": f"{row['prompt']} " * 30, "completion": row["completion"]} for row in rows(128)]
    changes: dict[str, Any] = {
        "data__train": str(write_rows(tmp_path / "big.jsonl", big)),
        "data__eval": None,
    }
    changes |= {"train__batch_size": 128, "train__max_steps": 2, "train__micro_batch_tokens": 100_000}
    program = (
        "import resource, sys\n"
        "from lora_cli.stages import train\n"
        "original = train.run\n"
        "def run(*a, **k):\n"
        "    used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]), resource.RLIM_INFINITY))\n"
        "    try: return original(*a, **k)\n"
        "    finally: resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "train.run = run\n"
        "from lora_cli.cli import train_main\n"
        "raise SystemExit(train_main([sys.argv[1]]))\n"
    )
    losses, outputs = [], []
    for name, room in (("much", 10**12), ("little", 10**8)):
        recipe = write_recipe(tmp_path / name, base, **changes)
        done = subprocess.run(
            [sys.executable, "-c", program, str(recipe), str(room)],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
        lines = (tmp_path / name / "run/metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert "tokens at once" not in outputs[0]
    assert "tokens at once" in outputs[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
