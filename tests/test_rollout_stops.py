"""Signals while completions are sampled: heeded before the next token, and the same command ends in the same bits."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_processes import free_port, in_two_processes
from test_rollout_runs import lines_of, rollout_recipe, told

from lora_cli import pipeline
from lora_cli.errors import Stopped
from lora_cli.models import sampling
from lora_cli.recipe.load import load_recipe

pytestmark = pytest.mark.usefixtures("own_cache")


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch, signal_at: int | None) -> Iterator[list[int]]:
    """Count how many tokens a batch is drawn for; with the one of this number the process gets a SIGTERM."""
    drawn: list[int] = []
    choose = sampling.choose

    def counted(*given: object) -> torch.Tensor:
        drawn.append(len(drawn) + 1)
        if len(drawn) == signal_at:
            signal.raise_signal(signal.SIGTERM)
        return choose(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(sampling, "choose", counted)
        yield drawn


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_signal_between_any_two_tokens(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """In a rollout, an evaluation meanwhile or the last one, no token is drawn after a signal, what was made is saved,
    and the same command ends in the bits, metrics and rollouts of a run that was never stopped."""
    path = rollout_recipe(
        tmp_path, base, name, train__eval_every=2, train__save_every=None, train__batch_size=2
    )
    recipe, run, straight = load_recipe(path), tmp_path / "run", tmp_path / "straight"
    with counting(monkeypatch, None) as every:
        pipeline.train(recipe)
    run.rename(straight)
    stopped = set()
    for place in (0.01, 0.3, 0.5, 0.7, 0.99):
        number = max(1, round(place * len(every)))
        with counting(monkeypatch, number) as drawn, pytest.raises(Stopped) as stop:
            pipeline.train(recipe)
        assert len(drawn) == number
        assert stop.value.exit_code == 143
        stopped.add(str(stop.value))
        assert not (run / "summary.json").exists()
        pipeline.train(recipe)
        expected, again = (
            load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (straight, run)
        )
        assert [key for key in expected if not torch.equal(expected[key], again[key])] == [], place
        assert told(run) == told(straight), place
        assert (run / "rollouts.jsonl").read_bytes() == (straight / "rollouts.jsonl").read_bytes(), place
        shutil.rmtree(run)
    assert any("nothing to save" in line for line in stopped)
    assert any(re.search(r"after step \d of 7, saved", line) for line in stopped)


def test_a_signal_to_one_of_two_processes(tmp_path: Path, base: Path) -> None:
    """One of two processes is stopped within its rollout: both leave, none waits, and the same command goes on."""
    path = rollout_recipe(tmp_path / "two", base, "ppo", train__max_steps=4, data__eval=None)
    program = tmp_path / "stopped.py"
    program.write_text(
        "import os, signal, sys\n"
        "from lora_cli.cli import train_main\n"
        "from lora_cli.models import sampling\n"
        "choose, drawn = sampling.choose, []\n"
        "def counted(*given):\n"
        "    drawn.append(1)\n"
        "    if os.environ['RANK'] == '1' and len(drawn) == 13:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return choose(*given)\n"
        "sampling.choose = counted\n"
        f"sys.exit(train_main([{str(path)!r}]))\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    endpoint = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    stopped = subprocess.run(
        [*torchrun, *endpoint, str(program)], capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
    )  # fmt: skip
    told_of_it = re.findall(r"^error: (stopped by signal 15 .*)$", stopped.stderr, re.MULTILINE)
    assert told_of_it == ["stopped by signal 15 after step 3 of 4, saved"], stopped.stderr
    again = in_two_processes(path)
    assert again.returncode == 0, again.stderr
    alone = rollout_recipe(tmp_path / "alone", base, "ppo", train__max_steps=4, data__eval=None)
    pipeline.train(load_recipe(alone))
    for one, other in zip(told(tmp_path / "alone/run"), told(tmp_path / "two/run"), strict=True):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-6)
    completions = [
        [line["completion"] for line in lines_of(tmp_path / folder / "run/rollouts.jsonl")]
        for folder in ("alone", "two")
    ]
    assert completions[0] == completions[1]
