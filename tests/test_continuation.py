"""Runs that are continued, changed, finished or stopped at awkward moments."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import rows, write_base, write_recipe, write_rows

from lora_cli import pipeline
from lora_cli.errors import InputError, Stopped
from lora_cli.recipe.load import load_recipe
from lora_cli.runtime.dist import Runtime

Run = Callable[..., dict[str, Any]]
# Training ends one evaluation after the best, so that the best checkpoint is not the newest.
BEST = {
    "train__eval_every": 1,
    "train__early_stopping": 1,
    "train__learning_rate": 1.0,
    "train__schedule": "constant",
    "train__epochs": 20,
}


@pytest.fixture()
def job(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that trains the toy recipe in its folder with changes."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))

    def run(
        resume: bool | None = None,
        overwrite: bool = False,
        keep_rows: bool = False,
        allow: Sequence[str] = (),
        **changes: Any,
    ) -> dict[str, Any]:
        kept = {name: (tmp_path / name).read_bytes() for name in ("train.jsonl", "eval.jsonl") if keep_rows}
        recipe = load_recipe(write_recipe(tmp_path, base, **changes))
        for name, content in kept.items():
            (tmp_path / name).write_bytes(content)
        return pipeline.train(recipe, resume=resume, overwrite=overwrite, allow=allow)

    return run


def unfinish(folder: Path) -> Path:
    """Take back what a run wrote after its last checkpoint, as if it had been killed there; return its folder."""
    run = folder / "run"
    (run / "summary.json").unlink()
    shutil.rmtree(run / "adapter")
    return run


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a run's adapter."""
    return load_file(folder / "run" / "adapter" / "adapter_model.safetensors")


def test_a_damaged_best_checkpoint_is_not_exported(job: Run, tmp_path: Path) -> None:
    """A best checkpoint whose weights were changed is refused, never exported."""
    best = job(**BEST)["best_step"]
    run = unfinish(tmp_path)
    path = run / "checkpoints" / f"step-{best}" / "optimizer.safetensors"
    state = load_file(path)
    save_file({key: torch.full_like(value, 123.0) for key, value in state.items()}, path)
    assert best < max(int(folder.name[5:]) for folder in (run / "checkpoints").iterdir())
    with pytest.raises(InputError, match="missing or damaged"):
        job(resume=True, **BEST)
    assert not (run / "adapter").exists()


def test_a_new_checkpoint_outlives_a_damaged_later_one(job: Run, tmp_path: Path) -> None:
    """After falling back behind a damaged checkpoint, the ones written next are kept and the damaged one goes."""
    settings = {"train__save_every": 2, "train__keep_checkpoints": 1, "train__epochs": 1}
    job(train__save_every=2, train__keep_checkpoints=9, train__epochs=1)  # steps 2, 4, 5
    run = unfinish(tmp_path)
    shutil.rmtree(run / "checkpoints" / "step-4")
    (run / "checkpoints" / "step-5" / "state.json").write_text("{}")
    (run / "checkpoints" / "step-5").rename(run / "checkpoints" / "step-9")
    job(resume=True, **settings)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-5"]


@pytest.mark.parametrize("what", ["rows", "base"])
def test_changed_content_is_refused(job: Run, tmp_path: Path, what: str) -> None:
    """Another content of the data or the base refuses to resume, and is noticed by a finished run."""
    base = write_base(tmp_path / "own")
    job(model__base=str(base))
    if what == "rows":
        write_rows(tmp_path / "train.jsonl", rows(39))
    else:
        weights = load_file(base / "model.safetensors")
        save_file(
            {key: 2 * value for key, value in weights.items()}, base / "model.safetensors", {"format": "pt"}
        )
    name = "data.train" if what == "rows" else "model.base"
    with pytest.raises(InputError, match=f"finished run that differs: {name}: content "):
        job(keep_rows=True, model__base=str(base))
    unfinish(tmp_path)
    with pytest.raises(InputError, match=f"cannot be resumed: {name}: content "):
        job(resume=True, keep_rows=True, model__base=str(base))


def test_the_same_data_may_move(job: Run, tmp_path: Path) -> None:
    """Equal rows under another name do not refuse a resume."""
    job()
    unfinish(tmp_path)
    shutil.copy(tmp_path / "train.jsonl", tmp_path / "moved.jsonl")
    assert job(resume=True, data__train=str(tmp_path / "moved.jsonl"))["status"] == "done"


def test_early_stopping_stays_stopped(job: Run, tmp_path: Path) -> None:
    """A run that stopped early and was killed before its export does not train on when it is resumed."""
    changes = {
        "train__eval_every": 1, "train__early_stopping": 2, "train__learning_rate": 1.0,
        "train__schedule": "constant", "train__epochs": 20,
    }  # fmt: skip
    first = job(**changes)
    expected = adapter_of(tmp_path)
    unfinish(tmp_path)
    second = job(resume=True, **changes)
    assert second["steps"] == first["steps"]
    assert all(torch.equal(value, expected[key]) for key, value in adapter_of(tmp_path).items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__max_steps": 12}, r"train\.max_steps: None -> 12"),
        ({"export__formats": ["peft", "merged"]}, r"merged/ is missing"),
        ({"evaluate__metrics": ["exact_match"]}, r"evaluate\.metrics"),
    ],
)
def test_a_finished_run_does_what_is_newly_asked(job: Run, changes: dict[str, Any], message: str) -> None:
    """What a finished run lacks is named; --resume goes on from its last checkpoint and does it."""
    job()
    with pytest.raises(InputError, match=message):
        job(**changes)
    summary = job(resume=True, **changes)
    assert summary["steps"] == changes.get("train__max_steps", 10)
    assert job(**changes) == summary


