"""Whole runs of reward models: what others read of them, resumed, scored anew, as a reward of another run, refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run_here, run_process, snapshot
from reward_models import heldout, prepared, read_by_peft, read_by_transformers, scores
from reward_rule import write_pairs
from safetensors.torch import load_file, save_file
from toy import pairs, write_base, write_recipe, write_rows

from lora_cli import pipeline, without_training
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.schema import Recipe
from lora_cli.stages._scorer import RewardScorer

pytestmark = pytest.mark.usefixtures("own_cache")
SAMPLED = {"max_new_tokens": 8}


def reward_recipe(folder: Path, base: Path, **changes: Any) -> Path:
    """Write a recipe of a reward model over the toy's pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    train, held = (write_rows(folder / f"{name}.jsonl", pairs(n)) for name, n in (("p", 40), ("h", 16)))
    settings: dict[str, Any] = {
        "objective": {"name": "reward"}, "data__train": str(train), "data__eval": str(held),
        "train__max_steps": 12, "train__learning_rate": 1e-2,
    }  # fmt: skip
    return write_recipe(folder, base, **(settings | changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[Path, dict[str, Any]]:
    """Return a finished run with both exports, and its summary."""
    folder = tmp_path_factory.mktemp("reward")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_CLI_CACHE", str(folder / "cache"))
        path = reward_recipe(folder, base, export={"formats": ["peft", "merged"]})
        return folder / "run", pipeline.train(load_recipe(path))


def require_scores(recipe: Recipe, model: torch.nn.Module, tuned: dict[str, float]) -> None:
    """Compare what a model of others gives the held-out pairs with the run's own evaluation."""
    rows, pad_id = heldout(recipe)
    chosen, rejected = scores(model, rows, pad_id).T
    assert np.mean(chosen) == pytest.approx(tuned["reward_chosen"], abs=1e-5)
    assert np.mean(rejected) == pytest.approx(tuned["reward_rejected"], abs=1e-5)
    assert np.mean(chosen > rejected) == tuned["preference_accuracy"]
    losses = np.log1p(np.exp(rejected.astype(np.float64) - chosen))
    assert np.mean(losses) == pytest.approx(tuned["loss"], abs=1e-5)


def test_others_read_its_exports(trained: tuple[Path, dict[str, Any]]) -> None:
    """PEFT on the base, and transformers alone on the merged folder, give the run's scores, to 1e-5."""
    run, summary = trained
    recipe = load_recipe(run / "recipe.yaml")
    assert summary["eval"]["base"]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert summary["eval"]["base"]["calibration_error"] == 0.0
    assert summary["eval"]["tuned"]["preference_accuracy"] > 0.9
    config = json.loads((run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == ["score"]
    pad_id = json.loads((run / "merged" / "config.json").read_text(encoding="utf-8"))["pad_token_id"]
    assert pad_id == heldout(recipe)[1]
    require_scores(recipe, read_by_peft(recipe.model.base, run / "adapter", pad_id), summary["eval"]["tuned"])
    require_scores(recipe, read_by_transformers(run / "merged"), summary["eval"]["tuned"])
    card = (run / "adapter" / "README.md").read_text(encoding="utf-8")
    assert f"num_labels=1, pad_token_id={pad_id}" in card


def test_a_fresh_process_gives_the_same_scores(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """lora-eval of the run in a process of its own prints the run's scores."""
    run, summary = trained
    result = run_process(tmp_path, "eval", str(run), "--json")
    assert result.code == 0, result.errors
    found = json.loads(result.output)
    for state in ("base", "tuned"):
        assert found[state] == pytest.approx(summary["eval"][state], abs=1e-6)


def test_merged_and_merged_later_are_scored(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """lora-merge writes a classifier too, which lora-eval scores as a plain model; a portable adapter is refused."""
    run, summary = trained
    result = run_here(capsys, "merge", str(run), "--output", str(tmp_path / "later"))
    assert result.code == 0, result.errors
    recipe = load_recipe(run / "recipe.yaml")
    require_scores(recipe, read_by_transformers(tmp_path / "later"), summary["eval"]["tuned"])
    rows = f"data.eval={recipe.data.eval}"
    result = run_here(
        capsys,
        "eval",
        str(tmp_path / "later"),
        "--json",
        rows,
        "objective.name=reward",
        "model.dtype=float32",
    )
    assert result.code == 0, result.errors
    found = json.loads(result.output[result.output.index("{") :])
    assert found["tuned"] == pytest.approx(summary["eval"]["tuned"], abs=1e-5)
    result = run_here(capsys, "merge", str(run), "--adapter", "portable", "--output", str(tmp_path / "plain"))
    assert result.code == 2
    assert "found portable, which has no place for a reward model's head" in result.errors


def test_an_untied_head_is_not_missed(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a base with an output head of its own the classifier lacks it; it is scored, and refused as another base."""
    other = shutil.copytree(base, tmp_path / "untied")
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 0.5
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((other / "config.json").read_text(encoding="utf-8")) | {"tie_word_embeddings": False}
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    path = reward_recipe(tmp_path, other, adapter={"method": "full"}, train__learning_rate=1e-3)
    summary, run = pipeline.train(load_recipe(path)), tmp_path / "run"
    assert "lm_head.weight" not in load_file(run / "merged" / "model.safetensors")
    require_scores(load_recipe(path), read_by_transformers(run / "merged"), summary["eval"]["tuned"])
    result = run_here(capsys, "eval", str(run), "--json")
    assert result.code == 0, result.errors
    found = json.loads(result.output[result.output.index("{") :])
    assert found["tuned"] == pytest.approx(summary["eval"]["tuned"], abs=1e-5)
    path = write_recipe(tmp_path / "sft", run / "merged")
    with pytest.raises(ValueError, match=r"1 weights are missing, first lm_head.weight"):
        pipeline.train(load_recipe(path))


def test_resumed_after_any_step_it_is_the_same_run(tmp_path: Path, base: Path) -> None:
    """Continued after each step, a bfloat16 run has the bits of one never stopped, those of the head among them."""
    path = reward_recipe(
        tmp_path, base, model__dtype="bfloat16", data__eval=None, train__max_steps=5, train__save_every=1,
        train__keep_checkpoints=5, adapter={"method": "lora", "rank": 4, "alpha": 8, "dropout": 0.1},
    )  # fmt: skip
    recipe, run, straight = load_recipe(path), tmp_path / "run", tmp_path / "straight"
    pipeline.train(recipe)
    run.rename(straight)
    expected = load_file(straight / "checkpoints/step-5/optimizer.safetensors")
    assert float(expected["score.weight.master"].abs().max()) > 0
    for step in range(1, 5):
        run.mkdir()
        for kept in ("recipe.yaml", "metrics.jsonl"):
            shutil.copy(straight / kept, run)
        shutil.copytree(straight / f"checkpoints/step-{step}", run / f"checkpoints/step-{step}")
        pipeline.train(recipe, resume=True)
        again = load_file(run / "checkpoints/step-5/optimizer.safetensors")
        assert again.keys() == expected.keys()
        assert all(torch.equal(again[name], value) for name, value in expected.items())
        file = "adapter/adapter_model.safetensors"
        assert (run / file).read_bytes() == (straight / file).read_bytes()
        shutil.rmtree(run)


def test_it_starts_from_another_reward_model(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, base: Path
) -> None:
    """From an adapter with a head the first loss is what that run ended with; no other objective can start from it."""
    run, _ = trained
    adapter = {"method": "lora", "init_from": str(run)}
    path = reward_recipe(tmp_path, base, adapter=adapter, train__max_steps=1, train__learning_rate=1e-9)
    tuned = pipeline.train(load_recipe(path))["eval"]["tuned"]
    before = json.loads((run / "summary.json").read_text(encoding="utf-8"))["eval"]["tuned"]
    assert tuned["loss"] == pytest.approx(before["loss"], abs=1e-5)
    path = reward_recipe(tmp_path / "dpo", base, adapter=adapter, objective={"name": "dpo"})
    with pytest.raises(ValueError, match=r"adapter.init_from: .* is a reward model, from which only"):
        pipeline.train(load_recipe(path))


def test_margins_are_read_and_asked_for(tmp_path: Path, base: Path) -> None:
    """With use_margin a row without a margin is named; with margins the first loss is that of their lead."""
    content = [{**row, "margin": 2.0} for row in pairs(16)]
    data = str(write_rows(tmp_path / "m.jsonl", content))
    objective = {"name": "reward", "use_margin": True}
    path = reward_recipe(tmp_path / "a", base, objective=objective, data__train=data, data__eval=None)
    pipeline.train(load_recipe(path))
    first = json.loads((tmp_path / "a/run/metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["loss"] == pytest.approx(math.log1p(math.exp(2.0)), rel=1e-6)
    del content[5]["margin"]
    write_rows(tmp_path / "m.jsonl", content)
    path = reward_recipe(tmp_path / "b", base, objective=objective, data__train=data, data__eval=None)
    with pytest.raises(ValueError, match=r"m.jsonl:6: does not say how far"):
        pipeline.train(load_recipe(path))
    assert not (tmp_path / "b" / "run").exists()


@pytest.mark.parametrize("folder", ["", "adapter", "merged"])
def test_it_scores_as_others_do(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, base: Path, folder: str
) -> None:
    """The scorer of a run, of its adapter or of its merged model gives rows the scores that transformers gives."""
    run, _ = trained
    recipe = load_recipe(run / "recipe.yaml")
    rows, pad_id = heldout(recipe)
    answers = [answer for pair in rows for answer in pair.answers()]
    scorer = RewardScorer(str(run / folder), recipe, prepared(recipe), torch.device("cpu"), lambda line: None)
    found = scorer([one.input_ids[: int(np.nonzero(one.trained)[0][-1]) + 1] for one in answers])
    expected = scores(read_by_transformers(run / "merged"), rows, pad_id).reshape(-1)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def rollout_recipe(folder: Path, base: Path, run: Path | str, **changes: Any) -> Path:
    """Write a recipe that is rewarded by the reward model in `run`."""
    rewards = [{"name": "reward_model", "run": str(run)}, {"name": "length", "limit": 6, "weight": 0.5}]
    objective = {"name": "grpo", "rewards": rewards, "sampling": SAMPLED, "samples": 3}
    settings: dict[str, Any] = {"objective": objective, "train__max_steps": 3, "train__batch_size": 4}
    return write_recipe(folder, base, **(settings | changes))


def test_it_is_a_reward(trained: tuple[Path, dict[str, Any]], tmp_path: Path, base: Path) -> None:
    """Completions of another run are scored by it: the sum has its scores, which differ, and the model stays frozen."""
    run, _ = trained
    before = snapshot(run)
    path = rollout_recipe(tmp_path, base, run)
    summary = pipeline.train(load_recipe(path))
    lines = [
        json.loads(line)
        for line in (tmp_path / "run/rollouts.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len({line["reward_reward_model"] for line in lines}) > 3
    for line in lines:
        assert line["reward"] == pytest.approx(line["reward_reward_model"] + 0.5 * line["reward_length"])
    assert "reward_reward_model" in summary["eval"]["tuned"]
    assert "objective.rewards" in summary["fingerprints"]
    card = (tmp_path / "run/adapter/README.md").read_text(encoding="utf-8")
    assert str(run.parent) not in card
    assert snapshot(run) == before


def test_another_reward_model_is_another_run(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run whose reward model was trained anew meanwhile is not gone on with."""
    judge = tmp_path / "judge"
    shutil.copytree(trained[0], judge)
    path = rollout_recipe(tmp_path / "job", base, judge, train__save_every=1)
    pipeline.train(load_recipe(path))
    run = tmp_path / "job" / "run"
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-3")
    shutil.rmtree(judge)
    pipeline.train(load_recipe(reward_recipe(tmp_path / "new", base, run__output=str(judge), run__seed=1)))
    result = run_here(capsys, "train", str(path))
    assert result.code == 2
    assert "cannot be resumed: objective.rewards: content" in result.errors


def test_what_it_learned_can_be_inspected(trained: tuple[Path, dict[str, Any]]) -> None:
    """lora inspect tells of the modules of a reward adapter, and the head of none."""
    run, _ = trained
    found = without_training.inspect(run, load_recipe(run / "recipe.yaml"))
    assert len(found["modules"]) == 14
    assert found["whole"] == []


def test_what_is_refused(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No such folder, no reward model, another tokenizer, a format without a place for the head: one line each."""
    other = write_base(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    run, _ = trained
    cases = [
        (rollout_recipe(tmp_path / "a", base, tmp_path / "none"), r"none: no such folder"),
        (rollout_recipe(tmp_path / "b", base, base), r"holds no reward model (give the folder of a run"),
        (rollout_recipe(tmp_path / "c", other, run), r"has another tokenizer than this run"),
        (reward_recipe(tmp_path / "d", base, export={"formats": ["portable"]}), r"found portable, which has no place"),
        (
            reward_recipe(tmp_path / "e", base, adapter={"method": "lora", "rank": 2, "train_also": ["lm_head"]}),
            r"is the output head, which a reward model has not",
        ),
    ]  # fmt: skip
    for path, message in cases:
        result = run_here(capsys, "train", str(path))
        assert result.code == 2, result.errors
        (line,) = result.errors.splitlines()
        assert line.startswith("error: ")
        assert message in line
        assert not (path.parent / "run").exists()


def test_a_known_rule_is_learned(tmp_path: Path) -> None:
    """On the bundled model a preference by a known rule is right for at least 95 % of held-out pairs."""
    train, held = write_pairs(tmp_path, train=192, heldout=80)
    path = write_recipe(
        tmp_path, Path("tiny"), model={"base": "tiny", "dtype": "float32"}, objective={"name": "reward"},
        data={"train": str(train), "eval": str(held), "max_length": 256},
        adapter={"method": "lora", "rank": 8, "alpha": 16},
        train={"epochs": 1, "batch_size": 8, "learning_rate": 3e-3},
    )  # fmt: skip
    tuned = pipeline.train(load_recipe(path))["eval"]["tuned"]
    assert tuned["preference_accuracy"] >= 0.95
