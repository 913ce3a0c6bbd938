"""Runs that start from the adapter of an earlier one: chained, resumed, and refused before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from command_line import run_here, snapshot
from safetensors.torch import load_file, save_file
from sealed import reseal
from toy import lora, rows, write_recipe, write_rows

from lora_cli import adapters, pipeline, without_training
from lora_cli.errors import InputError
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.schema import Adapter, Recipe

BLOCKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({"rank": 4, "alpha": 8, "train_also": ["norm"]}, {"dropout": 0.1, "freeze_a": True}),
    "qlora": ({"rank": 4, "alpha": 8}, {"dropout": 0.1}),
    "dora": ({"rank": 4, "alpha": 8}, {"dropout": 0.1}),
    "vera": ({"rank": 8, "projection_seed": 3}, {"dropout": 0.1}),
    "adalora": (
        {"initial_rank": 4, "target_rank": 2, "tinit": 1, "tfinal": 2, "delta_t": 1},
        {"tinit": 1, "tfinal": 1, "delta_t": 1},
    ),
}
"""The adapter block of a first run, and what the second says besides `init_from`."""

ADAPTERS: tuple[Any, ...] = get_args(get_args(Adapter)[0])


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture()
def first(tmp_path: Path, base: Path) -> Callable[..., Path]:
    """Return a function that trains a first run of a method and returns its folder."""

    def run(method: str, **changes: Any) -> Path:
        block = {"method": method} | BLOCKS[method][0]
        pipeline.train(load_recipe(write_recipe(tmp_path / "first", base, adapter=block, **changes)))
        return tmp_path / "first" / "run"

    return run


def second(folder: Path, base: Path, start: Path | str, method: str = "lora", **changes: Any) -> Path:
    """Write the recipe of a run that starts from `start`."""
    block = {"method": method, "init_from": str(start)} | BLOCKS[method][1]
    return write_recipe(folder, base, **{"adapter": block} | changes)


def test_every_method_with_the_key_can_be_started_from() -> None:
    """A block that has init_from is one that the recipe reads it from, and the keys settled by a folder are its own."""
    for name in adapters.names():
        block = next(kind for kind in ADAPTERS if kind.model_fields["method"].default == name)
        start_keys = adapters.method_class(name).start_keys
        assert ("init_from" in block.model_fields) == (name in BLOCKS)
        if name in BLOCKS:
            assert start_keys.keys() <= block.model_fields.keys()
            assert set(start_keys.values()) <= {"value", "modules", "free"}
            assert Recipe(adapter=block(init_from="x")).init_from() == "x"


def test_two_runs_in_a_chain(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes: a second run's base is the plain base, it starts at the first one's score, and learns other rows."""
    recipe = write_recipe(tmp_path / "first", base)
    done = lora("train", recipe)
    assert done.returncode == 0, done.stderr
    start, other = tmp_path / "first" / "run", tmp_path / "second"
    recipe = second(other, base, "~/first/run", adapter={"method": "lora", "init_from": "~/first/run"})
    content = [
        {"prompt": "and " + row["prompt"], "completion": row["completion"] + " too"} for row in rows(40)
    ]
    for split in ("train", "eval"):
        write_rows(other / f"{split}.jsonl", content)
    monkeypatch.setenv("HOME", str(tmp_path))
    done = lora("train", recipe)
    assert done.returncode == 0, done.stderr
    assert "starts from" in done.stdout
    assert "(lora, rank 4, 14 layers)" in done.stdout
    before = without_training.evaluate(
        start, load_recipe(start / "recipe.yaml", [f"data.eval={other / 'eval.jsonl'}"])
    )
    after = json.loads((other / "run" / "summary.json").read_text())["eval"]
    assert after["base"] == before["base"]
    assert after["tuned"]["loss"] < 0.8 * before["tuned"]["loss"] < 0.8 * before["base"]["loss"]
    losses = [json.loads(line)["loss"] for line in (other / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(before["tuned"]["loss"], rel=0.1)
    again = without_training.evaluate(other / "run", load_recipe(other / "run" / "recipe.yaml"))
    assert again["tuned"]["loss"] == pytest.approx(after["tuned"]["loss"], rel=1e-6)


def test_a_run_that_learns_nothing_scores_as_its_start(tmp_path: Path, base: Path, first: Any) -> None:
    """With a learning rate of next to nothing the tuned scores are those of the first run, and recipe.yaml says how."""
    run = first("lora")
    scores = json.loads((run / "summary.json").read_text())["eval"]
    recipe = second(tmp_path / "second", base, run, train__learning_rate=1e-12, train__max_steps=1)
    summary = pipeline.train(load_recipe(recipe))
    assert summary["eval"]["base"] == scores["base"]
    assert summary["eval"]["tuned"]["loss"] == pytest.approx(scores["tuned"]["loss"], rel=1e-6)
    written = tmp_path / "second" / "run" / "recipe.yaml"
    block = yaml.safe_load(written.read_text())["adapter"]
    assert (block["rank"], block["alpha"], block["init_from"]) == (4, 8.0, str(run))
    assert block["train_also"] == ["model.norm"]
    card = (tmp_path / "second" / "run" / "adapter" / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "adapter.init_from: `" in card
    again = pipeline.train(load_recipe(written, [f"run.output={tmp_path / 'third'}"]))
    assert again["eval"] == summary["eval"]


@pytest.mark.parametrize("method", BLOCKS)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, base: Path, first: Any, method: str) -> None:
    """Continued from step 2 of 4, a run that began with an adapter ends in the same checkpoint, bit for bit."""
    start = first(method, train__max_steps=4) / "adapter"
    recipe = second(
        tmp_path / "second", base, start, method,
        train__max_steps=4, train__save_every=2, train__keep_checkpoints=9,
    )  # fmt: skip
    run = tmp_path / "second" / "run"
    pipeline.train(load_recipe(recipe))
    shutil.copytree(run, tmp_path / "straight")
    assert pipeline.train(load_recipe(recipe))["status"] == "done"  # and is known to be finished
    for entry in ("summary.json", "adapter", "checkpoints/step-4"):
        (run / entry).rename(tmp_path / f"aside-{Path(entry).name}")
    pipeline.train(load_recipe(recipe), resume=True)
    ends = [folder / "checkpoints" / "step-4" for folder in (tmp_path / "straight", run)]
    for file in ("optimizer.safetensors", "method.safetensors"):
        straight, resumed = (load_file(folder / file) for folder in ends)
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(resumed[key], value) for key, value in straight.items())


def test_a_start_of_another_content_is_not_gone_on_with(
    tmp_path: Path, base: Path, first: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A moved start goes on; one of another content, none at all, or one that is gone is refused and named."""
    start = first("lora") / "adapter"
    recipe, run = second(tmp_path / "second", base, start), tmp_path / "second" / "run"
    pipeline.train(load_recipe(recipe))
    moved = shutil.copytree(start, tmp_path / "moved")
    assert pipeline.train(load_recipe(recipe, [f"adapter.init_from={moved}"]))["status"] == "done"
    tensors = load_file(moved / "adapter_model.safetensors")
    save_file({key: 2 * value for key, value in tensors.items()}, moved / "adapter_model.safetensors")
    reseal(moved)
    with pytest.raises(InputError, match=r"finished run that differs: adapter\.init_from: content "):
        pipeline.train(load_recipe(recipe, [f"adapter.init_from={moved}"]))
    (run / "summary.json").unlink()
    shutil.rmtree(run / "adapter")
    with pytest.raises(InputError, match=r"cannot be resumed: adapter\.init_from: content "):
        pipeline.train(load_recipe(recipe, [f"adapter.init_from={moved}"]), resume=True)
    fresh = ["adapter.init_from=null", "adapter.rank=4", "adapter.alpha=8", "adapter.train_also=[model.norm]"]
    with pytest.raises(InputError, match=r"adapter\.init_from: content "):
        pipeline.train(load_recipe(recipe, fresh), resume=True)
    result = run_here(capsys, "train", str(recipe), "--resume", f"adapter.init_from={tmp_path}/gone")
    assert result.code == 2
    assert "gone: no such folder; a run that began from it needs it to be resumed" in result.errors


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Return an edit of an adapter's tensors."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
        reseal(folder)

    return edit


def edit_config(**values: Any) -> Callable[[Path], object]:
    """Return an edit of an adapter's configuration."""

    def edit(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
        reseal(folder)

    return edit


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
REFUSED: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "misspelt": (lambda _: None, ["init_from=frist"], "frist: no such folder (did you mean first?)"),
    "a folder without an adapter": (lambda _: None, ["init_from=."], ".: there is no adapter_config.json"),
    "no tensors": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(), [], "there is no adapter_model.safetensors"
    ),
    "an unfinished run": (shutil.rmtree, ["init_from=first/run"], "the run has no adapter/ (finish it"),
    "in its own output": (lambda _: None, ["!run.output=first/run"], "is in run.output, which this run writes"),
    "not JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), [], "adapter_config.json"),
    "a start besides": (lambda _: None, ["init=pissa"], "adapter.init: found pissa, but adapter.init_from"),
    "a method without it": (lambda _: None, ["method=relora", "freeze_a=null"], "adapter.init_from: is a key of lora,"),
    "another method": (lambda _: None, ["method=dora"], "adapter.method: the adapter in"),
    "another rank": (lambda _: None, ["rank=8"], "has 4, the recipe 8 (remove the key, or choose another init_from)"),
    "other modules": (lambda _: None, ["targets=mlp"], "adapter.targets: the adapter in"),
    "another type": (edit_config(peft_type="LOKR"), [], "peft_type is 'LOKR'"),
    "another base": (lambda folder: reseal(folder, **{"model.base": "0" * 64}), [], "was trained on another base than"),
    "missing": (edit_tensors(lambda tensors: tensors.pop(NAME)), [], "missing tensors: 1, first " + NAME),
    "unexpected": (edit_tensors(lambda tensors: tensors.update(x=torch.ones(1))), [], "unexpected tensors: 1, first x"),
    "misshapen": (edit_tensors(lambda tensors: tensors.update({NAME: torch.ones(4, 9)})), [], "has shape (4, 9), but"),
    "not finite": (edit_tensors(lambda tensors: tensors[NAME].fill_(torch.inf)), [], "values that are not finite"),
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """Return the folder of a job whose run is trained, to be copied."""
    folder = tmp_path_factory.mktemp("trained")
    block = {"method": "lora"} | BLOCKS["lora"][0]
    recipe = write_recipe(folder / "first", base, adapter=block, train__max_steps=1)
    pipeline.train(load_recipe(recipe, [f"run.output={folder / 'first' / 'run'}"]))
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_a_start_that_does_not_fit_is_refused(
    tmp_path: Path, base: Path, trained: Path, case: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Exit code 2, a line that says why, and nothing written: not even the folder of the run."""
    shutil.copytree(trained / "first", tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    change, overrides, message = REFUSED[case]
    change(tmp_path / "first" / "run" / "adapter")
    block = {"init_from": "first/run", "freeze_a": False}
    if "method=dora" in overrides or "method=relora" in overrides:
        del block["freeze_a"]
        overrides = [override for override in overrides if override != "freeze_a=null"]
    recipe = write_recipe(tmp_path / "job", base, adapter=block)
    arguments = [text[1:] if text.startswith("!") else f"adapter.{text}" for text in overrides]
    before = {path: content for path, content in snapshot(tmp_path).items() if not path.startswith("cache")}
    result = run_here(capsys, "train", str(recipe), *arguments)
    assert result.code == 2, result.errors
    lines = result.errors.splitlines()
    assert any(message in line for line in lines), lines
    assert all(line.startswith("error: ") for line in lines)
    after = {path: content for path, content in snapshot(tmp_path).items() if not path.startswith("cache")}
    assert after == before
