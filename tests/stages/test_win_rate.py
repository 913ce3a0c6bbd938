"""The win rate of tuned against base: by rewards, by a judge, with its interval; and what is refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_server import Body, ChatServer, letters, said
from command_line import run_here
from peft import PeftModel
from test_processes import in_two_processes
from toy import pairs, write_recipe, write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from watched import watched

from lora_cli import pipeline
from lora_cli.recipe.load import load_recipe
from lora_cli.stages._win_rate import Z95, wilson

pytestmark = pytest.mark.usefixtures("own_cache")

SOUND = {"name": "regex", "pattern": "(the|says)", "weight": 2.0}
SHORT = {"name": "length", "limit": 3, "weight": 2**-7}


def job(folder: Path, base: Path, **changes: Any) -> Path:
    """Write a recipe of three steps that is scored by its win rate."""
    settings = {
        "train__max_steps": 3,
        "evaluate__metrics": ["loss", "win_rate"],
        "evaluate__max_new_tokens": 12,
    }
    return write_recipe(folder, base, **(settings | changes))


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def shorter(body: Body) -> Body:
    """Judge: prefer what is shorter by 0.5 a character, with a liking of 2 for A."""
    text = body["messages"][-1]["content"]
    a, b = (text.split(f"\n\n{letter}: ")[1].split("\n\n")[0] for letter in "AB")
    odds = (len(b) - len(a)) / 2 + 2
    return letters(-math.log1p(math.exp(-odds)), -math.log1p(math.exp(odds)))


@pytest.mark.parametrize(
    ("points", "number", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_wilson_s(points: int, number: int, low: float, high: float) -> None:
    """It is that of Newcombe (1998, table I, method 3), its mirror image for losses, and solves Wilson's equation."""
    found = wilson(points, number)
    assert found == pytest.approx((low, high), abs=5e-5)
    assert wilson(number - points, number) == pytest.approx((1 - found[1], 1 - found[0]))
    p = points / number
    for bound in found:
        assert abs(p - bound) == pytest.approx(Z95 * math.sqrt(bound * (1 - bound) / number), abs=1e-9)


