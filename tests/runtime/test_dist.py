"""What processes tell each other."""

from __future__ import annotations

import os
import subprocess
import sys

from test_processes import free_port

PROGRAM = """
import torch
from lora_cli.runtime import dist
with dist.start("cpu") as rt:
    tensors = [torch.full((2, 3), 1.5 + rt.rank).T, torch.arange(4) * (rt.rank + 1)]
    rt.from_main(tensors)
    print([tensor.tolist() for tensor in tensors])
"""


def test_all_processes_have_the_main_ones_tensors() -> None:
    """After `from_main` each process holds the first one's numbers, in tensors of any layout and type."""
    names = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | names | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=120)[0].strip() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert told == [str([[[1.5, 1.5]] * 3, [0, 1, 2, 3]])] * 2
