"""What a run of 10^7 rows costs that goes on after 10^6 steps: no more than one that begins."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from lora_cli.runtime import order
from lora_cli.runtime.log import METRICS_FILE, Log

ROWS, STEP = 10**7, 10**6


def test_the_rows_of_a_late_step_are_found_at_once() -> None:
    """Step 10^6 of 10^7 rows costs under 2 s of the processor, one permutation, and the next step nothing."""
    order._permutation.cache_clear()
    began = time.process_time()
    first = order.rows_of_step(STEP, num_rows=ROWS, batch_size=4, seed=0)
    middle = time.process_time()
    second = order.rows_of_step(STEP + 1, num_rows=ROWS, batch_size=4, seed=0)
    assert middle - began < 2.0
    assert time.process_time() - middle < 0.01
    assert len({*first, *second}) == 8


@pytest.mark.parametrize("behind", [0, 3])
def test_the_metrics_of_a_long_run_are_gone_on_with_at_once(tmp_path: Path, behind: int) -> None:
    """Of 10^6 lines those behind the checkpoint go, and a torn one, within 0.1 s; the others stay as they are."""
    lines = [json.dumps({"step": step, "loss": 1.5}) + "\n" for step in range(1, STEP + 1)]
    path = tmp_path / METRICS_FILE
    path.write_text("".join(lines) + '{"step": 1000001, "lo')
    began = time.process_time()
    with Log(speaks=True) as log:
        log.open_metrics(tmp_path, keep_steps=STEP - behind)
        assert time.process_time() - began < 0.1
        log.metrics({"step": STEP - behind + 1})
    expected = [*lines[: STEP - behind], json.dumps({"step": STEP - behind + 1}) + "\n"]
    assert path.read_text() == "".join(expected)


@pytest.mark.parametrize(
    ("text", "step", "kept"),
    [
        ("", 3, ""),
        ('{"step": 1}\n{"step": 2}\n', 0, ""),
        ('{"step": 1}\n{"step": 2}\n', 1, '{"step": 1}\n'),
        ('{"step": 1}\n{"step": 2}\n{"step": 2, "eval_loss": 1}\n{"step": 3}\n', 2,
         '{"step": 1}\n{"step": 2}\n{"step": 2, "eval_loss": 1}\n'),
        ('{"step": 1}\n{"st', 5, '{"step": 1}\n'),
        ('{"step": 1}\nnonsense\n[]\n', 5, '{"step": 1}\n'),
        ("nonsense", 5, ""),
    ],
)  # fmt: skip
def test_what_is_kept(tmp_path: Path, text: str, step: int, kept: str) -> None:
    """Lines up to the checkpoint's step stay; what follows, or was cut short, goes."""
    (tmp_path / METRICS_FILE).write_text(text)
    with Log(speaks=True) as log:
        log.open_metrics(tmp_path, keep_steps=step)
    assert (tmp_path / METRICS_FILE).read_text() == kept