def test_rewards_decide(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each answer's weighted sum stands in generations.jsonl; the more is worth wins; lora-eval says the same."""
    path = job(tmp_path, base, evaluate__win_rate={"rewards": [SOUND, SHORT]}, train__max_steps=40)
    scores = pipeline.train(load_recipe(path))["eval"]
    rows = lines_of(tmp_path / "run/generations.jsonl")
    points = 0.0
    for row in rows:
        for name in ("base", "tuned"):
            shown = 2.0 * bool(re.search("the|says", row[name]))
            assert -(2**-7) <= row[f"{name}_reward"] - shown <= 0.0
        difference = row["tuned_reward"] - row["base_reward"]
        assert row["won"] == (0.5 if difference == 0 else float(difference > 0))
        points += row["won"]
    tuned = scores["tuned"]
    assert points > 11 / 2
    assert (tuned["win_rate"], tuned["win_rate_prompts"]) == (pytest.approx(points / 11), 11)
    assert (tuned["win_rate_low"], tuned["win_rate_high"]) == pytest.approx(wilson(points, 11))
    assert scores["base"]["win_rate"] == pytest.approx(1 - tuned["win_rate"])
    assert scores["base"]["win_rate_low"] == pytest.approx(1 - tuned["win_rate_high"])
    again = run_here(capsys, "eval", str(tmp_path / "run"), "--json", "--min", "win_rate_low=0.999")
    assert again.code == 5
    assert json.loads(again.output)["tuned"]["win_rate"] == tuned["win_rate"]
    assert "win_rate_low" in again.errors
    for reward, rate in (
        ({**SOUND, "weight": -2.0}, 1 - points / 11),
        ({**SOUND, "pattern": "nothing"}, 0.5),
    ):
        other = f"evaluate.win_rate.rewards={json.dumps([reward])}"
        told = json.loads(run_here(capsys, "eval", str(tmp_path / "run"), "--json", other).output)
        assert told["tuned"]["win_rate"] == pytest.approx(rate)


def test_an_endpoint_judges_in_both_orders(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Margins are free of its liking for A, passing faults leave no trace, and equal answers are not asked about."""
    with ChatServer(shorter) as server:
        judge = {"kind": "endpoint", "url": server.url, "model": "m", "timeout": 5.0}
        path = job(tmp_path, base, evaluate__win_rate={"judge": judge, "question": "Which is shorter?"})
        server.faults = [None, (429, {"Retry-After": "0"}, {}), "broken", "close", (500, {}, {})]
        with watched() as seen:
            result = run_here(capsys, "train", str(path))
        assert result.code == 0, result.errors
        assert all("Which is shorter?" in body["messages"][0]["content"] for body in server.bodies)
        sent = len(server.bodies)
        assert run_here(capsys, "train", str(path), "--overwrite").code == 0
        assert len(server.bodies) > sent  # a run that begins anew asks anew
    connects = [event for event in seen.events if event.startswith("socket.")]
    assert all(f"'127.0.0.1', {server.port}" in event for event in connects), connects
    rows = lines_of(tmp_path / "run/generations.jsonl")
    differing = [row for row in rows if row["base"] != row["tuned"]]
    assert differing
    for row in rows:
        margin = (len(row["base"]) - len(row["tuned"])) / 2
        assert row["margin"] == pytest.approx(margin, abs=1e-6)
        assert row["won"] == (0.5 if margin == 0 else float(margin > 0))
    kept = lines_of(tmp_path / "run/endpoint.jsonl")
    assert len(kept) == 2 * len(differing)
    assert "win rate: " in result.output
    assert f"endpoint: {len(kept)} requests" in result.output


def test_a_run_that_goes_on_asks_nothing_twice(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the endpoint was not to be had the run ends with exit code 4; the same command asks for what is missing."""
    with ChatServer(shorter) as server:
        judge = {"kind": "endpoint", "url": server.url, "model": "m", "retries": 0, "parallel": 1}
        path = job(tmp_path, base, evaluate__win_rate={"judge": judge})
        server.faults = [None] * 5 + [(503, {}, {})]
        failed = run_here(capsys, "train", str(path))
        assert failed.code == 4
        assert len(failed.errors.splitlines()) == 1
        kept = len(lines_of(tmp_path / "run/endpoint.jsonl"))
        assert kept in (5, 6)  # the next question may have been under way
        server.bodies.clear()
        assert run_here(capsys, "train", str(path)).code == 0
        assert len(server.bodies) == len(lines_of(tmp_path / "run/endpoint.jsonl")) - kept


def test_the_base_judges_as_its_own_folder_does(tmp_path: Path, base: Path) -> None:
    """`self` is the base without what was trained: in fp32 its log-odds are those of the base as another model."""
    found = []
    for name, judge in (("self", {"kind": "self"}), ("local", {"kind": "local", "folder": str(base)})):
        path = job(tmp_path / name, base, evaluate__win_rate={"judge": judge, "question": "?"})
        pipeline.train(load_recipe(path))
        found.append(lines_of(tmp_path / name / "run/generations.jsonl"))
    judged = [row for row in found[0] if row["margin"]]
    assert judged
    for one, other in zip(*found, strict=True):
        assert (one["tuned"], one["won"]) == (other["tuned"], other["won"])
        if one["margin"]:
            assert one["log_odds"] == pytest.approx(other["log_odds"], abs=1e-4)


def test_what_has_no_place_in_the_judge_is_left_out(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is counted and told, and is no tie."""
    path = job(tmp_path, base, evaluate__win_rate={"judge": {"kind": "self"}, "question": "?" * 600})
    result = run_here(capsys, "train", str(path))
    assert result.code == 0, result.errors
    rows = lines_of(tmp_path / "run/generations.jsonl")
    unjudged = [row for row in rows if row["won"] is None]
    assert unjudged
    assert f"{len(unjudged)} prompts are too long for the judge" in result.output
    scores = json.loads((tmp_path / "run/summary.json").read_text())["eval"]["tuned"]
    assert scores.get("win_rate_prompts", 0) == len(rows) - len(unjudged)


def test_two_processes_have_the_win_rate_of_one(tmp_path: Path, base: Path) -> None:
    """The main process decides, and all of them report it."""
    rates = []
    for name in ("alone", "two"):
        settings = {"evaluate__win_rate": {"judge": {"kind": "self"}, "question": "?"}, "train__max_steps": 2}
        path = job(tmp_path / name, base, **settings)
        if name == "two":
            done = in_two_processes(path)
            assert done.returncode == 0, done.stderr
        else:
            pipeline.train(load_recipe(path))
        rates.append(json.loads((tmp_path / name / "run/summary.json").read_text())["eval"]["tuned"])
    assert rates[0]["win_rate"] == rates[1]["win_rate"]
    assert rates[0]["win_rate_prompts"] == rates[1]["win_rate_prompts"]


def test_pairs_have_a_win_rate(tmp_path: Path, base: Path) -> None:
    """Of a pair the prompt is answered, and the chosen answer is the reference."""
    rows = write_rows(tmp_path / "pairs.jsonl", pairs(16))
    path = job(
        tmp_path / "job", base, objective={"name": "dpo"}, data__train=str(rows), data__eval=str(rows),
        evaluate__win_rate={"rewards": [{"name": "exact_match"}]},
    )  # fmt: skip
    scores = pipeline.train(load_recipe(path))["eval"]["tuned"]
    assert scores["win_rate_prompts"] == 16
    answers = lines_of(tmp_path / "job/run/generations.jsonl")
    assert [row["reference"] for row in answers] == [row["chosen"] for row in pairs(16)]


def test_a_reward_model_decides(tmp_path: Path, base: Path) -> None:
    """Its scores are those of PEFT over transformers' own classifier, of the prompt with the answer and its end."""
    rows = str(write_rows(tmp_path / "pairs.jsonl", pairs(16)))
    model = job(
        tmp_path / "model", base, objective={"name": "reward"}, data__train=rows, evaluate__metrics=["loss"]
    )
    pipeline.train(load_recipe(model.parent / "recipe.yaml", [f"data.eval={rows}"]))
    reward = {"name": "reward_model", "run": str(tmp_path / "model/run")}
    learned = {"train__max_steps": 80, "train__learning_rate": 3e-2}
    pipeline.train(
        load_recipe(job(tmp_path / "job", base, evaluate__win_rate={"rewards": [reward]}, **learned))
    )
    scores = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32),
        tmp_path / "model/run/adapter",
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    checked = 0
    for row in lines_of(tmp_path / "job/run/generations.jsonl"):
        assert row["won"] == (0.5 + math.copysign(0.5, difference) if (difference := worth(row)) else 0.5)
        if (
            len(tokenizer(row["tuned"], add_special_tokens=False).input_ids) < 12
        ):  # else it was cut: it has no end
            text = f"{row['prompt']}{row['tuned']}<|im_end|>"
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            assert row["tuned_reward"] == pytest.approx(float(scores(input_ids=ids).logits), abs=1e-5)
            checked += 1
    assert checked


def worth(row: dict[str, Any]) -> float:
    """Return by how much the tuned model's answer is worth more."""
    return float(row["tuned_reward"] - row["base_reward"])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "evaluate.metrics: found win_rate, but nothing says which answer wins"),
        ({"evaluate__win_rate": {}}, "evaluate.win_rate: found nothing to decide by"),
        ({"evaluate__win_rate": {"rewards": [SHORT], "judge": {"kind": "self"}}}, "found both rewards and a judge"),
        ({"evaluate__win_rate": {"rewards": []}}, "evaluate.win_rate.rewards"),
        ({"evaluate__win_rate": {"rewards": [{"name": "regex"}]}}, "win_rate.rewards: found regex without pattern"),
        (
            {"evaluate__win_rate": {"rewards": [{"name": "python", "file": "f.py", "function": "f"}]}},
            "evaluate.win_rate.rewards: found f.py, Python code that would run",
        ),
        (
            {
                "evaluate__win_rate": {"rewards": [{"name": "python", "file": "f.py", "function": "f"}]},
                "run__allow_code": True,
            },
            "evaluate.win_rate.rewards: f.py: no such file",
        ),
        ({"evaluate__win_rate": {"rewards": [{"name": "json_fields"}]}}, "win_rate.rewards: json_fields: the ref"),
        (
            {"evaluate__win_rate": {"judge": {"kind": "local", "folder": "nowhere"}}},
            "evaluate.win_rate.judge.folder: nowhere: no such folder",
        ),
        (
            {"evaluate__win_rate": {"judge": {"kind": "endpoint"}}},
            "evaluate.win_rate.judge.url: is missing",
        ),
        (
            {
                "evaluate__win_rate": {
                    "judge": {"kind": "endpoint", "url": "https://h/v1", "model": "m", "key_from": "NO_SUCH_KEY"}
                }
            },
            "evaluate.win_rate.judge.key_from: the variable NO_SUCH_KEY is not set",
        ),
        ({"evaluate__win_rate": {"rewards": [SHORT]}, "data__eval": None}, "there are no held-out rows"),
        ({"evaluate__win_rate": {"rewards": [SHORT]}, "objective": {"name": "reward"}}, "a reward model gives no"),
    ],
)  # fmt: skip
def test_what_cannot_be_decided_is_refused(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], told: str
) -> None:
    """Exit code 2 before anything is trained, with the place of the key, and no folder."""
    result = run_here(capsys, "train", str(job(tmp_path, base, **changes)))
    assert result.code == 2
    assert told in result.errors
    assert not (tmp_path / "run").exists()


