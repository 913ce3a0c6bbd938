"""Whole runs of the objectives that sample: what they write, resumed, in two processes, in parts, and refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run_here, snapshot
from safetensors.torch import load_file
from test_processes import in_two_processes
from toy import rows, write_recipe, write_rows

from lora_cli import pipeline
from lora_cli.objectives._rewards import Answer, build
from lora_cli.recipe.load import load_recipe

pytestmark = pytest.mark.usefixtures("own_cache")

REWARDS: list[dict[str, Any]] = [
    {"name": "regex", "pattern": "[aeiou]"},
    {"name": "length", "limit": 6, "weight": 0.5},
    {"name": "no_repeat"},
]
OBJECTIVES: dict[str, dict[str, Any]] = {
    "grpo": {"name": "grpo", "beta": 0.1, "updates_per_rollout": 3, "samples": 4},
    "dr_grpo": {"name": "grpo", "scale": "none", "normalize": "constant", "samples": 3},
    "dapo": {"name": "grpo", "normalize": "token", "clip_high": 0.28, "updates_per_rollout": 2, "samples": 3},
    "rloo": {"name": "rloo", "updates_per_rollout": 2},
    "ppo": {"name": "ppo", "updates_per_rollout": 3, "samples": 2},
}
STEPS = 7


def rollout_recipe(folder: Path, base: Path, name: str, **changes: Any) -> Path:
    """Write a recipe of an objective of OBJECTIVES, with completions of at most ten tokens."""
    objective = {"rewards": REWARDS, "sampling": {"max_new_tokens": 10}, **OBJECTIVES[name]}
    settings: dict[str, Any] = {
        "objective": objective, "train__max_steps": STEPS, "train__learning_rate": 1e-3, "train__batch_size": 5
    }  # fmt: skip
    return write_recipe(folder, base, **(settings | changes))


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def told(run: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run, without its speed."""
    return [
        {name: value for name, value in line.items() if name != "tokens_per_second"}
        for line in lines_of(run / "metrics.jsonl")
    ]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_a_run_writes(tmp_path: Path, base: Path, name: str) -> None:
    """Each rollout is written with the rewards of its text, and the metrics are their means."""
    path = rollout_recipe(tmp_path, base, name)
    summary = pipeline.train(load_recipe(path))
    settings = load_recipe(path).objective
    updates, samples = settings.updates_per_rollout, settings.samples  # type: ignore[union-attr]
    rollouts = lines_of(tmp_path / "run" / "rollouts.jsonl")
    assert [line["step"] for line in rollouts] == [
        step for step in range(1, STEPS + 1, updates) for _ in range(5 * samples)
    ]
    terms = build(settings.rewards, allow_code=False)  # type: ignore[union-attr]
    for line in rollouts:
        answer = Answer(line["completion"], line["prompt"], "", line["tokens"])
        each = {f"reward_{term.name}": term.judge([answer])[0] for term in terms}
        assert {key: line[key] for key in each} == each
        expected = sum(term.weight * one for term, one in zip(terms, each.values(), strict=True))
        assert line["reward"] == pytest.approx(expected)
        assert line["prompt"].endswith("assistant")
        assert line["tokens"] <= 10
    for metrics in told(tmp_path / "run"):
        if "loss" not in metrics:
            continue
        first = (metrics["step"] - 1) // updates * updates + 1
        mine = [line for line in rollouts if line["step"] == first]
        for key in ("reward", "reward_regex", "reward_length", "ended"):
            assert metrics[key] == pytest.approx(sum(line[key] for line in mine) / len(mine)), key
        assert metrics["completion_tokens"] == pytest.approx(sum(line["tokens"] for line in mine) / len(mine))
        assert 0 <= metrics["clip_fraction"] <= 1
        assert metrics["entropy"] > 0
        if metrics["step"] == first:
            assert metrics["clip_fraction"] == 0  # the model that drew
    assert set(summary["eval"]["tuned"]) == {
        "reward", "reward_regex", "reward_length", "reward_no_repeat", "completion_tokens", "ended"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["grpo", "rloo", "ppo"])
