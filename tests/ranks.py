"""Two processes that train as one, as torchrun would start them, with a program of the test's own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def run_in_two(program: str, *arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """Run a program twice, side by side, and return how each ended, by rank."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    names = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env=os.environ | names | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=180) for process in started]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *each)
        for process, each in zip(started, told, strict=True)
    ]
