"""`lora-train` in processes that start at once: a server that has imported everything forks one for each command.

Importing torch takes seconds, and most tests of killed runs would be nothing else. What is killed is a real process
that runs the command's own `main`, with the memory, files and signals of its own.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_SERVER = """
import json, os, sys, time
import torch
torch.set_num_threads(1)
import transformers.models.llama.modeling_llama
from lora_cli import cli, pipeline, preflight
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if not pid:
        code = 99
        try:
            output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.chdir(job["folder"])
            os.environ.update(job["environment"])
            if job["clock"]:
                real, shift = time.time, job["clock"]
                time.time = lambda: real() + shift
            code = cli.train_main(job["arguments"])
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
OUTPUT = "output.txt"


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a command under test."""
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | more


class ForkServer:
    """Runs one command at a time, each in a forked process, with `folder` as its current one."""

    def __init__(self, **more: str) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment(**more),
        )
        assert self._line(120) == "ready"
        self._pid = 0

    def start(self, folder: Path, arguments: Sequence[str], *, clock: float = 0.0, **more: str) -> None:
        """Begin `lora-train ARGUMENTS` in a folder, which gets OUTPUT; its clock is so many seconds ahead."""
        job = {
            "arguments": list(arguments),
            "folder": str(folder),
            "output": str(folder / OUTPUT),
            "environment": {"LORA_CLI_CACHE": str(folder / "cache")} | more,
            "clock": clock,
        }
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(job) + "\n")
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

    def run(self, folder: Path, arguments: Sequence[str], *, clock: float = 0.0, **more: str) -> float:
        """Run a command that must succeed, and return its seconds."""
        began = time.monotonic()
        self.start(folder, arguments, clock=clock, **more)
        code = self.code()
        assert code == 0, f"exit {code}: {(folder / OUTPUT).read_text(errors='replace')}"
        return time.monotonic() - began

    def close(self) -> None:
        """End the server; it has nothing to finish, and to leave in good order takes torch seconds."""
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


@contextmanager
def fork_server(**more: str) -> Iterator[ForkServer]:
    """Yield a server; `more` is added to the environment that it starts in."""
    server = ForkServer(**more)
    try:
        yield server
    finally:
        server.close()


def result_of(run: Path) -> dict[str, object]:
    """Return what must be equal in two runs: every exported file, the generations, the metrics without their timing.

    Names are those of a run's folder. The base, and so all paths in the export, must be the same.
    """
    found: dict[str, object] = {
        str(path.relative_to(run)): path.read_bytes()
        for name in ("adapter", "merged", "portable")
        for path in sorted((run / name).rglob("*"))
        if path.is_file()
    }
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    timing = ("tokens_per_second",)
    found["metrics.jsonl"] = [
        {key: value for key, value in line.items() if key not in timing} for line in lines
    ]
    answers = run / "generations.jsonl"
    found["generations.jsonl"] = answers.read_bytes() if answers.exists() else b""
    return found


def differences(one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    """Return the names of what differs."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def leftovers(folder: Path) -> list[str]:
    """Return the hidden files and folders below a folder."""
    return sorted(str(path) for path in folder.rglob(".*"))
