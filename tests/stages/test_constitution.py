"""`lora constitution make` as a user runs it: local and endpoint critics, kills, a judge with a liking for a letter."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from chat_server import Body, ChatServer, letters, said
from command_line import ROOT, run_here
from watched import watched

from lora_cli.data.formats import FORMATS, detect
from lora_cli.data.read import RawRow
from lora_cli.types import Conversation, Pair

ROWS = ("critiques.jsonl", "sft.jsonl", "judgements.jsonl", "pairs.jsonl", "summary.json")
RULES = ROOT / "configs/constitutions/no_personal_data.yaml"


def write(folder: Path, **constitution: Any) -> Path:
    """Write prompts and a recipe over the bundled base, and return the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["Ann Lee", "Bo Kern", "Cy Moss", "Di Park", "Ed Rowe", "Flo Hart", "Gus Bell"]
    prompts = [{"prompt": f"My name is {name}. Our Brivo is broken."} for name in names]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    recipe = {
        "model": {"base": "tiny", "dtype": "float32"},
        "constitution": {
            "file": str(RULES), "prompts": str(folder / "prompts.jsonl"), "answer_tokens": 6, "batch_rows": 2,
            **constitution,
        },
        "run": {"output": str(folder / "run"), "device": "cpu"},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def endpoint(server: ChatServer, **keys: Any) -> dict[str, Any]:
    """Return the block of a critic or judge behind a server."""
    return {"kind": "endpoint", "url": server.url, "model": "m", "timeout": 5.0, **keys}


def made(recipe: Path, name: str) -> list[dict[str, Any]]:
    """Return the rows of a file of the run."""
    return [json.loads(line) for line in (recipe.parent / "run" / name).read_text().splitlines()]


def contents(recipe: Path) -> dict[str, bytes]:
    """Return what the files of rows hold."""
    return {name: (recipe.parent / "run" / name).read_bytes() for name in ROWS}


def kind_of(rows: list[dict[str, Any]]) -> str:
    """Return the format that the tool finds in rows, each of which it can read."""
    raw = [RawRow(row, f"rows:{number}", number) for number, row in enumerate(rows, start=1)]
    name = detect(raw)
    for row in raw:
        assert isinstance(FORMATS[name].read(row), Conversation | Pair)
    return name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose run, by the model itself, nobody stopped."""
    from lora_cli.cli import main

    recipe = write(tmp_path_factory.mktemp("alone"))
    assert main(["constitution", "make", str(recipe)]) == 0
    return recipe


def test_all_is_written_down(alone: Path) -> None:
    """Each row holds prompt, principle, requests and raw answers, and the rows to train on are of formats we read."""
    critiques, judgements = made(alone, "critiques.jsonl"), made(alone, "judgements.jsonl")
    assert [row["row"] for row in critiques] == [row["row"] for row in judgements] == list(range(7))
    for row in critiques:
        assert row["where"].endswith(f"prompts.jsonl:{row['row'] + 1}")
        (one,) = row["rounds"]
        assert one["principle"] == "no_personal_data"
        assert all(one[key] for key in ("critique_request", "revision_request"))
        assert {"critique", "revision"} <= one.keys()
    assert any(len(row["samples"]) == 2 and row["pairs"] for row in judgements)
    for row in judgements:
        for pair in row["pairs"]:
            assert pair["margin"] == pytest.approx((pair["log_odds"][0] - pair["log_odds"][1]) / 2)
            assert [pair["raw"][0]["A"] - pair["raw"][0]["B"]] == pytest.approx(pair["log_odds"][:1])
            assert pair["first"] in pair["prompts"][0]
    assert kind_of(made(alone, "sft.jsonl")) == "chat"
    pairs = made(alone, "pairs.jsonl")
    assert kind_of(pairs) == "preference"
    assert all(pair["margin"] > 0 for pair in pairs)


def test_a_finished_run_is_left_alone(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same command does nothing; another principle, seed or prompt is refused, and told by name."""
    before = contents(alone)
    assert "finished already" in run_here(capsys, "lora", "constitution", "make", str(alone)).output
    changed = run_here(
        capsys, "lora", "constitution", "make", str(alone), "run.seed=3", "constitution.max_prompts=4"
    )
    assert changed.code == 2
    assert "constitution.prompts, run.seed changed" in changed.errors
    assert contents(alone) == before


def test_a_training_does_not_take_the_folder_for_its_run(
    alone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """lora-train into it is refused, and touches nothing."""
    before = contents(alone)
    rows = str(alone.parent / "run/sft.jsonl")
    result = run_here(capsys, "train", str(alone), f"data.train={rows}")
    assert result.code == 2
    assert "is not a run of lora-cli" in result.errors
    assert contents(alone) == before


def test_killed_anywhere_it_ends_in_the_same_bytes(alone: Path, tmp_path: Path) -> None:
    """SIGKILL at some row, a torn line behind it, several times: the same command goes on to the bytes of `alone`."""
    recipe = write(tmp_path)
    expected = contents(alone)
    expected = {
        name: text.replace(str(alone.parent).encode(), str(tmp_path).encode())
        for name, text in expected.items()
    }
    draw, killed = random.Random(0), 0
    for rows in (2, 5, 9, 12):
        process = start(recipe)
        while process.poll() is None and lines(recipe) < rows:
            time.sleep(0.002)
        if process.poll() is None:
            time.sleep(draw.random() * 0.02)
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
            for name in ("critiques.jsonl", "judgements.jsonl"):
                path = tmp_path / "run" / name
                if path.exists() and lines(recipe) < 14:
                    path.write_bytes(path.read_bytes() + b'{"row": 99, "whe')
    assert killed >= 2
    assert start(recipe).wait(120) == 0
    assert contents(recipe) == expected


def start(recipe: Path, **streams: Any) -> subprocess.Popen[bytes]:
    """Start the command."""
    call = "import sys; from lora_cli.cli import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", call, "constitution", "make", str(recipe)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        **streams,
    )


def lines(recipe: Path) -> int:
    """Return how many rows of both journals are there."""
    found = 0
    for name in ("critiques.jsonl", "judgements.jsonl"):
        path = recipe.parent / "run" / name
        found += path.read_bytes().count(b"\n") if path.exists() else 0
    return found


def critic(body: Body) -> Body:
    """Criticise, revise without names, and prefer what is shorter by 0.5 a character, with a liking of 2 for A."""
    text = body["messages"][-1]["content"]
    if body.get("logprobs"):
        a, b = (text.split(f"\n\n{letter}: ")[1].split("\n\n")[0] for letter in "AB")
        odds = (len(b) - len(a)) / 2 + 2
        return letters(-math.log1p(math.exp(-odds)), -math.log1p(math.exp(odds)))
    return said("Thank you." if text.startswith("Write the reply again") else "It repeats the name.")


def test_an_endpoint_criticises_and_judges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its revisions are the rows; margins are free of its liking for A; faults on the way leave no trace."""
    with ChatServer(critic) as server:
        recipe = write(tmp_path, critic=endpoint(server, price_out=2.0), judge=endpoint(server))
        server.faults = [None, (429, {"Retry-After": "0"}, {}), None, "broken", "close", (500, {}, {})]
        with watched() as seen:
            assert run_here(capsys, "lora", "constitution", "make", str(recipe)).code == 0
    connects = [event for event in seen.events if event.startswith("socket.")]
    assert connects
    assert all(f"'127.0.0.1', {server.port}" in event for event in connects), connects
    assert [row["messages"][-1]["content"] for row in made(recipe, "sft.jsonl")] == ["Thank you."] * 7
    judged = [pair for row in made(recipe, "judgements.jsonl") for pair in row["pairs"]]
    assert judged
    for pair in judged:
        assert pair["margin"] == pytest.approx((len(pair["second"]) - len(pair["first"])) / 2, abs=1e-6)
    for row in made(recipe, "pairs.jsonl"):
        assert len(row["chosen"]) < len(row["rejected"])
    usage = json.loads((tmp_path / "run/summary.json").read_text())["endpoint"]
    assert usage["requests"] == 14 + 2 * len(judged)
    assert usage["cost"] == pytest.approx(14 * 4 * 2.0 / 1e6)


def test_another_local_model_judges_and_criticises(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder is read once for both; a row that has no place in it is left out and told."""
    other = {"kind": "local", "folder": str(base)}
    short = {"name": "short", "critique": "why", "revision": "again", "judge": "which"}
    recipe = write(tmp_path, critic=other, judge=other, file=str(tmp_path / "short.yaml"))
    (tmp_path / "short.yaml").write_text(yaml.safe_dump({"principles": [short]}))
    prompts = ["hello", "what does the cat say", "word " * 150]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in prompts))
    result = run_here(capsys, "lora", "constitution", "make", str(recipe))
    assert result.code == 0, result.errors
    assert result.output.count(f": {base}") == 1
    rows = made(recipe, "critiques.jsonl")
    assert [row["left_out"] for row in rows] == [None, None, "the conversation is too long for the model"]
    assert "prompts.jsonl:3: left out" in result.output
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["sft_rows"], summary["sft_left_out"]) == (2, 1)
    assert any(pair["margin"] for row in made(recipe, "judgements.jsonl") for pair in row["pairs"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_one_line(tmp_path: Path, number: signal.Signals) -> None:
    """Exit code 128 + its number, also while an endpoint is waited for, and the same command goes on."""
    with ChatServer(critic) as server:
        recipe = write(tmp_path, samples=0, critic=endpoint(server, timeout=2.0, parallel=1))
        server.delay = 0.3
        process = start(recipe, stderr=subprocess.PIPE)
        while len(server.bodies) < 3 and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        server.delay = 0.0
        assert process.returncode == 128 + number
        assert len(errors.decode().splitlines()) == 1, errors
        assert start(recipe).wait(60) == 0
    assert len(made(recipe, "sft.jsonl")) == 7


def test_a_judge_that_always_prefers_the_first_makes_no_pairs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its log-odds cancel to nothing, and a tie is no preference."""
    with ChatServer(lambda body: letters(-0.01, -4.6)) as server:
        recipe = write(tmp_path, rounds=0, judge=endpoint(server))
        assert run_here(capsys, "lora", "constitution", "make", str(recipe)).code == 0
    judged = [pair for row in made(recipe, "judgements.jsonl") for pair in row["pairs"]]
    assert judged
    assert {pair["margin"] for pair in judged} == {0.0}
    assert {tuple(pair["log_odds"]) for pair in judged} == {(4.59, 4.59)}
    assert made(recipe, "pairs.jsonl") == []
    assert json.loads((tmp_path / "run/summary.json").read_text())["pairs_undecided"] == len(judged)


def test_an_endpoint_is_never_asked_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed between two answers, the same command asks for what is missing, and ends in the bytes of a run in one."""
    with ChatServer(critic) as server:
        whole = write(tmp_path / "whole", critic=endpoint(server), judge=endpoint(server))
        assert run_here(capsys, "lora", "constitution", "make", str(whole)).code == 0
        expected = Counter(map(json.dumps, server.bodies))
        recipe = write(tmp_path / "killed", critic=endpoint(server), judge=endpoint(server))
        server.bodies.clear()
        server.delay = 0.05
        for requests in (5, 13, 20):
            process = start(recipe)
            while process.poll() is None and len(server.bodies) < requests:
                time.sleep(0.002)
            process.kill()
            process.wait()
        server.delay = 0.0
        assert start(recipe).wait(120) == 0
        again = Counter(map(json.dumps, server.bodies)) - expected
    assert again.total() <= 3 * 4  # under way at a kill, whose answers nobody received
    there, here = (str(path.parent).encode() for path in (whole, recipe))
    assert {name: text.replace(there, here) for name, text in contents(whole).items()} == contents(recipe)


def test_a_stopped_endpoint_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused: exit code 2. Not to be had: exit code 4, and the same command goes on later."""
    with ChatServer(critic) as server:
        recipe = write(tmp_path, samples=0, critic=endpoint(server, retries=0, key_from="CONSTITUTION_KEY"))
        without = run_here(capsys, "lora", "constitution", "make", str(recipe))
        assert without.code == 2
        assert "constitution.critic.key_from: the variable CONSTITUTION_KEY is not set" in without.errors
        assert server.bodies == []
        os.environ["CONSTITUTION_KEY"] = "the-key"
        try:
            server.faults = [(401, {}, {"error": {"message": "the-key is wrong"}})]
            refused = run_here(capsys, "lora", "constitution", "make", str(recipe))
            server.faults = [(503, {}, {})] * 9
            gone = run_here(capsys, "lora", "constitution", "make", str(recipe))
            server.faults = []
            done = run_here(capsys, "lora", "constitution", "make", str(recipe))
        finally:
            del os.environ["CONSTITUTION_KEY"]
    assert (refused.code, gone.code, done.code) == (2, 4, 0)
    assert len(refused.errors.splitlines()) == len(gone.errors.splitlines()) == 1
    files = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert b"the-key" not in files + (refused.errors + gone.errors + refused.output + done.output).encode()


def test_the_report_counts_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Answers stand side by side, and those that repeat a name are counted before and after, chosen and rejected."""
    with ChatServer(critic) as server:
        recipe = write(tmp_path, critic=endpoint(server), judge=endpoint(server))
        assert run_here(capsys, "lora", "constitution", "make", str(recipe)).code == 0
    path = tmp_path / "run/critiques.jsonl"
    rows = made(recipe, "critiques.jsonl")
    for row in rows[:5]:  # what the bundled model says is not the test's affair
        row["response"] = row["prompt"][0]["content"]
    for row in rows[5:]:
        row["response"] = "We look into it."
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = run_here(capsys, "lora", "constitution", "report", str(tmp_path / "run"))
    assert shown.code == 0
    assert "5 of 7 (71.4%)" in shown.output
    assert "0 of 7 (0.0%)" in shown.output
    assert "Thank you." in shown.output
    said_ = json.loads(
        run_here(capsys, "lora", "constitution", "report", str(tmp_path / "run"), "--json").output
    )
    assert said_["violations"] == [{"principle": "no_personal_data", "before": 5, "after": 0, "answers": 7}]
    assert len(said_["samples"]) == 5


def test_the_report_reads_a_training_run_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of generated answers base and tuned are compared; the constitution has to be named."""
    line = {
        "row": "r:1",
        "prompt": "My name is Ann Lee.",
        "reference": "",
        "base": "Hi Ann",
        "tuned": "Hi",
        "match": False,
    }
    (tmp_path / "generations.jsonl").write_text(json.dumps(line) + "\n")
    without = run_here(capsys, "lora", "constitution", "report", str(tmp_path))
    assert (without.code, "--constitution FILE" in without.errors) == (2, True)
    shown = run_here(
        capsys, "lora", "constitution", "report", str(tmp_path), "--constitution", str(RULES), "--json"
    )
    assert json.loads(shown.output)["violations"][0] | {"principle": ""} == {
        "principle": "", "before": 1, "after": 0, "answers": 1
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"file": "nowhere.yaml"}, "constitution.file: nowhere.yaml: no such file"),
        ({"prompts": "nowhere.jsonl"}, "constitution.prompts: nowhere.jsonl: no such file"),
        ({"samples": 1}, "constitution.samples: found 1, but a pair needs two"),
        ({"samples": 0, "rounds": 0}, "nothing would be made"),
        ({"critic": {"url": "http://h/v1"}}, "constitution.critic.url: found beside kind self"),
        ({"critic": {"kind": "endpoint"}}, "constitution.critic.url: is missing"),
        (
            {"critic": {"kind": "endpoint", "url": "h/v1", "model": "m"}},
            "constitution.critic.url: is no address",
        ),
        (
            {"critic": {"kind": "endpoint", "url": "http://host/v1", "model": "m", "key_from": "K"}},
            "unencrypted",
        ),
        (
            {"judge": {"kind": "local", "folder": "nowhere"}},
            "constitution.judge.folder: nowhere: no such folder",
        ),
        (
            {"critic": {"kind": "endpoint", "url": "https://h/v1", "model": "m", "api_key": "x"}},
            "a secret has no place",
        ),
        ({"file": None}, "constitution.file"),
    ],
)
def test_a_wrong_block_is_told_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], told: str
) -> None:
    """Exit code 2, lines with the place of the key, and no folder."""
    recipe = write(tmp_path, **changes)
    result = run_here(capsys, "lora", "constitution", "make", str(recipe))
    assert result.code == 2
    assert told in result.errors
    assert f"{recipe}:" in result.errors
    assert not (tmp_path / "run").exists()


def test_prompts_come_from_rows_of_any_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last answer is left out, of a pair both; a row that does not end with the user's turn is told."""
    from lora_cli.data.prompts import read_prompts
    from lora_cli.recipe.load import load_recipe

    rows: list[list[dict[str, Any]]] = [
        [{"prompt": "a", "completion": "b"}], [{"instruction": "a", "output": "b"}], [{"prompt": "a"}],
        [{"prompt": [{"role": "user", "content": "a"}]}], [{"messages": [{"role": "user", "content": "a"}]}],
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
        [{"prompt": "a", "chosen": "b", "rejected": "c"}],
    ]  # fmt: skip
    for index, content in enumerate(rows):
        recipe = load_recipe(write(tmp_path / str(index)))
        assert recipe.constitution is not None
        Path(str(recipe.constitution.prompts)).write_text("".join(json.dumps(row) + "\n" for row in content))
        (prompt,) = read_prompts(recipe.constitution, recipe.data)
        assert [(turn.role, turn.content) for turn in prompt.messages] == [("user", "a")]
    path = write(tmp_path / "bad")
    (tmp_path / "bad/prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": 3}\n{"text": "a"}\n')
    errors = run_here(capsys, "lora", "constitution", "make", str(path)).errors
    assert "prompts.jsonl:2" in errors
