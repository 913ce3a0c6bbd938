"""The commands as a user starts them: real processes, real signals, two processes that train as one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy import lora, rows, write_base, write_recipe, write_rows

from lora_cli import pipeline
from lora_cli.recipe.load import load_recipe

pytestmark = pytest.mark.usefixtures("own_cache")


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a run's adapter."""
    return load_file(run / "adapter" / "adapter_model.safetensors")


def losses_of(run: Path) -> list[float]:
    """Return the training losses of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def free_port() -> int:
    """Return a port nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def in_two_processes(recipe: Path) -> subprocess.CompletedProcess[str]:
    """Train a recipe under torchrun with two processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    endpoint = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    command = [*torchrun, *endpoint, "-m", "lora_cli", str(recipe)]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)


def test_two_processes_train_as_one(tmp_path: Path, base: Path) -> None:
    """Two gloo processes have the losses, scores and adapter of one with the same global batch, to 1e-6 in fp32."""
    settings = {"evaluate__metrics": ["loss", "exact_match"], "train__eval_every": 4, "train__batch_size": 7}
    alone = lora("train", write_recipe(tmp_path / "alone", base, **settings))
    assert alone.returncode == 0, alone.stderr
    recipe = write_recipe(tmp_path / "two", base, **settings)
    two = in_two_processes(recipe)
    assert two.returncode == 0, two.stderr
    runs = [tmp_path / name / "run" for name in ("alone", "two")]
    assert losses_of(runs[1]) == pytest.approx(losses_of(runs[0]), rel=1e-6)
    first, second = map(tensors_of, runs)
    for name, value in first.items():
        assert float((value - second[name]).norm() / value.norm()) <= 1e-6
    scores = [json.loads((run / "summary.json").read_text())["eval"] for run in runs]
    for state in ("base", "tuned"):
        assert scores[1][state] == pytest.approx(scores[0][state], rel=1e-5)
    answers = [
        (run / "generations.jsonl").read_text().replace(str(run.parent), "") for run in runs
    ]  # the rows' file stands beside the run
    assert answers[0] == answers[1]
    assert two.stdout.count("held-out scores") == 1  # one process speaks


@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "adalora", "initial_rank": 6, "target_rank": 2, "tinit": 1, "tfinal": 2, "delta_t": 1},
        {"method": "relora", "rank": 4, "restart_every": 2, "restart_warmup": 1, "export_rank": 8},
    ],
    ids=["adalora", "relora"],
)
def test_what_acts_between_steps_acts_alike_in_two_processes(
    tmp_path: Path, base: Path, adapter: dict[str, Any]
) -> None:
    """Two gloo processes prune the same triplets, and restart, as one does: losses, ranks and update agree to 1e-5."""
    # At a restart Adam divides by moments near zero, which makes rounding large at the rate of the toy recipe.
    settings: dict[str, Any] = {"train__batch_size": 7, "train__max_steps": 6, "train__learning_rate": 1e-3}
    recipes = [write_recipe(tmp_path / name, base, adapter=adapter, **settings) for name in ("alone", "two")]
    two = in_two_processes(recipes[1])
    assert two.returncode == 0, two.stderr
    pipeline.train(load_recipe(recipes[0]))
    runs = [recipe.parent / "run" for recipe in recipes]
    assert losses_of(runs[1]) == pytest.approx(losses_of(runs[0]), rel=1e-5)
    configs = [json.loads((run / "adapter" / "adapter_config.json").read_text()) for run in runs]
    assert configs[0]["rank_pattern"] == configs[1]["rank_pattern"]
    one, other = (updates_of(tensors_of(run)) for run in runs)
    assert float((one - other).norm() / one.norm()) <= 1e-5


def updates_of(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the products of an adapter's factors, up to their scale, as one vector."""
    products = []
    for name, a in tensors.items():
        if "lora_A" in name:
            b, entries = (
                tensors[name.replace("lora_A", "lora_B")],
                tensors.get(name.replace("lora_A", "lora_E")),
            )
            products.append((b @ (a if entries is None else entries * a)).flatten())
    return torch.cat(products)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_run_resumes(
    tmp_path: Path, base: Path, number: signal.Signals, code: int
) -> None:
    """A signal saves and exits 130 or 143; the same command ends with the adapter of a run never stopped."""
    settings = {"train__epochs": 60, "train__schedule": "constant"}
    straight = lora("train", write_recipe(tmp_path / "straight", base, **settings))
    assert straight.returncode == 0, straight.stderr
    recipe = write_recipe(tmp_path / "stopped", base, **settings)
    run = tmp_path / "stopped" / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_cli", str(recipe)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and len(losses_of(run)) >= 5:
            break
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert errors.startswith("error: stopped by signal")
    assert not (run / "summary.json").exists()
    refused = lora("train", recipe, "--no-resume")
    assert refused.returncode == 2
    assert "--overwrite starts again" in refused.stderr
    resumed = lora("train", recipe)
    assert resumed.returncode == 0, resumed.stderr
    assert "continuing after step" in resumed.stdout
    expected = tensors_of(tmp_path / "straight" / "run")
    assert all(torch.equal(value, expected[key]) for key, value in tensors_of(run).items())
    assert losses_of(run) == losses_of(tmp_path / "straight" / "run")


