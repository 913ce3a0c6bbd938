"""The whole job in one process: what a run leaves behind, resuming, stopping early, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from toy import rows, write_base, write_recipe, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_cli import pipeline, without_training
from lora_cli.errors import DivergedError, GateError, InputError
from lora_cli.manifest import verify
from lora_cli.recipe.gates import Gate
from lora_cli.recipe.load import load_recipe

Run = Callable[..., dict[str, Any]]


@pytest.fixture()
def job(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that trains the toy recipe with changes and returns the summary."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))

    def run(
        name: str = "job", resume: bool = False, overwrite: bool = False, **changes: Any
    ) -> dict[str, Any]:
        recipe = load_recipe(write_recipe(tmp_path / name, base, **changes))
        return pipeline.train(recipe, resume=resume, overwrite=overwrite)

    return run


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a run's adapter."""
    return load_file(folder / "run" / "adapter" / "adapter_model.safetensors")


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Return the logits of fixed tokens."""
    return model(input_ids=torch.arange(4, 44).view(2, 20), use_cache=False).logits


def test_a_run_leaves_what_it_promises(job: Run, tmp_path: Path, base: Path) -> None:
    """A finished run has each promised file; its losses fall; its adapter alone opens in PEFT with our logits."""
    summary = job(evaluate__metrics=["loss", "exact_match"], export__formats=["peft", "merged"])
    run = tmp_path / "job" / "run"
    assert json.loads((run / "summary.json").read_text()) == summary
    assert summary["status"] == "done"
    assert summary["steps"] == 10
    assert summary["eval"]["tuned"]["loss"] < 0.8 * summary["eval"]["base"]["loss"]
    assert set(summary["eval"]["tuned"]) == {"loss", "perplexity", "token_accuracy", "exact_match"}
    assert set(summary["seconds"]) == {"prepare", "inject", "train", "evaluate", "export"}
    assert summary["peak_memory_bytes"] > 1e8
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert {"loss", "learning_rate", "grad_norm", "tokens", "trained_tokens", "tokens_per_second"} <= set(
        lines[0]
    )
    assert summary["tokens"] == 2 * summary["rows"]["train"]["tokens"]
    assert len((run / "generations.jsonl").read_text().splitlines()) == 11
    assert yaml.safe_load((run / "recipe.yaml").read_text())["train"]["schedule"] == "cosine"

    verify(run / "adapter")
    loaded = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), run / "adapter"
    ).eval()
    merged = AutoModelForCausalLM.from_pretrained(run / "merged").eval()
    assert float((logits(loaded) - logits(merged)).abs().max()) <= 1e-5
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (run / "adapter" / name).read_bytes() == (base / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    stops = json.loads((run / "adapter" / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in (stops if isinstance(stops, list) else [stops])
    assert "| loss |" in (run / "adapter" / "README.md").read_text()


def test_the_summarys_loss_is_transformers_own(job: Run, tmp_path: Path) -> None:
    """The held-out loss is the token-weighted mean that transformers computes row by row on the merged model."""
    summary = job(export__formats=["merged"])
    folder = tmp_path / "job" / "run" / "merged"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    total, count = 0.0, 0
    for row in rows(11):
        prompt = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        tail = tokenizer(row["completion"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        labels = torch.tensor([[-100] * len(head) + tail])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([head + tail]), labels=labels).loss
        total, count = total + float(loss) * len(tail), count + len(tail)
    assert summary["eval"]["tuned"]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_same_recipe_gives_the_same_bits(job: Run, tmp_path: Path) -> None:
    """Two runs of one recipe have bit-equal adapters and equal losses; another seed gives others."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        job(name, run__seed=seed, adapter__dropout=0.1)
    a, b, c = (adapter_of(tmp_path / name) for name in "abc")
    assert all(torch.equal(value, b[key]) for key, value in a.items())
    assert not all(torch.equal(value, c[key]) for key, value in a.items())


