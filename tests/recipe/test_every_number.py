"""Every number of the recipe, given what is no number of its range: refused by its place and name."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import run_here, snapshot

from lora_cli.recipe.keys import Key, all_keys, options_of


def _is_number(key: Key) -> bool:
    kinds = {option.get("type") for option in options_of(key.schema)}
    return bool(kinds & {"integer", "number"}) and "array" not in kinds


NUMBERS = [key for key in all_keys() if _is_number(key) and "*" not in key.path and "<" not in key.path]
VALUES = (".nan", ".inf", "-1", "'7'")


@pytest.mark.reliability("malformed")
@pytest.mark.parametrize("key", NUMBERS, ids=lambda key: f"{key.variant or ''} {key.path}")
def test_what_is_no_number_of_its_range_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    key: Key,
    record_property: pytest.RecordProperty,
) -> None:
    """NaN, infinity, -1 and a text that looks like a number: exit 2, and one line with file, line, column and key."""
    monkeypatch.chdir(tmp_path)
    section, *inner, name = key.path.split(".")
    block = {
        "adapter": f"method: {key.variant}, ",
        "objective": f"name: {key.variant}, ",
        "constitution": "file: c.yaml, ",
    }.get(section, "")
    if key.variant in ("grpo", "rloo", "ppo"):
        block += "rewards: [{name: json_valid}], "
    block += "".join(f"{one}: {{" for one in inner)
    for value in VALUES:
        Path("r.yaml").write_text(f"{section}: {{{block}{name}: {value}{'}' * len(inner)}}}\n")
        before = snapshot(tmp_path)
        result = run_here(capsys, "train", "r.yaml")
        assert result.code == 2
        lines = [line for line in result.errors.splitlines() if "data.train: not set" not in line]
        assert len(lines) == 1, lines
        assert lines[0].startswith(f"error: r.yaml:1:{len(section) + len(block) + 4}: {key.path}: found ")
        assert snapshot(tmp_path) == before
    record_property("cases", len(VALUES))


def test_there_are_numbers_of_every_block() -> None:
    """The list above has keys of each block that holds numbers."""
    assert {key.path.partition(".")[0] for key in NUMBERS} == {
        "data", "adapter", "objective", "train", "evaluate", "export", "constitution", "run"
    }  # fmt: skip
    assert len(NUMBERS) > 40
