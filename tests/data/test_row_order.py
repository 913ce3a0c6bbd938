"""Which rows a step trains on: the same after a restart, and on however many processes."""

from __future__ import annotations

import ast
import json
import os
import socket
import subprocess
import sys

from prepared_rows import run, write

from lora_cli.data import tokenize

TWO = """
import json, os, sys
from lora_cli.data import tokenize
from lora_cli.models.load import load_tokenizer
from lora_cli.models.safety import TINY
from lora_cli.recipe.schema import Data
from lora_cli.runtime import dist, order
from lora_cli.stages import prepare
tokenize.PART_BYTES = 2000
os.sched_getaffinity = lambda _: {0}
with dist.start("cpu") as rt:
    data = Data(train=sys.argv[1], eval_fraction=0.2)
    train = prepare.run(data, "assistant", load_tokenizer(TINY), rt, lambda _: None).train
    steps = [order.rows_of_step(s, num_rows=len(train), batch_size=7, seed=3) for s in range(20)]
    steps = [rows[rt.rank::rt.world_size] for rows in steps]
    print(json.dumps([train.fingerprint, [[train.where(row) for row in rows] for rows in steps]]))
"""


def test_two_processes_read_the_same(tmp_path, monkeypatch):
    """Two gloo processes prepare the rows of one, and their shares of each step are together the step of one."""
    from lora_cli.models.load import load_tokenizer
    from lora_cli.models.safety import TINY
    from lora_cli.runtime import order

    path = write(tmp_path / "rows.jsonl", [f"row {number:04}" for number in range(300)])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    own["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, path],
            env=os.environ | own | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    first, second = (json.loads(process.communicate(timeout=300)[0]) for process in processes)
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "alone"))
    monkeypatch.setattr(tokenize, "PART_BYTES", 2000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    alone = run(load_tokenizer(TINY), train=path, eval_fraction=0.2)[0].train
    assert first[0] == second[0] == alone.fingerprint
    for step, (one, other) in enumerate(zip(first[1], second[1], strict=True)):
        rows = order.rows_of_step(step, num_rows=len(alone), batch_size=7, seed=3)
        assert sorted(one + other) == sorted(alone.where(row) for row in rows)


def test_the_order_of_rows_is_a_function_of_seed_and_epoch():
    """A process with another hash seed, asked for the steps in another order, has the same rows in every step."""
    from lora_cli.runtime.order import rows_of_step

    code = (
        "from lora_cli.runtime.order import rows_of_step\n"
        "print({s: rows_of_step(s, num_rows=103, batch_size=10, seed=5) for s in reversed(range(33))})"
    )
    for hashes in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ
            | {"PYTHONHASHSEED": hashes, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=True,
        )
        theirs = ast.literal_eval(done.stdout)
        assert theirs == {step: rows_of_step(step, num_rows=103, batch_size=10, seed=5) for step in range(33)}
