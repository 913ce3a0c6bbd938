"""docs/data.md: its rows are read as it says, its report is the one that is printed, its commands run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from command_line import ROOT, run_here

from lora_cli.data.formats import FORMATS, choose_format
from lora_cli.data.read import RawRow
from lora_cli.recipe.load import load_recipe

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^`(\w+)`: .*?```json\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))
ROWS, COMMAND, OUTPUT = re.findall(
    r"On a file `rows.jsonl`.*?```json\n(.*?)```.*?```bash\n(.*?)```.*?```\n(.*?)```", PAGE, re.DOTALL
)[0]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with the recipe and the rows of the page."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COLUMNS", raising=False)
    for name in (
        "configs/quickstart.yaml",
        *(f"lora_cli/assets/tiny/tickets.{s}.jsonl" for s in ("train", "eval")),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "rows.jsonl").write_text(ROWS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_format_has_a_row() -> None:
    """The page shows a row of each format, in its order, and the row is detected as that format and read."""
    assert list(SECTIONS) == list(FORMATS)
    for name, text in SECTIONS.items():
        row = RawRow(json.loads(text), "page:1", 1)
        found, read = choose_format("auto", None, [row])
        assert found == name
        assert isinstance(read(row), FORMATS[name].makes)


def test_the_recipes_are_valid(folder: Path) -> None:
    """Each piece of a recipe on the page is one that loads."""
    for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL):
        assert yaml.safe_load(block)
        (folder / "recipe.yaml").write_text(block)
        load_recipe(folder / "recipe.yaml")


def test_the_report_is_the_one_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """The command over the rows of the page prints what the page shows."""
    command, *arguments = shlex.split(COMMAND)
    done = run_here(capsys, command, *arguments, "run.device=cpu")
    assert [line.rstrip() for line in done.output.splitlines()] == OUTPUT.splitlines()


def test_the_commands_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Every command of the page ends with 0 on the bundled data."""
    lines = re.findall(r"^(lora data configs/quickstart.yaml.*?)(?:  +#.*)?$", PAGE, re.MULTILINE)
    assert len(lines) == 7
    for line in lines:
        command, *arguments = shlex.split(line)
        done = run_here(capsys, command, *arguments)
        assert done.code == 0, done.errors
        assert done.output
