"""What a run keeps of its activations: as asked, or as there is room; the bytes that it ends in are the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import write_base, write_recipe

from lora_cli import pipeline
from lora_cli.models.activations import Recomputation
from lora_cli.models.adapted import AdaptedModel
from lora_cli.objectives.sft import Sft
from lora_cli.recipe.load import load_recipe
from lora_cli.stages import _activations
from lora_cli.types import Batch

Run = Callable[..., bytes]
SETTINGS: dict[str, Any] = {
    "data__eval": None,
    "model__dtype": "bfloat16",
    "adapter__dropout": 0.2,
    "train__max_steps": 4,
    "train__save_every": 2,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model folder that no test changes."""
    return write_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture()
def job(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that trains the toy recipe in a folder and returns the bytes of its adapter."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))

    def run(name: str, **changes: Any) -> bytes:
        pipeline.train(load_recipe(write_recipe(tmp_path / name, base, **{**SETTINGS, **changes})))
        return (tmp_path / name / "run/adapter/adapter_model.safetensors").read_bytes()

    return run


@pytest.fixture()
def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list to which each choice of a number of recomputed layers is added."""
    original, chosen = Recomputation.set, []

    def note(self: Recomputation, count: int, *, offload: bool = False) -> None:
        chosen.append(count)
        original(self, count, offload=offload)

    monkeypatch.setattr(Recomputation, "set", note)
    return chosen


def line_of(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line that tells of the activations."""
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("activations: ")]
    return line


def test_what_is_asked_for_changes_no_byte(
    job: Run, counts: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Kept, recomputed, offloaded or left to the tool, a run with a dropout ends in the same bytes, and says which."""
    found = {
        wanted: job(wanted, train__activations=wanted) for wanted in ("keep", "recompute", "offload", "auto")
    }
    lines = [one for one in capsys.readouterr().out.splitlines() if one.startswith("activations: ")]
    assert len(set(found.values())) == 1
    assert counts == [2, 2, 0]
    assert lines[0] == "activations: all 2 layers are recomputed"
    assert lines[1] == f"{lines[0]}; there is no other memory to offload their inputs to"
    assert re.fullmatch(
        r"activations: kept, (about|at most) \d+\.\d\d GB of \d+\.\d\d that are free", lines[2]
    )


def test_without_room_layers_are_recomputed(
    job: Run, counts: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With room for a pass auto keeps all, without it recomputes every layer, and says so; the bytes are the same."""
    kept = job("kept", train__activations="keep")
    capsys.readouterr()
    for free in (16_000_000, 0):
        monkeypatch.setattr(_activations, "free_memory", lambda _, free=free: free)
        assert job(f"free{free}") == kept
        line = line_of(capsys)
        assert ("kept" in line) is (counts[-1] == 0)
        if counts[-1]:
            assert f"{counts[-1]} of 2 layers recomputed" in line
    assert counts == [0, 2]


def test_a_bound_far_below_the_room_ends_the_search(
    job: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What one short pass bounds is at least what the estimate says, and with it no other pass is counted."""
    passes = []
    original = _activations.Activations._count

    def count(self: Any, rows: Any, progress: Any) -> Any:
        passes.append(len(rows))
        return original(self, rows, progress)

    monkeypatch.setattr(_activations.Activations, "_count", count)
    said = []
    for far in (0.25, 0.0):
        monkeypatch.setattr(_activations, "_FAR", far)
        monkeypatch.setattr(_activations, "_SHORT", 16)
        passes.clear()
        job(f"far{far}")
        (megabytes,) = re.findall(r"kept, (?:about|at most) (\d+\.\d\d) GB", line_of(capsys))
        said.append((len(passes), float(megabytes)))
    (alone, bound), (several, estimate) = said
    assert alone == 1 < several
    assert bound >= estimate


def _fails_until_recomputed(counts: list[int], patch: pytest.MonkeyPatch) -> None:
    """Have each pass in training want more memory than there is as long as its activations are kept."""
    original = Sft.loss_sum

    def loss_sum(self: Sft, model: AdaptedModel, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        if model.model.training and batch.input_ids.numel() > 60 and not (counts and counts[-1]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, model, batch)

    patch.setattr(Sft, "loss_sum", loss_sum)


@pytest.mark.parametrize("counted", [True, False], ids=["counted first", "in a step"])
def test_a_pass_that_does_not_fit_is_recomputed_before_it_is_split(
    job: Run,
    counts: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    counted: bool,
) -> None:
    """The want of memory, while counting or in a step, first has all layers recomputed, to the bytes of a run that
    had room; passes become no smaller."""
    straight = job("straight")
    capsys.readouterr()
    counts.clear()
    if counted:
        monkeypatch.setattr(_activations, "_FAR", 0.0)
    else:
        monkeypatch.setattr(_activations.Activations, "settle", lambda *_: None)
    _fails_until_recomputed(counts, monkeypatch)
    assert job("short") == straight
    output = capsys.readouterr().out
    assert counts == [2]
    assert "activations: a pass did not fit into memory; from here on all 2 layers are recomputed" in output
    assert "tokens at once" not in output


def test_what_is_to_be_kept_is_kept(
    job: Run, counts: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `keep` a pass that does not fit is split at once."""
    _fails_until_recomputed(counts, monkeypatch)
    job("keep", train__activations="keep")
    output = capsys.readouterr().out
    assert counts == []
    assert "activations: " not in output
    assert "tokens at once" in output


def test_a_resumed_run_may_choose_anew(job: Run, tmp_path: Path) -> None:
    """A run that goes on with other activations than those it began with has the bytes of one that did not change."""
    whole = job("whole", train__activations="keep")
    run = tmp_path / "run/run"
    job("run", train__activations="recompute")
    (run / "summary.json").unlink()
    for path in sorted((run / "checkpoints/step-4").iterdir()):
        path.unlink()
    (run / "checkpoints/step-4").rmdir()
    assert job("run", train__activations="keep") == whole