def test_fewer_steps_than_done_are_refused(job: Run) -> None:
    """A resume that asks for fewer steps than the checkpoint has is refused with both numbers."""
    job()
    with pytest.raises(InputError, match="stands at step 10 of now 8"):
        job(resume=True, train__max_steps=8)


def test_a_best_that_is_never_measured_is_refused(job: Run, tmp_path: Path) -> None:
    """The best weights are not asked for where no held-out loss would be taken in the run."""
    with pytest.raises(InputError, match="500 is more than the run's 10 steps"):
        job(train__eval_every=500, train__final_weights="best")
    assert not (tmp_path / "run").exists()


def test_a_signal_at_the_last_moment_counts(
    job: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal that comes in the last step's evaluation or save is obeyed, after the save."""
    original = Runtime.in_main

    def late(self: Runtime, work: Callable[[], None]) -> None:
        original(self, work)
        if (tmp_path / "run" / "checkpoints").exists():
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Runtime, "in_main", late)
    with pytest.raises(Stopped, match="after step 10 of 10, saved"):
        job()
    assert (tmp_path / "run" / "checkpoints" / "step-10").exists()


def test_foreign_files_survive_overwrite(job: Run, tmp_path: Path) -> None:
    """--overwrite leaves an adapter folder alone that no run wrote."""
    job()
    shutil.rmtree(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "adapter").mkdir()
    (tmp_path / "run" / "adapter" / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="was not written by a run"):
        job(overwrite=True)
    assert (tmp_path / "run" / "adapter" / "thesis.tex").read_text() == "mine"


def test_a_base_with_odd_generation_settings_is_exported(job: Run, tmp_path: Path) -> None:
    """Sampling values without do_sample, which transformers reads but refuses to write, do not stop the export."""
    base = write_base(tmp_path / "odd")
    (base / "generation_config.json").write_text(
        json.dumps({"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2})
    )
    job(model__base=str(base), export__formats=["peft", "merged"])
    for name in ("adapter", "merged"):
        settings = json.loads((tmp_path / "run" / name / "generation_config.json").read_text())
        assert settings == {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}


def test_a_card_names_no_folder(job: Run, tmp_path: Path) -> None:
    """The model card holds neither the folder of the base nor those of the data, and is YAML at its head."""
    job()
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert str(tmp_path.parent) not in card
    assert "/tmp" not in card.replace("```", "")
    assert "train: train.jsonl" in card


def test_lines_are_those_of_the_file(job: Run, tmp_path: Path) -> None:
    """Generated answers are listed by their file and line, also behind rows that were dropped."""
    long = {"prompt": "big " * 200, "completion": "x"}
    held_out = write_rows(tmp_path / "held.jsonl", [long, *rows(2), long, *rows(1)])
    job(data__eval=str(held_out), data__max_length=60, evaluate__metrics=["exact_match"])
    lines = [
        json.loads(line)["row"] for line in (tmp_path / "run" / "generations.jsonl").read_text().splitlines()
    ]
    assert lines == [f"{held_out}:{line}" for line in (2, 3, 5)]


def test_an_unfinished_run_is_gone_on_with_by_itself(job: Run, tmp_path: Path) -> None:
    """The same call goes on from the last checkpoint, and ends in the bytes of the run that was never stopped."""
    job(train__save_every=4)
    weights = (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()
    run = unfinish(tmp_path)
    shutil.rmtree(run / "checkpoints/step-10")
    job(train__save_every=4, keep_rows=True)
    assert (run / "adapter/adapter_model.safetensors").read_bytes() == weights
    assert not (run / ".lock").exists()


def test_a_changed_key_is_allowed_one_by_one(
    job: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A continued run with another learning rate is refused by name, and goes on where this key is allowed."""
    job(train__save_every=4)
    run = unfinish(tmp_path)
    shutil.rmtree(run / "checkpoints/step-10")
    changes: dict[str, Any] = {"train__save_every": 4, "train__learning_rate": 0.003, "keep_rows": True}
    with pytest.raises(InputError, match=r"train\.learning_rate: .* -> 0\.003.*--allow KEY"):
        job(**changes)
    with pytest.raises(InputError, match=r"train\.learning_rate"):
        job(**changes, allow=["train.weight_decay"])
    capsys.readouterr()
    job(**changes, allow=["train.learning_rate"])
    assert "allowed although changed: train.learning_rate" in capsys.readouterr().out
    assert "0.003" in (run / "recipe.yaml").read_text()
