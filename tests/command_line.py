"""The real command line, in this process or in one of its own, and what a folder holds before and after."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from lora_cli.cli import eval_main, main, merge_main, train_main

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {"train": train_main, "eval": eval_main, "merge": merge_main, "lora": main}


@dataclass
class Result:
    """How a command ended."""

    code: int
    output: str
    errors: str


def run_process(folder: Path, command: str, *arguments: str) -> Result:
    """Run a command as its console script does, in `folder`."""
    call = f"import sys; from lora_cli.cli import {COMMANDS[command].__name__} as main; sys.exit(main())"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", call, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def run_here(capsys: pytest.CaptureFixture[str], command: str, *arguments: str) -> Result:
    """Run a command in this process, in the current folder: 50 times faster than a process of its own."""
    capsys.readouterr()
    code = COMMANDS[command](arguments)
    captured = capsys.readouterr()
    return Result(code, captured.out, captured.err)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Return every path below a folder and what it holds."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }
