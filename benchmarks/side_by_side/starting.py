"""Seconds from the command to its first finished step, `lora-train` beside a script for TRL; and our quick commands.

Both tokenize the same rows with the same tokenizer, load the same model and train steps of 4 rows, each as it comes.
Nothing is cached from an earlier start but what the system keeps of files. The process is ended at its first step.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from side_by_side.cases import LORA
from side_by_side.processes import ROOT, MeasurementFailed, environment

ROWS = 4
"""Rows of a step."""
GOALS = {"lora-train, first step": 5.0, "lora-train --check": 0.3, "lora-train --help": 0.15}
"""Most seconds."""
FIRST = ("step      1/", "first step done")
"""What a line begins with once the first step is done: ours, and the script's."""


def seconds(model: Path, dtype: str, folder: Path, threads: int, *, with_trl: bool) -> dict[str, float]:
    """Return the seconds of each command, started once; `folder` is emptied before.

    Raises:
        MeasurementFailed: a command ended before its first step.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows, recipe = folder / "rows.jsonl", folder / "recipe.yaml"
    rows.write_text("".join(json.dumps(row) + "\n" for row in _tickets(64)), encoding="utf-8")
    settings = {
        "model": {"base": str(model), "dtype": dtype},
        "data": {"train": str(rows), "template": "plain"},
        "adapter": LORA,
        "train": {"max_steps": 1000, "batch_size": ROWS},
        "run": {"output": str(folder / "run"), "device": "cpu"},
    }
    recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")
    script = Path(sys.executable).with_name("lora-train")
    train = [str(script)] if script.is_file() else [sys.executable, "-m", "lora_cli"]
    found = {
        "lora-train --help": _until([*train, "--help"], folder, threads, None),
        "lora-train --check": _until([*train, str(recipe), "--check"], folder, threads, None),
        "lora-train, first step": _until([*train, str(recipe)], folder, threads, FIRST),
    }
    if with_trl:
        command = [sys.executable, "-m", "side_by_side.trl_start", str(model), str(rows), str(folder / "trl")]
        found["trl, first step"] = _until(command, folder, threads, FIRST)
    return found


def _tickets(number: int) -> list[dict[str, str]]:
    lines = (ROOT / "lora_cli/assets/tiny/tickets.train.jsonl").read_text(encoding="utf-8").splitlines()
    turns = [json.loads(line)["messages"] for line in lines[:number]]
    return [{"prompt": row[-2]["content"], "completion": row[-1]["content"]} for row in turns]


def _until(command: Sequence[str], folder: Path, threads: int, lines: tuple[str, ...] | None) -> float:
    """Return the seconds until the command says one of `lines`, or ends."""
    variables = environment(threads) | {"LORA_CLI_CACHE": str(folder / "cache")}
    began = time.monotonic()
    process = subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    said = ""
    with process:
        for line in process.stdout:
            said = line.strip() or said
            if lines and line.startswith(lines):
                passed = time.monotonic() - began
                process.kill()
                return passed
    if lines or process.returncode:
        raise MeasurementFailed(f"{' '.join(command)}: exit {process.returncode}: {said}")
    return time.monotonic() - began