def test_it_begins_at_its_reference(tmp_path: Path, base: Path, name: str) -> None:
    """At the first step the divergence from the reference is 0, afterwards it is not."""
    pipeline.train(load_recipe(rollout_recipe(tmp_path, base, name, train__learning_rate=1e-2)))
    found = [line["kl"] for line in told(tmp_path / "run") if "kl" in line]
    assert abs(found[0]) <= 1e-9
    assert found[-1] > 1e-6


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_after_any_step_it_is_the_same_run(tmp_path: Path, base: Path, name: str, dtype: str) -> None:
    """Continued after each step, also within a rollout, it has the bits, metrics and rollouts of one never stopped."""
    path = rollout_recipe(
        tmp_path, base, name, model__dtype=dtype, train__save_every=1, train__keep_checkpoints=STEPS,
        adapter={"method": "lora", "rank": 4, "alpha": 8, "dropout": 0.1}, data__eval=None,
    )  # fmt: skip
    recipe, run, straight = load_recipe(path), tmp_path / "run", tmp_path / "straight"
    pipeline.train(recipe)
    run.rename(straight)
    files = [f"checkpoints/step-{STEPS}/optimizer.safetensors", "adapter/adapter_model.safetensors"]
    for step in range(1, STEPS):
        run.mkdir()
        for kept in ("recipe.yaml", "metrics.jsonl", "rollouts.jsonl"):
            shutil.copy(straight / kept, run)
        shutil.copytree(straight / f"checkpoints/step-{step}", run / f"checkpoints/step-{step}")
        pipeline.train(recipe, resume=True)
        for file in files:
            expected, again = load_file(straight / file), load_file(run / file)
            assert expected.keys() == again.keys()
            assert [key for key in expected if not torch.equal(expected[key], again[key])] == [], step
        assert told(run) == told(straight)
        assert (run / "rollouts.jsonl").read_bytes() == (straight / "rollouts.jsonl").read_bytes()
        shutil.rmtree(run)


def test_a_checkpoint_holds_a_rollout_only_between_its_updates(tmp_path: Path, base: Path) -> None:
    """Where the next step samples anew, nothing of the last rollout is kept."""
    path = rollout_recipe(tmp_path, base, "grpo", train__save_every=1, train__keep_checkpoints=STEPS)
    pipeline.train(load_recipe(path))
    holding = (tmp_path / "run" / "checkpoints").glob("step-*/objective.safetensors")
    assert sorted(int(file.parent.name.removeprefix("step-")) for file in holding) == [1, 2, 4, 5, 7]


