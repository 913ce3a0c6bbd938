"""Real command lines in processes of their own, forked from one that has imported torch: 0.1 s to start in place of 3.

The parent only imports. It runs nothing of lora-cli, so that a child is what a fresh process would be: it reads its
environment, and is killed, filled up and signalled alone.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Ended:
    """How a process ended; the code of one that a signal killed is minus its number."""

    code: int
    output: str
    errors: str


class ForkServer:
    """Runs command lines one after the other; `folder` takes what they print."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = os.environ | {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def run(
        self,
        *arguments: str | Path,
        environment: dict[str, str] | None = None,
        file_bytes: int | None = None,
    ) -> Ended:
        """Run `lora ...`; `file_bytes` is the largest file it may write."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {
            "arguments": [str(argument) for argument in arguments],
            "environment": environment or {},
            "file_bytes": file_bytes,
            "folder": str(self.folder),
        }
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        printed = [(self.folder / name).read_text() for name in ("output", "errors")]
        return Ended(code, *printed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: object) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def _child(order: dict[str, Any]) -> None:
    os.environ.update(order["environment"])
    for name, stream in (("output", 1), ("errors", 2)):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(Path(order["folder"]) / name, flags), stream)
    if order["file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_bytes"], resource.RLIM_INFINITY))
    code = 1
    try:
        from lora_cli.cli import main

        code = main(order["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def warm() -> None:
    """Import what every command needs, and run nothing of it."""
    from transformers import LlamaForCausalLM, LlamaTokenizerFast  # noqa: F401

    import lora_cli.pipeline
    import lora_cli.preflight  # noqa: F401


def start(order: dict[str, Any]) -> int:
    """Start a command in a process of its own, and return its number."""
    pid = os.fork()
    if not pid:
        _child(order)
    return pid


def ended(pid: int) -> int:
    """Wait for the end of a process, and return its code."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    warm()
    for line in sys.stdin:
        print(ended(start(json.loads(line))), flush=True)