@pytest.mark.parametrize(
    "method",
    [
        {"method": "lora", "rank": 4, "dropout": 0.1},
        {"method": "lora", "rank": 4, "init": "pissa", "scaling": "rslora", "plus_ratio": 4.0},
        {"method": "lora", "init": "orthogonal", "freeze_a": True, "rank_pattern": {"q_proj": 2}},
        {"method": "lora", "rank": 4, "train_also": ["norm", "lm_head"]},
        {"method": "dora", "rank": 4, "dropout": 0.1},
        {"method": "vera", "rank": 16, "dropout": 0.1},
        {"method": "vera", "rank": 16, "save_projection": False},
        # stopped exactly at a restart, and in the middle of a cycle
        {"method": "relora", "rank": 4, "dropout": 0.1, "restart_every": 2, "restart_warmup": 1},
        {"method": "relora", "rank": 4, "dropout": 0.1, "restart_every": 3, "reset": "random"},
        {"method": "full"},
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(job: Run, tmp_path: Path, method: dict[str, Any]) -> None:
    """A run that stopped after 4 of 10 steps and continued has the adapter and metrics of one that did not."""
    changes: dict[str, Any] = {"adapter": method, "model__dtype": "bfloat16"}
    changes |= {"train__save_every": 2, "train__keep_checkpoints": 9, "train__schedule": "constant"}
    job("straight", **changes)
    job("parts", **changes, train__max_steps=4)
    (tmp_path / "parts" / "run" / "summary.json").unlink()
    job("parts", resume=True, **changes)
    files = [
        "merged/model.safetensors" if method["method"] == "full" else "adapter/adapter_model.safetensors"
    ]
    for name in files:
        straight, parts = (load_file(tmp_path / run / "run" / name) for run in ("straight", "parts"))
        assert all(torch.equal(value, parts[key]) for key, value in straight.items())
    losses = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / run / "run" / "metrics.jsonl").read_text().splitlines()
        ]
        for run in ("straight", "parts")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "method",
    [{"method": "lora"}, {"method": "relora", "rank": 4, "restart_every": 1}],
    ids=["lora", "relora"],
)
def test_best_weights_are_kept(job: Run, tmp_path: Path, method: dict[str, Any]) -> None:
    """With early stopping the run ends after `patience` evaluations without a better loss, and exports the best."""
    summary = job(
        train__eval_every=1, train__early_stopping=2, train__learning_rate=1.0, train__schedule="constant",
        train__epochs=20, train__keep_checkpoints=1, adapter=method,
    )  # fmt: skip
    run = tmp_path / "job" / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    best = min(evaluations, key=lambda step: evaluations[step])
    assert summary["stopped_early"]
    assert summary["best_step"] == best
    assert summary["steps"] == best + 2
    assert summary["eval"]["tuned"]["loss"] == pytest.approx(evaluations[best], rel=1e-6)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {f"step-{best}", f"step-{best + 2}"}