@pytest.mark.parametrize("name", ["grpo", "dapo", "rloo", "ppo"])
def test_two_processes_train_as_one(tmp_path: Path, base: Path, name: str) -> None:
    """Two processes sample what one samples, and have its metrics, scores and rollouts, to 1e-5 in fp32."""
    recipes = [rollout_recipe(tmp_path / each, base, name, train__max_steps=4) for each in ("alone", "two")]
    two = in_two_processes(recipes[1])
    assert two.returncode == 0, two.stderr
    pipeline.train(load_recipe(recipes[0]))
    alone, both = (recipe.parent / "run" for recipe in recipes)
    for one, other in zip(told(alone), told(both), strict=True):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-6)
    for one, other in zip(lines_of(alone / "rollouts.jsonl"), lines_of(both / "rollouts.jsonl"), strict=True):
        assert (other["completion"], other["step"], other["prompt"]) == (
            one["completion"], one["step"], one["prompt"]
        )  # fmt: skip
        assert other["advantage"] == pytest.approx(one["advantage"], abs=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_does_not_depend_on_its_passes(tmp_path: Path, base: Path, name: str) -> None:
    """In passes of one completion, padded or packed, losses and gradient norms are those of one pass, to 1e-5."""
    found = []
    for place, (tokens, packing) in enumerate([(10_000, "auto"), (1, "auto"), (10_000, False), (60, False)]):
        folder = tmp_path / str(place)
        path = rollout_recipe(
            folder, base, name, train__micro_batch_tokens=tokens, data__packing=packing, data__eval=None,
            train__max_steps=4, train__learning_rate=1e-4,  # AdamW makes a step of a rounding where a gradient is 0
        )  # fmt: skip
        pipeline.train(load_recipe(path))
        found.append([(line["loss"], line["grad_norm"]) for line in told(folder / "run")])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert two == pytest.approx(one, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "dora", "rank": 4},
        {"method": "vera", "rank": 16},
        {"method": "full"},
        {"method": "qlora", "rank": 4},
        {"method": "adalora", "initial_rank": 6, "target_rank": 2, "tinit": 1, "tfinal": 2, "delta_t": 1},
        {"method": "relora", "rank": 4, "restart_every": 2, "restart_warmup": 1},
    ],
    ids=lambda adapter: adapter["method"],
)
@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_every_method_learns_from_its_own_completions(
    tmp_path: Path, base: Path, name: str, adapter: dict[str, Any]
) -> None:
    """With each method a run ends, and its weights are not those that it began with."""
    path = rollout_recipe(tmp_path, base, name, adapter=adapter, train__max_steps=4, data__eval=None)
    summary = pipeline.train(load_recipe(path))
    assert summary["steps"] == 4
    assert any(line["grad_norm"] > 0 for line in told(tmp_path / "run"))


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (
            [{"name": "json_fields"}],
            r"train.jsonl:1: objective.rewards: json_fields: the reference .* is no JSON",
        ),
        (
            [{"name": "numeric_answer"}],
            r"train.jsonl:1: objective.rewards: numeric_answer: no number in the reference",
        ),
        (
            [{"name": "python", "file": "mine.py", "function": "f"}],
            r"objective.rewards: found mine.py, Python code",
        ),
        ([{"name": "regex"}], r"objective.rewards: found regex without pattern \(add it\)"),
        ([{"name": "regex", "pattern": "("}], r"objective.rewards: found '\(' is not a regular expression"),
        ([{"name": "length", "limit": 3, "pattern": "x"}], r"objective.rewards: found pattern in length"),
        ([{"name": "exact"}], r"objective.rewards: found "),
        ([], r"objective.rewards: found "),
    ],
)
def test_what_is_refused(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], rewards: list[Any], message: str
) -> None:
    """A reward that cannot be had is one line and exit code 2, and nothing is written."""
    objective = {"name": "grpo", "rewards": rewards}
    path = rollout_recipe(tmp_path, base, "grpo", objective=objective)
    before = snapshot(tmp_path / "run")
    result = run_here(capsys, "train", str(path))
    assert result.code == 2, result.errors
    (line,) = result.errors.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert snapshot(tmp_path / "run") == before == {}


def test_a_reward_of_ones_own(tmp_path: Path, base: Path) -> None:
    """With run.allow_code a function of a file judges completions."""
    (tmp_path / "mine.py").write_text(
        "def short(completion, prompt, reference):\n    return -len(completion)\n"
    )
    objective = {
        "name": "rloo", "beta": 0.0, "sampling": {"max_new_tokens": 8},
        "rewards": [{"name": "python", "file": str(tmp_path / "mine.py"), "function": "short"}],
    }  # fmt: skip
    path = rollout_recipe(
        tmp_path, base, "rloo", objective=objective, run__allow_code=True, train__max_steps=2
    )
    pipeline.train(load_recipe(path))
    for line in lines_of(tmp_path / "run" / "rollouts.jsonl"):
        assert line["reward"] == -len(line["completion"])


def test_the_held_out_reward_is_that_of_the_greedy_answers(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """lora-eval gives the scores of the run, and an exact match rewarded with 1 is the exact match of evaluation."""
    write_rows(tmp_path / "same.jsonl", rows(11))
    path = rollout_recipe(
        tmp_path, base, "grpo", train__max_steps=1, evaluate__metrics=["loss", "exact_match"],
        objective={"name": "grpo", "rewards": [{"name": "exact_match"}], "sampling": {"max_new_tokens": 30}},
    )  # fmt: skip
    tuned = pipeline.train(load_recipe(path))["eval"]["tuned"]
    assert tuned["reward"] == tuned["reward_exact_match"] == tuned["exact_match"]
    result = run_here(capsys, "eval", str(tmp_path / "run"), "--json")
    assert result.code == 0, result.errors
    assert json.loads(result.output[result.output.index("{") :])["tuned"] == pytest.approx(tuned)