def test_a_killed_run_goes_on_by_the_same_command(tmp_path: Path, base: Path) -> None:
    """SIGKILL in training; beside the run a second one is refused; the same command ends in the same bytes."""
    settings = {"train__epochs": 60, "train__schedule": "constant", "train__save_every": 5}
    assert lora("train", write_recipe(tmp_path / "straight", base, **settings)).returncode == 0
    recipe = write_recipe(tmp_path / "killed", base, **settings)
    run = tmp_path / "killed" / "run"
    process = subprocess.Popen([sys.executable, "-m", "lora_cli", str(recipe)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list((run / "checkpoints").glob("step-*")):
        time.sleep(0.02)
    refused = lora("train", recipe)
    assert refused.returncode == 2, refused.stderr
    assert f"is being written by process {process.pid} on " in refused.stderr
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    resumed = lora("train", recipe)
    assert resumed.returncode == 0, resumed.stderr
    assert "resume: continuing after step" in resumed.stdout
    name = "adapter/adapter_model.safetensors"
    assert (run / name).read_bytes() == (tmp_path / "straight/run" / name).read_bytes()


def test_the_job_by_commands(tmp_path: Path, base: Path) -> None:
    """train, eval and merge in a row: one stdout table, JSON on request, gates set the exit code, overrides count."""
    recipe = write_recipe(tmp_path, base)
    run = tmp_path / "run"
    trained = lora("train", recipe, "train.epochs=1", "--max", "loss=100")
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr == ""
    assert json.loads((run / "summary.json").read_text())["steps"] == 5

    scored = lora("eval", run, "--json", "--max", "loss=0.0001")
    assert scored.returncode == 5
    assert "loss" in scored.stderr
    ok = lora("eval", run, "--json")
    assert ok.returncode == 0, ok.stderr
    assert set(json.loads(ok.stdout)) == {"base", "tuned"}

    merged = lora("merge", run, "--output", tmp_path / "merged")
    assert merged.returncode == 0, merged.stderr
    plain = lora(
        "eval", tmp_path / "merged", f"data.eval={tmp_path / 'eval.jsonl'}", "model.dtype=float32", "--json"
    )
    assert plain.returncode == 0, plain.stderr
    tuned = json.loads(ok.stdout)["tuned"]["loss"]
    assert json.loads(plain.stdout)["tuned"]["loss"] == pytest.approx(tuned, rel=1e-5)


def test_a_poisoned_base_exits_3(tmp_path: Path) -> None:
    """A loss that is not finite exits 3 with one line that names step and rows."""
    result = lora("train", write_recipe(tmp_path, write_base(tmp_path / "poisoned", poison=True)))
    assert result.returncode == 3
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: step 1: ")


def test_an_unwritable_disk_exits_4(tmp_path: Path, base: Path) -> None:
    """A disk that fills up during training exits 4 with one line, and no half-written adapter appears."""
    recipe = write_recipe(tmp_path, base)
    program = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "import lora_cli.runtime.checkpoint as c, errno\n"
        "def full(*a, **k): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "c.save_tensors = full\n"
        f"from lora_cli.cli import main; raise SystemExit(main(['train', {str(recipe)!r}]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 4, result.stderr
    assert "step-10: cannot be written: the disk is full: " in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run" / "adapter").exists()
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_second_signal_leaves_at_once(tmp_path: Path, base: Path) -> None:
    """While a step goes on for long, a second SIGINT ends the process without waiting for it."""
    write_rows(tmp_path / "long.jsonl", rows(4000))
    recipe = write_recipe(tmp_path, base, data__train=str(tmp_path / "long.jsonl"), train__batch_size=4000)
    process = subprocess.Popen([sys.executable, "-m", "lora_cli", str(recipe)], stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONUNBUFFERED": "1"})  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert time.monotonic() - started < 5
    assert process.returncode in (-signal.SIGINT, 130)
    assert not (tmp_path / "run" / "adapter").exists()


def test_two_processes_tell_one_fault(tmp_path: Path, base: Path) -> None:
    """Under torchrun a bad row is told once, and no process is left waiting for the other."""
    recipe = write_recipe(tmp_path, base)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write("{not json\n")
    two = in_two_processes(recipe)
    assert two.returncode != 0
    told = [line for line in two.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert "train.jsonl:41" in told[0]
    assert not (tmp_path / "run").exists()
