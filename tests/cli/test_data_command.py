"""`lora data` as a user runs it: what it prints and writes, its exit codes, and what it leaves when it is stopped."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from command_line import ROOT, run_here, run_process, snapshot
from rich.console import Console
from toy import rows, write_rows
from weightless import describe, write_base

from lora_cli.cli import data_page, data_report, main

HOSTILE = [
    {
        "prompt": "</span><script>alert('1')</script> & <b>",
        "completion": "fine\x1b[31m\x07 \u202e red\n\n  x",
    },
    {"prompt": "again", "completion": "same"},
    {"prompt": "again", "completion": "same"},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base without weights that no test changes."""
    return write_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture()
def folder(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder: a recipe over hostile rows, and a cache of its own beside it."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    work = tmp_path / "work"
    work.mkdir()
    write_rows(work / "rows.jsonl", HOSTILE)
    (work / "recipe.yaml").write_text(
        f"model: {{base: {base}}}\ndata: {{train: rows.jsonl}}\nrun: {{device: cpu}}\n"
    )
    monkeypatch.chdir(work)
    return work


def test_a_process_prints_writes_and_judges(folder: Path) -> None:
    """One process gives JSON alone on stdout, a page that is well-formed and escaped, and 5 for a warning."""
    before = snapshot(folder)
    done = run_process(
        folder, "lora", "data", "recipe.yaml", "--json", "--strict", "--show", "2", "--html", "page.html"
    )
    assert done.code == 5
    said = json.loads(done.output)
    assert [row["where"] for row in said["rows"]] == ["rows.jsonl:1", "rows.jsonl:2"]
    assert done.errors.splitlines()[-1].startswith("error: recipe.yaml: train: 1 of 3 rows say what")
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert set(snapshot(folder)) == {*before, "page.html"}
    root = ElementTree.fromstring(page)
    assert not [one for one in root.iter() if one.tag in ("script", "link", "img", "iframe")]
    assert "://" not in page
    shown = [one for one in root.iter("span") if one.get("class") == "t"]
    trained = [token for row in said["rows"] for token in row["sides"][0]["tokens"] if token["trained"]]
    assert len(shown) == 1 + len(trained)  # the legend's, and theirs
    text = "".join(one.text or "" for one in root.iter("span"))
    assert "<script>alert('1')</script>" in text
    assert text.endswith("same<|im_end|>⏎")
    assert not [one for one in page if not one.isprintable() and one != "\n"]


def test_a_pipe_gets_marks_and_no_escape_sequences(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal trained tokens stand in brackets with their ids, and nothing of a row reaches the terminal."""
    done = run_here(capsys, "lora", "data", "recipe.yaml", "--show", "2")
    assert done.code == 0, done.errors
    assert all(one.isprintable() or one == "\n" for one in done.output)
    assert "[<|im_end|>:2]" in done.output
    assert "<|im_start|>:1 user:" in done.output
    assert "warning" in done.output
    assert "rows.jsonl:3 is rows.jsonl:2" in done.output
    assert "rows kept" in done.errors  # what is tokenized is told aside


def test_rows_are_shown_by_their_place(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--row FILE:LINE` shows that row alone; a line without one is refused, and so is `--show -1`."""
    done = run_here(capsys, "lora", "data", "recipe.yaml", "--row", "rows.jsonl:3", "--json")
    assert [row["where"] for row in json.loads(done.output)["rows"]] == ["rows.jsonl:3"]
    for arguments in (["--row", "rows.jsonl:4"], ["--row", "rows.jsonl"], ["--row", "x:1"], ["--show", "-1"]):
        done = run_here(capsys, "lora", "data", "recipe.yaml", *arguments)
        assert done.code == 2
        assert done.output == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["data.train=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["model.base=./nowhere"], "nowhere: no such folder"),
        (["--html", "recipe.yaml"], "does not end in .html"),
        (["--html", "no/page.html"], "there is no folder no"),
        (["data.max_length=8"], "none of 3 rows can be used"),
        (["data.train=null"], "data.train: not set"),
        (["data.epochs=1"], "data.epochs"),
    ],
)
def test_bad_input_is_refused_and_nothing_written(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    """Bad input gives code 2, the fault in one line, and leaves no page and no cache behind."""
    before = snapshot(folder)
    done = run_here(capsys, "lora", "data", "recipe.yaml", *arguments)
    assert done.code == 2
    assert told in done.errors
    assert snapshot(folder) == before
    assert not list(folder.parent.glob("cache/**/*.bin"))


def test_bad_rows_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bad row stops the doctor as it would stop the run, with file:line; with `skip` it is a warning."""
    write_rows(folder / "rows.jsonl", [*HOSTILE, {"prompt": "x"}])
    done = run_here(capsys, "lora", "data", "recipe.yaml")
    assert done.code == 2
    assert "rows.jsonl:4" in done.errors
    skip = ["data.on_bad_row=skip", "data.max_bad_rows=0.5", "data.format=prompt_completion"]
    done = run_here(capsys, "lora", "data", "recipe.yaml", *skip, "--strict")
    assert done.code == 5
    assert "1 of 4 rows are bad and were skipped" in done.output


def test_strict_passes_clean_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Notes do not make `--strict` fail."""
    write_rows(folder / "rows.jsonl", [{"prompt": f"q {i}", "completion": "a"} for i in range(9)])
    done = run_here(capsys, "lora", "data", "recipe.yaml", "--strict")
    assert done.code == 0, done.errors
    assert "note" in done.output


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_report_fits_its_terminal(folder: Path, base: Path, width: int, encoding: str) -> None:
    """No line is wider than the terminal, pairs and long tokens included, and an ASCII terminal gets ASCII."""
    content = [{"prompt": "what " * 30, "chosen": "x" * 90, "rejected": "é\n" * 20}] * 3
    said = describe(base, f"data.train={write_rows(folder / 'pairs.jsonl', content)}", show=1)
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=stream, width=width, markup=False, highlight=False)
    for part in data_report.report({"recipe": "r.yaml", **said}, width, ascii_only=encoding == "ascii"):
        console.print(part)
    stream.flush()
    text = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    assert "chosen: " in text
    assert "rejected: " in text


def test_colours_tell_trained_tokens_on_a_terminal(folder: Path, base: Path) -> None:
    """On a terminal a trained token is bold and green, an untrained one is dim."""
    said = describe(base, f"data.train={write_rows(folder / 'rows.jsonl', rows(2))}", show=1)
    stream = io.StringIO()
    console = Console(
        file=stream, width=120, force_terminal=True, color_system="standard", markup=False, highlight=False
    )
    for part in data_report.report({"recipe": "r.yaml", **said}, 120, ascii_only=False):
        console.print(part)
    token = next(token for token in said["rows"][0]["sides"][0]["tokens"] if token["trained"])
    assert f"\x1b[1;32m[{token['text']}\x1b[0m" in stream.getvalue()
    assert "\x1b[2muser\x1b[0m" in stream.getvalue()


def test_a_page_of_pairs_is_well_formed(folder: Path, base: Path) -> None:
    """Pairs, missing held-out rows and an absent epoch make a page too."""
    content = [{"prompt": "<q>", "chosen": "<&a>", "rejected": "]]>"}]
    said = describe(base, f"data.train={write_rows(folder / 'pairs.jsonl', content)}", show=1)
    root = ElementTree.fromstring(data_page.render({"recipe": "a&b.yaml", **said}))
    assert "Data of a&b.yaml" in "".join(root.itertext())
    assert len([one for one in root.iter("div") if one.get("class") == "tokens"]) == 2


def test_ctrl_c_leaves_nothing(folder: Path) -> None:
    """SIGINT while rows are tokenized ends with 130, without a traceback, a page or a piece of a cache."""
    write_rows(folder / "rows.jsonl", rows(16) * 5_000)
    cache = folder.parent / "cache"
    code = "import sys; from lora_cli.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "data", "recipe.yaml", "--html", "page.html"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 60
    while not list(cache.rglob("tokens.bin")) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert output == ""
    assert not [one for one in cache.rglob("*") if one.is_file()]
    assert not list(folder.glob("*.html"))


@pytest.mark.parametrize(("option", "code"), [("--show=3", 0), ("--json", 0), ("--strict", 5)])
def test_a_closed_pipe_ends_quietly(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, code: int
) -> None:
    """Whoever stops reading, as `| head` does, gets no complaint, and the exit code stays what it is."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        assert main(["data", "recipe.yaml", option]) == code
        monkeypatch.undo()
    told = capsys.readouterr().err
    assert "error" not in told or code
    assert "fault" not in told
