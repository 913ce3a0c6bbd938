"""An unfinished run whose recipe, or what it names, is another now: refused by name, and what --allow lets through."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Result, run_here, snapshot
from safetensors.torch import load_file, save_file
from toy import CHATML, rows, write_base, write_recipe, write_rows

from lora_cli import pipeline
from lora_cli.cli import train_main
from lora_cli.recipe.keys import all_keys
from lora_cli.runtime import resume

Change = Callable[[Path], list[str]]


def key(*overrides: str) -> Change:
    """Return a change of keys."""
    return lambda folder: list(overrides)


def base(change: Callable[[Path], object]) -> Change:
    """Return a change of a copy of the base, which the recipe then names."""

    def apply(folder: Path) -> list[str]:
        shutil.copytree(folder / "base", folder / "other")
        change(folder / "other")
        return [f"model.base={folder / 'other'}"]

    return apply


def _weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor * 1.5 if tensor.dim() == 1 else tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.01}))


def _tokenizer(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()  # a pair of pieces is not joined any more
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def _own_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_start|>", "<|im_start|> "))


def _template_file(folder: Path) -> list[str]:
    (folder / "my.jinja").write_text("A task.\n" + CHATML)
    return [f"data.template={folder / 'my.jinja'}"]


def _rows(name: str, number: int) -> Change:
    def apply(folder: Path) -> list[str]:
        changed = rows(number)
        changed[3]["completion"] += "!"
        return [f"data.{name}={write_rows(folder / 'other.jsonl', changed)}"]

    return apply


CASES: dict[str, tuple[str, Change]] = {
    # What a checkpoint's tensors hang on: no way on
    "method": ("adapter.method: 'lora' -> 'dora'", key("adapter.method=dora")),
    "rank": ("adapter.rank: 4 -> 8", key("adapter.rank=8")),
    "targets": ("adapter.targets: 'all-linear' -> 'attention'", key("adapter.targets=attention")),
    "layers": ("adapter.layers: 'all' -> 'last 1'", key("adapter.layers=last 1")),
    "rank of one": ("adapter.rank_pattern.q_proj: None -> 2", key("adapter.rank_pattern={q_proj: 2}")),
    "modules besides": ("adapter.train_also: [] -> ['norm']", key("adapter.train_also=[norm]")),
    "optimizer": ("train.optimizer: 'adamw' -> 'adamw_8bit'", key("train.optimizer=adamw_8bit")),
    # What enters an update
    "alpha": ("adapter.alpha: 8.0 -> 16.0", key("adapter.alpha=16")),
    "scaling": ("adapter.scaling: 'standard' -> 'rslora'", key("adapter.scaling=rslora")),
    "dropout": ("adapter.dropout: 0.0 -> 0.5", key("adapter.dropout=0.5")),
    "ratio of rates": ("adapter.plus_ratio: 1.0 -> 4.0", key("adapter.plus_ratio=4")),
    "seed": ("run.seed: 0 -> 1", key("run.seed=1")),
    "batch": ("train.batch_size: 8 -> 4", key("train.batch_size=4")),
    "rate": ("train.learning_rate: 0.01 -> 0.02", key("train.learning_rate=0.02")),
    "schedule": ("train.schedule: 'cosine' -> 'linear'", key("train.schedule=linear")),
    "warm-up": ("train.warmup: 0.03 -> 3", key("train.warmup=3")),
    "floor": ("train.floor: 0.0 -> 0.1", key("train.floor=0.1")),
    "decay": ("train.weight_decay: 0.0 -> 0.1", key("train.weight_decay=0.1")),
    "betas": ("train.betas: [0.9, 0.999] -> [0.9, 0.95]", key("train.betas=[0.9, 0.95]")),
    "clipping": ("train.max_grad_norm: 1.0 -> None", key("train.max_grad_norm=null")),
    "best weights": ("train.final_weights: 'auto' -> 'best'", key("train.final_weights=best")),
    "type": ("model.dtype: 'float32' -> 'bfloat16'", key("model.dtype=bfloat16")),
    "quantization": ("model.quantize: 'auto' -> 'nf4'", key("model.quantize=nf4")),
    "length": ("data.max_length: 1024 -> 64", key("data.max_length=64")),
    "packing": ("data.packing: 'auto' -> True", key("data.packing=true")),
    "trained part": ("objective.train_on: 'assistant' -> 'all'", key("objective.train_on=all")),
    # Contents, by whatever name
    "template": ("data.template: content ", key("data.template=alpaca")),
    "template file": ("data.template: content ", _template_file),
    "the model's template": ("data.template: content ", base(_own_template)),
    "tokenizer": ("model.base.tokenizer: content ", base(_tokenizer)),
    "weights": ("model.base: content ", base(_weights)),
    "config": ("model.base: content ", base(_config)),
    "rows": ("data.train: content ", _rows("train", 40)),
    "held-out rows": ("data.eval: content ", _rows("eval", 11)),
    "no held-out rows": ("data.eval: content ", key("data.eval=null", "train.eval_every=null")),
}
assert len(CASES) >= 25


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base and a run of 10 steps that was stopped after step 4."""
    folder = tmp_path_factory.mktemp("stopped")
    write_base(folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_CLI_CACHE", str(folder / "cache"))
        recipe = write_recipe(
            folder, folder / "base", train__save_every=4, train__eval_every=4, train__keep_checkpoints=9
        )
        assert train_main([str(recipe)]) == 0
    run = folder / "run"
    (run / "summary.json").unlink()
    shutil.rmtree(run / "adapter")
    for step in (8, 10):
        shutil.rmtree(run / "checkpoints" / f"step-{step}")
    return folder


@pytest.fixture()
def again(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Return a function that runs the command again on a copy of the stopped run, in tmp_path."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))

    def run(*arguments: str) -> Result:
        here = [f"run.output={tmp_path / 'run'}"]
        return run_here(capsys, "train", str(tmp_path / "recipe.yaml"), *here, *arguments)

    return run


@pytest.mark.reliability("changed")
@pytest.mark.parametrize("name", CASES)
def test_a_change_is_refused_by_its_name(again: Callable[..., Result], tmp_path: Path, name: str) -> None:
    """Exit 2 and one line with the key, what the checkpoint has and what the recipe has; the run stays as it is.

    With --allow and the key it goes on to the end, unless the checkpoint's tensors could not be used.
    """
    message, change = CASES[name]
    overrides = change(tmp_path)
    before = snapshot(tmp_path / "run")
    refused = again(*overrides)
    (line,) = refused.errors.splitlines()
    assert refused.code == 2
    assert message in line
    assert line.startswith(f"error: {tmp_path / 'run'}: cannot be resumed: ")
    if "content" in message:
        assert re.search(re.escape(message) + "([0-9a-f]{12}|none) -> ([0-9a-f]{12}|none)", line)
    assert snapshot(tmp_path / "run") == before

    changed = re.findall(r"(?:: |; )([a-z]+\.[\w.]+): ", line.partition("cannot be resumed")[2])
    fixed = [one for one in changed if any(f"{one}.".startswith(f"{key}.") for key in resume.FIXED)]
    allowed = again(*overrides, *(part for one in changed for part in ("--allow", _key_of(one))))
    if fixed:
        assert allowed.code == 2
        assert f"{fixed[0]}: decides which tensors a checkpoint has" in allowed.errors
        assert snapshot(tmp_path / "run") == before
    else:
        assert allowed.code == 0, allowed.errors
        assert "resume: continuing after step 4" in allowed.output
        for one in changed:
            assert f"allowed although changed: {one}: " in allowed.output


def _key_of(name: str) -> str:
    """Return the key to allow: the first two parts of a name, as the tokenizer and a pattern's entry are no keys."""
    return ".".join(name.split(".")[:2])


ALLOWED: dict[str, tuple[list[str], int]] = {
    "more steps": (["train.epochs=3"], 15),
    "steps by number": (["train.max_steps=12"], 12),
    "micro-batches": (["train.micro_batch_tokens=64"], 10),
    "logging": (["train.log_every=3"], 10),
    "evaluation meanwhile": (["train.eval_every=5"], 10),
    "saving": (["train.save_every=3", "train.keep_checkpoints=4"], 10),
    "scores": (["evaluate.metrics=[loss, exact_match]", "evaluate.batch_tokens=64"], 10),
    "activations": (["train.activations=recompute"], 10),
    "exports": (["export.formats=[peft, merged]"], 10),
    "device": (["run.device=auto"], 10),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_may_change(again: Callable[..., Result], tmp_path: Path, name: str) -> None:
    """Keys that enter no update may differ, and the run has the steps that are asked for now."""
    overrides, steps = ALLOWED[name]
    result = again(*overrides)
    assert result.code == 0, result.errors
    assert "resume: continuing after step 4" in result.output
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == steps


def test_more_steps_continue_the_schedule_of_the_new_total(
    again: Callable[..., Result], tmp_path: Path
) -> None:
    """The next learning rate is f(step, new total): that of a run which had the new total from its beginning."""
    assert again("train.epochs=4").code == 0
    prolonged = _rates(tmp_path / "run")
    whole = write_recipe(tmp_path / "whole", tmp_path / "base", train__epochs=4)
    assert train_main([str(whole)]) == 0
    expected = _rates(tmp_path / "whole" / "run")
    assert len(expected) == len(prolonged) == 20
    assert prolonged[4:] == expected[4:]
    assert prolonged[:4] != expected[:4]


def _rates(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["learning_rate"] for line in lines if "learning_rate" in line]


def test_the_documented_set_is_the_one_in_the_code() -> None:
    """docs/reliability.md lists every key that may change, and every key that --allow does not let through."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "reliability.md").read_text(encoding="utf-8")
    known = {each.path for each in all_keys()}
    for keys, title in ((resume.MAY_CHANGE, "May change"), (resume.FIXED, "Never")):
        (paragraph,) = re.findall(rf"^\*\*{title}\.\*\*.*?\n\n", page, re.DOTALL | re.MULTILINE)
        listed = set(re.findall(r"`([a-z_]+\.[a-z_]+)`", paragraph))
        assert listed == keys
        assert keys <= known


def test_the_runs_recipe_file_decides_nothing(again: Callable[..., Result], tmp_path: Path) -> None:
    """A recipe.yaml in the run folder that was edited by hand does not make another run of a checkpoint."""
    written = tmp_path / "run" / "recipe.yaml"
    written.write_text(written.read_text().replace("learning_rate: 0.01", "learning_rate: 0.5"))
    result = again("train.learning_rate=0.5")
    assert result.code == 2
    assert "train.learning_rate: 0.01 -> 0.5" in result.errors


def test_a_checkpoint_of_another_step_is_not_taken(again: Callable[..., Result], tmp_path: Path) -> None:
    """A sound checkpoint under another's name is passed over; where none is left, nothing is trained."""
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(checkpoints / "step-4", checkpoints / "step-9")
    assert "continuing after step 4" in again().output
    shutil.rmtree(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "summary.json").unlink()
    for path in checkpoints.iterdir():
        path.rename(path.with_name(f"step-{int(path.name[5:]) + 100}"))
    result = again()
    assert (result.code, "is not the checkpoint of step" in result.errors) == (2, True)


@pytest.mark.parametrize(
    "file", ["optimizer.safetensors", "method.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("older", [True, False])
def test_a_part_of_a_checkpoint_is_not_made_anew(
    again: Callable[..., Result], tmp_path: Path, file: str, older: bool
) -> None:
    """Without one of its files a checkpoint is passed over for an older one; with no older one the run is refused."""
    checkpoints = tmp_path / "run" / "checkpoints"
    if older:
        assert again("train.save_every=2").code == 0  # leaves steps 8 and 10
        (tmp_path / "run" / "summary.json").unlink()
    newest = max(checkpoints.iterdir(), key=lambda path: int(path.name[5:]))
    (newest / file).unlink()
    before = snapshot(tmp_path / "run")
    result = again("train.save_every=2")
    if older:
        assert "checkpoint passed over" in result.output
        assert "continuing after step 8" in result.output
        assert result.code == 0
    else:
        assert result.code == 2
        assert "cannot be resumed" in result.errors
        assert snapshot(tmp_path / "run") == before


def test_another_machine_is_told(
    again: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on with another version or number of threads, each stated once, says that its bits may differ."""
    assert "bit-identical" not in again("train.max_steps=5").output
    made_on = json.loads((tmp_path / "run/checkpoints/step-5/manifest.json").read_text())
    assert made_on["machine"].keys().isdisjoint(made_on["versions"])
    machine, versions = pipeline.machine, pipeline.versions()
    monkeypatch.setattr(pipeline, "machine", lambda rt: machine(rt) | {"threads": 77})
    monkeypatch.setattr(pipeline, "versions", lambda: versions | {"torch": "9.9"})
    said = again("train.max_steps=6", "--resume").output
    assert re.search(
        r"warning: not bit-identical to a run in one piece: torch \S+ -> 9\.9, threads 1 -> 77", said
    )
