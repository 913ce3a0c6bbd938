"""Ours beside the peers: that the comparison is of equal work, and that unequal work fails it."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import peers
import pytest
import torch
from side_by_side import equal, processes, report
from side_by_side.cases import CASES, PEERS
from side_by_side.records import Job, Record, Step, UnequalError, digest, documents_of, read_work

pytest.importorskip("trl", reason="trl is not installed")

STEP = Step("0" * 64, 7, 5, 2.0, 1.0, 0.1)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Return the arguments of a comparison that was made, and the folder of its measurements."""
    folder = tmp_path_factory.mktemp("peers")
    rows = folder / "rows.jsonl"
    lines = (
        {"question": "How many? " * (1 + row % 5), "answer": f"{row} of them. " * (1 + row % 3)}
        for row in range(200)
    )
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = (
        "--cases gsm8k --shape smallest --dtype float32 --rounds 1 --steps 1 --threads 1 --step-tokens 400"
    )
    arguments += f" --peers trl peft-tuned unsloth --rows {rows} --results {folder / 'results'}"
    assert peers.main(arguments.split()) == 0
    (found,) = (path for path in (folder / "results").iterdir() if path.name != "inputs")
    return arguments.split(), found


def of_side(folder: Path, side: str) -> Record:
    return Record.read(folder / f"gsm8k-{side}-0.record.json")


def test_trl_and_peft_do_our_work(compared: tuple[list[str], Path]) -> None:
    """TRL and PEFT consume our documents in every step, and in float32 have our losses to 1e-5 and gradient norms."""
    _, folder = compared
    ours = of_side(folder, "ours")
    assert len(ours.steps) == 2
    assert ours.steps[0].sha256 != ours.steps[1].sha256
    for side in ("trl", "peft-tuned"):
        theirs = of_side(folder, side)
        for mine, other in zip(ours.steps, theirs.steps, strict=True):
            assert (mine.sha256, mine.real_tokens, mine.labelled_tokens) == (
                other.sha256, other.real_tokens, other.labelled_tokens,
            )  # fmt: skip
            assert other.loss == pytest.approx(mine.loss, rel=1e-5)
            assert other.grad_norm == pytest.approx(mine.grad_norm, rel=1e-3)
            assert min(mine.seconds, other.seconds) > 0
        assert theirs.peak_bytes > 10**8
        assert theirs.first_step_seconds > theirs.steps[0].seconds


def test_the_tables_hold_what_was_measured(
    compared: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished comparison is read, not made again, and its tables name every side, each goal and who was left out."""
    arguments, folder = compared
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.record.json")}
    capsys.readouterr()
    assert peers.main(arguments) == 0
    printed = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.record.json")} == before
    seconds = of_side(folder, "ours").steps[1].seconds
    assert f"| ours | {seconds:.3f} |" in printed
    assert f"sha256 {of_side(folder, 'ours').steps[0].sha256[:16]}" in printed
    assert "| ≥ 6.00 |" in printed
    assert "| ≥ 3.00 |" in printed
    assert "unsloth: not measured, it needs a CUDA device" in printed


def test_a_peer_with_other_documents_fails_the_run(
    compared: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A peer that is given the same documents in another order of steps is refused, and the run fails."""
    arguments, folder = compared
    path = folder / "gsm8k-peft-tuned-0.json"
    job = Job(**json.loads(path.read_text()))
    work, kept = Path(job.work), Path(job.work).read_text()
    work.write_text(json.dumps({"steps": json.loads(kept)["steps"][::-1]}))
    path.with_suffix(".record.json").unlink()
    try:
        processes.measured(job, folder, path.stem, sys.executable)
    finally:
        work.write_text(kept)
    capsys.readouterr()
    assert peers.main(arguments) == 1
    assert "error: gsm8k: peft-tuned, step 1: consumed" in capsys.readouterr().err


def test_documents_are_the_same_padded_and_packed() -> None:
    """The same documents have one hash however they are laid out, and another where a label or a boundary moves."""
    first = np.array([5, 6, 7, 8]), np.array([-100, -100, 7, 8])
    second = np.array([9, 4]), np.array([-100, 4])
    expected = digest([first, second])
    assert expected[1:] == (6, 3)
    padded = (
        torch.tensor([[5, 6, 7, 8], [9, 4, 0, 0]]),
        torch.tensor([[-100, -100, 7, 8], [-100, 4, -100, -100]]),
    )
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    assert digest(list(documents_of(*padded, mask=mask))) == expected
    packed = torch.tensor([[9, 4, 5, 6, 7, 8]]), torch.tensor([[-100, 4, -100, -100, 7, 8]])
    assert digest(list(documents_of(*packed, positions=torch.tensor([[0, 1, 0, 1, 2, 3]])))) == expected
    moved = digest(list(documents_of(*packed, positions=torch.tensor([[0, 1, 2, 0, 1, 2]]))))
    assert moved[0] != expected[0]
    assert digest([(first[0], np.array([-100, 6, 7, 8])), second])[0] != expected[0]


@pytest.mark.parametrize(
    ("change", "found"),
    [({"loss": 2.0001}, "loss"), ({"loss": float("nan")}, "loss"), ({"grad_norm": 0.99}, "grad_norm")],
)
def test_other_numbers_are_refused(change: dict[str, float], found: str) -> None:
    """A loss or gradient norm that is not ours is refused, and so is one that is no number."""
    ours = Record([STEP], 1.0, 1)
    equal.require_numbers("a peer", ours, ours, "float32", norms=True)
    theirs = Record([dataclasses.replace(STEP, **change)], 1.0, 1)
    with pytest.raises(UnequalError, match=f"a peer, step 1: {found}"):
        equal.require_numbers("a peer", theirs, ours, "float32", norms=True)


def test_goals_are_judged_round_by_round(compared: tuple[list[str], Path]) -> None:
    """A goal is met or missed by the median of the rounds' ratios, which stands there with its range."""
    _, folder = compared
    job = Job(**json.loads((folder / "gsm8k-ours-0.json").read_text()))
    one = report.Measured("gsm8k", CASES["gsm8k"], read_work(job.work), {}, "float32", {"ours": 0, "trl": 0})
    for side, seconds in {"ours": (1.0, 2.0, 1.0), "trl": (6.0, 13.0, 5.0)}.items():
        one.sides[side] = [Record([dataclasses.replace(STEP, seconds=one)], 1.0, 1) for one in seconds]
    (row,) = report.goal_rows({"gsm8k": one}, [])
    assert row.endswith("| ≥ 6.00 | 6.00 (5.00 to 6.50) | met |")
    one.sides["trl"] = one.sides["trl"][2:] * 3
    assert report.goal_rows({"gsm8k": one}, [])[0].endswith("missed, 83.3% of it |")


def test_every_peer_says_how_it_is_set_up() -> None:
    """Every side is a module of the comparison that can be run, and says its configuration."""
    for side in PEERS.values():
        assert (processes.BENCHMARKS / "side_by_side" / f"{side.module}.py").is_file()
        assert side.how
