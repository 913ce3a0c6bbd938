"""`lora constitution report` on training runs: what was said in the rows, and the answers of two runs side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT, Result, run_here
from toy import write_recipe, write_rows

from lora_cli import pipeline
from lora_cli.recipe.load import load_recipe

pytestmark = pytest.mark.usefixtures("own_cache")

RULES = ROOT / "configs/constitutions/no_personal_data.yaml"
# Nothing but its place at the end of the message tells that the first is a name.
MESSAGES = ("It is broken. Bishin Tirek", "This is Mara Quist. It is broken.", "It is broken.")


def trained(folder: Path, base: Path, answers: dict[str, list[str]]) -> Path:
    """Train a run of one step that answers the messages, and put other answers into its generations.jsonl."""
    rows = [{"prompt": message, "completion": "We look into it."} for message in MESSAGES]
    held_out = write_rows(folder.parent / "held_out.jsonl", rows)
    recipe = write_recipe(
        folder, base, data__eval=str(held_out), train__max_steps=1, evaluate__metrics=["exact_match"]
    )
    pipeline.train(load_recipe(recipe))
    path = folder / "run/generations.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for name, texts in answers.items():
        for line, text in zip(lines, texts, strict=True):
            line[name] = text
    write_rows(path, lines)
    return folder / "run"


def report(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Result:
    """Report by the rules of the constitution."""
    return run_here(
        capsys, "lora", "constitution", "report", *map(str, arguments), "--constitution", str(RULES)
    )


def counted(result: Result) -> dict[str, Any]:
    """Return the counts of a report in JSON."""
    (found,) = json.loads(result.output)["violations"]
    return {name: found[name] for name in ("before", "after", "answers")}


def test_the_rule_reads_what_the_user_said(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A message is that of the row, not the prompt with its template; of rows that were changed since, the prompt."""
    names = ["Dear Bishin Tirek, thank you.", "Dear Mara Quist, thank you.", "Thank you."]
    run = trained(tmp_path / "job", base, {"base": names, "tuned": ["Thank you."] * 3})
    assert counted(report(capsys, run, "--json")) == {"before": 2, "after": 0, "answers": 3}
    shown = report(capsys, run)
    assert "<|im_start|>" not in shown.output
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(held_out.read_text().replace("It is broken", "It was broken"))
    changed = report(capsys, run, "--json")
    assert counted(changed) == {"before": 1, "after": 0, "answers": 3}
    held_out.unlink()
    gone = report(capsys, run, "--json")
    assert (gone.code, counted(gone)["before"]) == (0, 1)
    assert "warning: prompts are searched as the model was shown them" in gone.errors


def test_two_runs_stand_side_by_side(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tuned model of one comes first, that of the other second, prompt by prompt."""
    names = ["Dear Bishin Tirek, thank you.", "Dear Mara Quist, thank you.", "Thank you."]
    first = trained(tmp_path / "first", base, {"tuned": names})
    second = trained(tmp_path / "second", base, {"tuned": [names[0], "Thank you.", "Thank you."]})
    shown = report(capsys, second, "--before", first)
    assert shown.code == 0, shown.errors
    assert "2 of 3 (66.7%)" in shown.output
    assert "1 of 3 (33.3%)" in shown.output
    assert "3 answers, 1 changed" in shown.output


def test_two_runs_without_a_common_prompt_are_refused(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So are a folder that is none, and a run that generated no answers: one line, exit code 2."""
    run = trained(tmp_path / "job", base, {})
    other = tmp_path / "other"
    other.mkdir()
    without = report(capsys, run, "--before", other)
    write_rows(other / "generations.jsonl", [{"row": "r:1", "prompt": "?", "base": "a", "tuned": "b"}])
    apart = report(capsys, run, "--before", other)
    nowhere = report(capsys, run, "--before", tmp_path / "nowhere")
    told = ("holds neither critiques.jsonl", "have no held-out prompt in common", "no such folder")
    for result, words in zip((without, apart, nowhere), told, strict=True):
        assert result.code == 2
        assert words in result.errors
        assert len(result.errors.splitlines()) == 1