def test_a_finished_run_is_left_alone(job: Run, tmp_path: Path) -> None:
    """The same recipe again does nothing; a changed one is refused by key; --overwrite trains again."""
    first = job()
    before = (tmp_path / "job" / "run" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert job() == first
    assert (tmp_path / "job" / "run" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"adapter\.rank: 4 -> 8"):
        job(adapter__rank=8)
    assert job(overwrite=True, adapter__rank=8)["trainable_parameters"] == 2 * first["trainable_parameters"]


def test_a_damaged_checkpoint_falls_back(
    job: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint with one flipped bit is passed over, said so, and the run continues from the one before."""
    job(train__save_every=2, train__keep_checkpoints=9)
    straight = adapter_of(tmp_path / "job")
    (tmp_path / "job" / "run" / "summary.json").unlink()
    file = tmp_path / "job" / "run" / "checkpoints" / "step-10" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    job(resume=True, train__save_every=2, train__keep_checkpoints=9)
    output = capsys.readouterr().out
    assert "checkpoint passed over" in output
    assert "continuing after step 8" in output
    assert all(torch.equal(value, straight[key]) for key, value in adapter_of(tmp_path / "job").items())


def test_a_loss_that_is_not_finite_stops_before_the_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN in the base stops at step 1 with the rows named; no checkpoint, no adapter, no summary is written."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    recipe = load_recipe(write_recipe(tmp_path, write_base(tmp_path / "poisoned", poison=True)))
    with pytest.raises(DivergedError, match=r"step 1: .*from one of 8 rows: .*train.jsonl:"):
        pipeline.train(recipe)
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"recipe.yaml", "metrics.jsonl"}


def test_gates(job: Run, tmp_path: Path, base: Path) -> None:
    """A missed gate raises after the run is complete; a met one does not."""
    recipe = load_recipe(write_recipe(tmp_path / "job", base))
    pipeline.train(recipe, gates=[Gate("token_accuracy", 0.01, "min")])
    with pytest.raises(GateError, match="loss"):
        pipeline.train(recipe, gates=[Gate("loss", 0.001, "max")])
    assert (tmp_path / "job" / "run" / "summary.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter__targets": ["q_prj"]}, "did you mean q_proj"),
        ({"adapter__targets": "encoder.*"}, "matches no linear layer"),
        ({"data__max_length": 8}, "none of 40 rows"),
        ({"data__max_length": 8, "data__overlong": "error"}, "train.jsonl:1"),
        ({"data__fields": {"prompt": "{question}", "completion": "{completion}"}}, "question"),
        ({"data__format": "alpaca"}, "instruction"),
        ({"adapter": {"method": "full", "parameters": "encoder.*"}}, "matches no parameter"),
        (
            {"adapter": {"method": "vera", "rank": 65}},
            "adapter.rank: found 65, but the target layers have at most 64",
        ),
    ],
)
def test_bad_input_leaves_nothing(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    """A fault found after the recipe was accepted names what is wrong, and neither run folder nor cache is left."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    path = write_recipe(tmp_path, base, **changes)
    with pytest.raises(InputError) as caught:
        pipeline.train(load_recipe(path))
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()
    if any(key.startswith("data") for key in changes):
        assert not list((tmp_path / "cache").rglob("*.bin"))


def test_evaluate_and_merge_agree_with_the_run(job: Run, tmp_path: Path, base: Path) -> None:
    """Run folder, PEFT folder and merged model score the same as the run itself did."""
    summary = job()
    recipe = load_recipe(tmp_path / "job" / "recipe.yaml")
    run = tmp_path / "job" / "run"
    merged = without_training.merge(run, tmp_path / "merged", recipe)
    assert merged["max_logit_difference"] <= 1e-5
    for target in (run, run / "adapter", tmp_path / "merged"):
        scores = without_training.evaluate(target, recipe)
        assert scores["tuned"]["loss"] == pytest.approx(summary["eval"]["tuned"]["loss"], rel=1e-5)
    assert scores["base"] == {}
    assert without_training.evaluate(run, recipe)["base"]["loss"] == pytest.approx(
        summary["eval"]["base"]["loss"], rel=1e-6
    )
    with pytest.raises(InputError, match="exists already"):
        without_training.merge(run, tmp_path / "merged", recipe)
    with pytest.raises(InputError, match="no adapter to merge"):
        without_training.merge(tmp_path / "merged", tmp_path / "again", recipe)
    assert not (tmp_path / "again").exists()


def test_an_adapter_of_another_base_is_refused(job: Run, tmp_path: Path) -> None:
    """Scoring an adapter on a base with fewer layers is refused, never loaded with missing keys."""
    job()
    other = write_base(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(other)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.save_pretrained(other)
    assert config["num_hidden_layers"] == 2
    recipe = load_recipe(tmp_path / "job" / "recipe.yaml", [f"model.base={other}"])
    with pytest.raises(InputError, match="was trained on another base"):
        without_training.evaluate(tmp_path / "job" / "run" / "adapter", recipe)


def test_text_rows_train_too(job: Run, tmp_path: Path) -> None:
    """Plain text rows are trained on every token that has one before it, and have no answer to generate."""
    text = write_rows(tmp_path / "text.jsonl", [{"text": row["prompt"]} for row in rows(24)])
    summary = job(data__train=str(text), data__eval=str(text))
    counts = summary["rows"]["train"]
    assert counts["trained_tokens"] == counts["tokens"] - counts["kept"]
    with pytest.raises(InputError, match="exact_match needs answers"):
        job("scored", data__train=str(text), data__eval=str(text), evaluate__metrics=["exact_match"])
    assert not (tmp_path / "scored" / "run").exists()
    assert summary["eval"]["tuned"]["loss"] < summary["eval"]["base"]["loss"]