def test_a_run_that_was_handed_over_neither_connects_nor_runs_code(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """lora-eval asks its user for address and key, and for leave to run code, though the run's recipe has them."""
    monkeypatch.setenv("SOME_KEY", "the-key")
    (tmp_path / "judge.py").write_text("def judge(completion, prompt, reference):\n    return 1.0\n")
    python = {"name": "python", "file": str(tmp_path / "judge.py"), "function": "judge"}
    code = job(tmp_path / "code", base, evaluate__win_rate={"rewards": [python]}, run__allow_code=True)
    with ChatServer(shorter) as server:
        judge = {"kind": "endpoint", "url": server.url, "model": "m", "key_from": "SOME_KEY"}
        asking = job(tmp_path / "asking", base, evaluate__win_rate={"judge": judge})
        address, key = (
            f"evaluate.win_rate.judge.url={server.url}",
            "evaluate.win_rate.judge.key_from=SOME_KEY",
        )
        for path, needed in ((code, ["run.allow_code=true"]), (asking, [address, key])):
            assert run_here(capsys, "train", str(path)).code == 0
            server.bodies.clear()
            for given in ([], needed[1:]) if len(needed) > 1 else ([],):
                refused = run_here(capsys, "eval", str(path.parent / "run"), *given)
                assert (refused.code, server.bodies) == (2, [])
                assert all(one in refused.errors for one in needed if one not in given)
            assert run_here(capsys, "eval", str(path.parent / "run"), *needed).code == 0
    assert server.bodies


def test_a_model_without_a_base_has_none(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """lora-eval of a plain model refuses it in one line."""
    rows = write_recipe(tmp_path, base).parent / "eval.jsonl"
    result = run_here(
        capsys, "eval", str(base), f"data.eval={rows}", "evaluate.metrics=[win_rate]",
        "evaluate.win_rate.rewards=[{name: exact_match}]",
    )  # fmt: skip
    assert result.code == 2
    assert "win_rate compares with a base" in result.errors


def test_a_card_names_no_folder_of_a_judge(tmp_path: Path, base: Path) -> None:
    """Files and folders of the block are cut to their last part where the recipe is published."""
    judge = {"kind": "local", "folder": str(base)}
    pipeline.train(load_recipe(job(tmp_path, base, evaluate__win_rate={"judge": judge, "question": "?"})))
    card = (tmp_path / "run/adapter/README.md").read_text()
    assert f"folder: {base.name}" in card
    assert str(base.parent) not in card


def test_votes_decide_where_an_endpoint_gives_no_probabilities(tmp_path: Path, base: Path) -> None:
    """A judge that always says A is for nobody."""
    with ChatServer(lambda body: said("A")) as server:
        judge = {"kind": "endpoint", "url": server.url, "model": "m", "votes": 3}
        pipeline.train(load_recipe(job(tmp_path, base, evaluate__win_rate={"judge": judge})))
    assert {row["won"] for row in lines_of(tmp_path / "run/generations.jsonl")} == {0.5}
