"""What a run of 10^7 rows costs that goes on after 10^6 steps: no more than one that begins."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from toy import write_base, write_recipe

from lora_cli.cli import train_main
from lora_cli.manifest import verify
from lora_cli.publish import published
from lora_cli.runtime import order
from lora_cli.runtime.log import METRICS_FILE, Log

ROWS, STEP = 10**7, 10**6


def metrics() -> list[str]:
    """Return the lines of a run of STEP steps."""
    return [f'{{"step": {step}, "loss": 1.5}}\n' for step in range(1, STEP + 1)]


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


def test_the_metrics_of_a_long_run_are_gone_on_with_at_once(tmp_path: Path) -> None:
    """Of 10^6 lines those behind the checkpoint go, and a torn one, within 0.1 s; the others stay as they are."""
    lines, behind = metrics(), 3
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


def test_a_run_goes_on_after_a_million_steps_as_soon_as_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From step 10^6, with as many lines of metrics, two steps cost at most 2 s more than the first two of a run."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    recipe, run = write_recipe(tmp_path, write_base(tmp_path / "base"), train__max_steps=2), tmp_path / "run"
    assert train_main([str(recipe)]) == 0  # what is loaded and cached at first is no part of either time
    began = time.process_time()
    assert train_main([str(recipe), "--overwrite"]) == 0
    first = time.process_time() - began

    late = run / "checkpoints" / f"step-{STEP}"
    facts = verify(run / "checkpoints" / "step-2")
    for key in ("files", "format_version", "sha256"):
        del facts[key]
    with published(late, facts=facts | {"step": STEP}) as staging:
        shutil.copytree(
            run / "checkpoints" / "step-2", staging, dirs_exist_ok=True, ignore=lambda *_: ["manifest.json"]
        )
        state = json.loads((staging / "state.json").read_text())
        (staging / "state.json").write_text(json.dumps(state | {"step": STEP}))
    (run / "summary.json").unlink()
    (run / METRICS_FILE).write_text("".join(metrics()))
    began = time.process_time()
    assert train_main([str(recipe), f"train.max_steps={STEP + 2}"]) == 0
    assert time.process_time() - began - first <= 2.0
    assert f"resume: continuing after step {STEP}" in capsys.readouterr().out
    assert json.loads((run / "summary.json").read_text())["steps"] == STEP + 2
