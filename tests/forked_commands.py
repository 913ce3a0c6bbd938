"""Real command lines in processes of their own, forked from one that has imported torch: 0.1 s to start in place of 3.

The parent only imports. It runs nothing of lora-cli, so that a child is what a fresh process would be: it reads its
environment, and is killed, filled up and signalled alone. Python's own variables and the locale are the parent's.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
OUTPUT, ERRORS = "output", "errors"
"""Files in a command's folder with what it printed last."""


@dataclass(frozen=True)
class Ended:
    """How a process ended; the code of one that a signal killed is minus its number."""

    code: int
    output: str
    errors: str


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a command under test."""
    own = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return os.environ | own | more


class ForkServer:
    """Runs one command line at a time; `more` is added to the environment that it starts in."""

    def __init__(self, **more: str) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment(**more),
        )
        assert self._line(120) == "ready"
        self._pid = 0

    def start(
        self,
        folder: Path,
        *arguments: str | Path,
        environment: dict[str, str] | None = None,
        file_bytes: int | None = None,
        clock: float = 0.0,
    ) -> None:
        """Begin `lora ARGUMENTS` in a folder, which gets OUTPUT and ERRORS, and the token cache unless told otherwise.

        `file_bytes` is the largest file that it may write; its clock is so many seconds ahead.
        """
        order = {
            "arguments": [str(argument) for argument in arguments],
            "folder": str(folder),
            "environment": {"LORA_CLI_CACHE": str(folder / "cache")} | (environment or {}),
            "file_bytes": file_bytes,
            "clock": clock,
        }
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        self._pid = int(self._line(60) or 0)

    def code(self, seconds: float = 120.0) -> int | None:
        """Return the exit code, the negative number of a signal that ended it; None if it runs on after `seconds`."""
        line = self._line(seconds)
        return None if line is None else int(line)

    def kill(self) -> int:
        """Send SIGKILL to the command and return its exit code, which is another if it had ended."""
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        code = self.code(30)
        assert code is not None
        return code

    def signal(self, number: int) -> None:
        """Send a signal to the command."""
        os.kill(self._pid, number)

    def run(self, folder: Path, *arguments: str | Path, **how: Any) -> Ended:
        """Run a command line to its end; `how` as `start` has it."""
        self.start(folder, *arguments, **how)
        code = self.code()
        assert code is not None, "the command does not end"
        return Ended(code, *((folder / name).read_text(errors="replace") for name in (OUTPUT, ERRORS)))

    def succeed(self, folder: Path, *arguments: str | Path, **how: Any) -> float:
        """Run a command line that must succeed, and return its seconds."""
        began = time.monotonic()
        ended = self.run(folder, *arguments, **how)
        assert ended.code == 0, ended
        return time.monotonic() - began

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: object) -> None:
        # It has nothing to finish, and to leave in good order takes torch seconds.
        self._server.kill()
        self._server.wait(30)
        for stream in (self._server.stdin, self._server.stdout):
            assert stream is not None
            stream.close()

    def _line(self, seconds: float) -> str | None:
        stream = self._server.stdout
        assert stream is not None
        ready, _, _ = select.select([stream], [], [], seconds)
        return stream.readline().strip() if ready else None


def _child(order: dict[str, Any]) -> None:
    code = 99
    try:
        os.chdir(order["folder"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for name, stream in ((OUTPUT, 1), (ERRORS, 2)):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        os.environ.update(order["environment"])
        if order["file_bytes"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_bytes"], resource.RLIM_INFINITY))
        if order["clock"]:
            real, ahead = time.time, order["clock"]
            time.time = lambda: real() + ahead
        from lora_cli.cli import main

        code = main(order["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def warm() -> None:
    """Import what every command needs, and run nothing of it."""
    from transformers import LlamaForCausalLM, LlamaTokenizerFast  # noqa: F401

    import lora_cli.chain
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
    print("ready", flush=True)
    for line in sys.stdin:
        child = start(json.loads(line))
        print(child, flush=True)
        print(ended(child), flush=True)
