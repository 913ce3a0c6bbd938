"""The constitutional chain of benchmarks/constitution_chain.py: its rows, and its few-steps form by one command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from command_line import run_here
from constitution_chain import recipe_of
from constitution_rows import RULES, cases, write

from lora_cli.constitution.principles import read_principles
from lora_cli.constitution.requests import critique_turns, revision_turns
from lora_cli.constitution.violations import breaks
from lora_cli.data.messages import turns

pytestmark = pytest.mark.usefixtures("own_cache")
SIZES = {"taught": 12, "prompts": 4, "held_out": 3}


def test_what_is_taught_is_what_the_critic_is_asked(tmp_path: Path) -> None:
    """Rows have the turns of the requests; answers to messages all break the principle, revisions and others do not."""
    (principle,) = read_principles(RULES).every
    paths = write(tmp_path, seed=1, **SIZES)
    taught, prompts, held_out = (
        [json.loads(line) for line in paths[name].read_text().splitlines()] for name in SIZES
    )
    assert (len(taught), len(prompts), len(held_out)) == tuple(SIZES.values())
    for row in taught:
        message, answer, _, critique, _, revision = said = turns(row["messages"], "messages", "row")
        assert said[:3] == critique_turns((message,), answer.content, principle)
        assert said[:5] == revision_turns((message,), answer.content, critique.content, principle)
        assert breaks(principle, message.content, answer.content)
        assert not breaks(principle, message.content, revision.content)
    for row in held_out:
        assert not breaks(principle, *(turn["content"] for turn in row["messages"]))
    assert write(tmp_path / "again", seed=1, **SIZES)["taught"].read_bytes() == paths["taught"].read_bytes()


def test_no_person_is_in_two_messages() -> None:
    """Names have no part in common, so that none of a held-out message was seen in training."""
    parts = [part for case in cases(1700, 0) for part in case.name.split()]
    assert len(set(parts)) == len(parts) == 3400


def test_the_chain_is_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """lora-train makes all three stages, and the report compares the last one's answers with the first one's."""
    rows = write(tmp_path / "rows", seed=0, **SIZES)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of(tmp_path, rows, 0, max_steps=2)))
    done = run_here(capsys, "train", str(path))
    assert done.code == 0, done.errors
    run = tmp_path / "run"
    made = [json.loads(line) for line in (run / "2-constitution/sft.jsonl").read_text().splitlines()]
    messages = [json.loads(line)["prompt"] for line in rows["prompts"].read_text().splitlines()]
    assert {row["messages"][0]["content"] for row in made} <= set(messages)
    last, first = (run / name / "generations.jsonl" for name in ("3-harmless", "1-helpful"))
    for path, name in ((last, "after"), (first, "before")):
        answered = [json.loads(line) for line in path.read_text().splitlines()]
        (principle,) = read_principles(RULES).every
        asked = [
            json.loads(line)["messages"][0]["content"] for line in rows["held_out"].read_text().splitlines()
        ]
        broken = sum(breaks(principle, one, row["tuned"]) for one, row in zip(asked, answered, strict=True))
        told = run_here(capsys, "lora", "constitution", "report", str(run), "--json")
        (found,) = json.loads(told.output)["violations"]
        assert (found[name], found["answers"]) == (broken, 3)
    shown = run_here(capsys, "lora", "constitution", "report", str(run))
    assert "1-helpful" in shown.output
    assert "3-harmless" in shown.output


def test_stages_without_rows_by_principles_have_no_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told in one line, which says what to give."""
    rows = write(tmp_path / "rows", seed=0, **SIZES)
    recipe = recipe_of(tmp_path, rows, 0, max_steps=1)
    recipe["objective"] = recipe["objective"][:1]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run_here(capsys, "train", str(tmp_path / "recipe.yaml")).code == 0
    result = run_here(capsys, "lora", "constitution", "report", str(tmp_path / "run"))
    assert (result.code, len(result.errors.splitlines())) == (2, 1)
    assert "none of its stages makes rows by principles" in result.errors
