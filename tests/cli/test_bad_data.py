"""Bad data on the command line: exit 2, one line with file and line, soon, no traceback, no cache left behind.

Rows are spoilt near the head of a file, which is looked at before torch is imported, and beyond it, where the prepare
stage finds them. Further faults of files are in tests/data/test_read.py (55), of rows in tests/data/test_formats.py,
test_messages.py and test_preferences.py (90), of the stage in tests/stages/test_prepare.py.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import run_here, run_process, snapshot

pytestmark = pytest.mark.reliability("malformed")
RECIPE = "model: {base: tiny}\ndata: {train: DATA}\nrun: {output: out, device: cpu}\n"
GOOD = b'{"prompt": "a", "completion": "b"}\n'
U, A, T = ({"role": role, "content": "x"} for role in ("user", "assistant", "tool"))


def chat(*turns: Any, **more: Any) -> bytes:
    return json.dumps({"messages": list(turns), **more}).encode()


def pair(**values: Any) -> bytes:
    return json.dumps({"prompt": "a", "completion": "b", **values}).encode()


def call(**function: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}


DEEP: Any = "x"
for _ in range(300):
    DEEP = [DEEP]
LINES: dict[str, tuple[bytes, str]] = {
    "open brace": (b"{", "invalid JSON"),
    "single quotes": (b"{'prompt': 'a'}", "invalid JSON"),
    "cut": (b'{"prompt": "a", "compl', "invalid JSON"),
    "two objects": (GOOD.strip() * 2, "invalid JSON: Extra data"),
    "control character": (b'{"prompt": "a\x01", "completion": "b"}', "invalid JSON: Invalid control"),
    "array": (b'["a"]', "the row is an array"),
    "number": (b"7", "the row is a number"),
    "boolean": (b"true", "the row is a boolean"),
    "text": (b'"a"', "the row is a string"),
    "null": (b"null", "the row is null"),
    "NaN": (b'{"prompt": "a", "completion": NaN}', "NaN is not valid JSON"),
    "Infinity": (b'{"prompt": "a", "n": [-Infinity]}', "-Infinity is not valid JSON"),
    "key twice": (b'{"prompt": "a", "prompt": "b", "completion": "c"}', "key 'prompt' occurs twice"),
    "key twice within": (
        b'{"prompt": "a", "completion": "b", "m": {"x": 1, "x": 2}}',
        "key 'x' occurs twice",
    ),
    "nesting": (b'{"prompt": ' + b"[" * 100_000, "invalid JSON"),
    "huge integer": (b'{"prompt": ' + b"1" * 5000 + b"}", "invalid JSON"),
    "latin-1": (b'{"prompt": "\xe9", "completion": "b"}', "not UTF-8: byte 0xe9 at byte 13"),
    "NUL": (b'{"prompt": "\0"}', "NUL byte"),
    "missing column": (b'{"prompt": "a", "completions": "b"}', "did you mean 'completions'?"),
    "another format": (b'{"text": "a"}', "column 'prompt' is missing (found: text)"),
    "no column": (b"{}", "column 'prompt' is missing (found: none)"),
    "null for text": (pair(completion=None), "completion is null"),
    "number for text": (pair(completion=7), "completion is int"),
    "float for text": (pair(prompt=7.5), "prompt is float"),
    "boolean for text": (pair(prompt=True), "prompt is bool"),
    "object for text": (pair(prompt={"a": 1}), "prompt is dict"),
    "list for text": (pair(completion=["b"]), "one of prompt and completion is a list"),
    "empty prompt": (pair(prompt=""), "prompt is empty"),
    "blank completion": (pair(completion=" \n"), "completion is empty"),
    "surrogate": (pair(completion="b\ud800"), "completion holds half a surrogate pair (U+D800)"),
    "a name that is no text": (b'{"prompt": "a", "\\ud800\\n": 1}', "column 'completion' is missing"),
    "picture": (pair(images=["x.png"]), "column 'images' is not supported"),
    "tools": (pair(tools="[{"), "tools is not valid JSON"),
}
CHATS: dict[str, tuple[bytes, str]] = {
    "no list": (chat() .replace(b"[]", b'"hi"'), "messages is str"),
    "no turns": (chat(), "no assistant turn"),
    "no answer": (chat(U), "no assistant turn"),
    "a turn is text": (chat(U, "hi"), "messages[1] is str"),
    "no role": (chat({"content": "x"}, A), "messages[0].role is missing"),
    "unknown role": (chat({"role": "ghost", "content": "x"}, A), "messages[0].role is 'ghost'"),
    "long role": (chat({"role": "g" * 10**6, "content": "x"}, A), "messages[0].role is 'ggg"),
    "no content": (chat({"role": "user"}, A), "messages[0].content is missing"),
    "null content": (chat(U, {**A, "content": None}), "messages[1].content is null"),
    "picture part": (chat({**U, "content": [{"type": "image_url"}]}, A), "messages[0].content[0] is image_url"),
    "answer first": (chat(A, U, A), "messages[0]: role assistant comes first"),
    "two questions": (chat(U, U, A), "messages[1]: role user follows user"),
    "question last": (chat(U, A, U), "the last turn is user's"),
    "late system": (chat(U, A, {"role": "system", "content": "x"}), "role system follows assistant"),
    "no call": (chat(U, call(arguments={}), T, A), "messages[1].tool_calls[0] is no call"),
    "arguments cut": (chat(U, call(name="f", arguments="{"), T, A), "arguments is not valid JSON"),
    "arguments with a surrogate": (
        chat(U, call(name="f", arguments={"\ud800": 1}), T, A),
        "arguments holds half a surrogate pair (U+D800)",
    ),
    "deep arguments": (chat(U, call(name="f", arguments={"a": DEEP}), T, A), "is nested deeper than 64 levels"),
    "deep tools": (chat(U, A, tools=[{"name": "f", "parameters": {"a": DEEP}}]), "is nested deeper than 64"),
    "user calls": (chat({**U, **call(name="f"), "role": "user"}, A), "user calls a function"),
    "weight": (chat(U, {**A, "weight": 2}), "messages[1].weight is 2"),
}  # fmt: skip


def parquet(cut: int | None = None) -> bytes:
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({"prompt": ["a"] * 9, "completion": ["b"] * 9}), buffer)
    return buffer.getvalue().to_pybytes()[:cut]


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("rows.jsonl", GOOD)
    return buffer.getvalue()


def bomb(unit: bytes, mebibytes: int = 128) -> bytes:
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=6) as file:
        for _ in range(mebibytes):
            file.write(unit * (2**20 // len(unit)))
    return buffer.getvalue()


CUT = "the array is not closed, or a comma is missing or too many"
FILES: dict[str, tuple[str, bytes | Callable[[], bytes], str]] = {
    "empty": ("a.jsonl", b"", "a.jsonl: the file is empty"),
    "blank lines": ("a.jsonl", b"\n \r\n", "a.jsonl: holds no rows"),
    "mark alone": ("a.jsonl", b"\xef\xbb\xbf", "a.jsonl: holds no rows"),
    "UTF-16": ("a.jsonl", GOOD.decode().encode("utf-16"), "a.jsonl: is UTF-16 text"),
    "array in lines": ("a.jsonl", b"[" + GOOD, "a.jsonl:1: begins a JSON array"),
    "lines in an array": ("a.json", GOOD * 2, "a.json:1: not a JSON array"),
    "open array": ("a.json", b"[" + GOOD, f"a.json:2: invalid JSON: {CUT}"),
    "array without a comma": ("a.json", b"[" + GOOD * 2 + b"]", f"a.json:2: invalid JSON: {CUT}"),
    "NaN in an array": ("a.json", b"[" + GOOD + b',{"prompt": NaN}]', "a.json:2: NaN is not valid JSON"),
    "empty array": ("a.json", b"[]", "a.json: holds no rows"),
    "ragged row": ("a.csv", b"prompt,completion\na,b\na,b,c\n", "a.csv:3: 3 cells, the header has 2"),
    "short row": ("a.csv", b"prompt,completion\na\n", "a.csv:2: 1 cells, the header has 2"),
    "open quote": ("a.csv", b'prompt,completion\na,"b\nc', "a.csv:2: invalid CSV"),
    "column twice": ("a.csv", b"prompt,prompt\na,b\n", "a.csv:1: column 'prompt' occurs twice"),
    "latin-1 header": ("a.csv", b"pr\xe9nom,prompt\na,b\nc,d\n", "a.csv:1: not UTF-8"),
    "header alone": ("a.csv", b"prompt,completion\n", "a.csv: holds no rows"),
    "gzip as lines": ("a.jsonl", gzip.compress(GOOD), "a.jsonl: is a gzip archive"),
    "zip as lines": ("a.jsonl", zipped, "a.jsonl: is a zip archive"),
    "lines as gzip": ("a.jsonl.gz", GOOD, "a.jsonl.gz: damaged gzip file"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(GOOD * 90)[:-9], "a.jsonl.gz: damaged gzip file: Truncated"),
    "gzip with a wrong sum": (
        "a.jsonl.gz", gzip.compress(GOOD)[:-8] + b"\0" * 8, "a.jsonl.gz: damaged gzip file: zlib inflate failed"
    ),
    "cut zstandard": (
        "a.jsonl.zst", lambda: pa.compress(GOOD * 90, codec="zstd", asbytes=True)[:-4], "a.jsonl.zst: damaged zstd"
    ),
    "bomb of blank lines": ("a.jsonl.gz", lambda: bomb(b"\n"), "a.jsonl.gz: unpacks to more than 200 times"),
    "bomb of zeros": ("a.csv.gz", lambda: bomb(b"\0"), "a.csv.gz: unpacks to more than 200 times"),
    "bomb of rows": ("a.jsonl.gz", lambda: bomb(GOOD), "a.jsonl.gz: unpacks to more than 200 times"),
    "bomb of white space": ("a.json.gz", lambda: bomb(b" "), "a.json.gz: unpacks to more than 200 times"),
    "parquet cut": ("a.parquet", parquet(-20), "a.parquet: damaged parquet file after row 0"),
    "lines as parquet": ("a.parquet", GOOD, "a.parquet: not a parquet file"),
    "parquet as lines": ("a.jsonl", parquet, "a.jsonl: is a parquet file"),
    "LFS pointer": ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "a.jsonl: is a Git LFS pointer"),
    "line of 10^8": ("a.jsonl", lambda: b'{"prompt": "' + b"x" * 10**8, "a.jsonl:1: the line is longer than 64 MiB"),
    "value of 10^8": ("a.json", lambda: b'[{"prompt": "' + b"x" * 10**8, "a.json:1: invalid JSON: Unterminated"),
    "unknown ending": ("a.xlsx", b"x", "data.train: ./a.xlsx: unknown file type '.xlsx'"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a token cache of its own in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    return tmp_path


def _seconds() -> float:
    """Return the processor's time of this process and those it has waited for: others' load is not in it."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def refused(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    data: str,
    message: str,
    *more: str,
    process: bool = False,
    seconds: float = 5.0,
) -> str:
    """Run the command, check everything that a refusal promises, and return what it says."""
    (folder / "r.yaml").write_text(RECIPE.replace("DATA", data))
    (folder / "cache" / "tokens").mkdir(parents=True, exist_ok=True)
    before = set(snapshot(folder))
    began = _seconds()
    ran = (
        run_process(folder, "train", "r.yaml", *more)
        if process
        else run_here(capsys, "train", "r.yaml", *more)
    )
    took = _seconds() - began
    assert ran.code == 2, ran.errors
    (line,) = ran.errors.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert len(line) < 1000
    assert set(snapshot(folder)) == before
    assert took < seconds
    return ran.errors


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """A file that is no sound file of rows is refused in one line that names it."""
    file, content, message = FILES[name]
    (folder / file).write_bytes(content() if callable(content) else content)
    process = name in ("cut gzip", "bomb of blank lines", "line of 10^8")
    refused(folder, capsys, f"./{file}", message, process=process)


BAD = [("prompt_completion", name) for name in LINES] + [("chat", name) for name in CHATS]


@pytest.mark.parametrize(("form", "name"), BAD)
@pytest.mark.parametrize("line", [3, 70])
def test_a_bad_row(folder: Path, capsys: pytest.CaptureFixture[str], form: str, name: str, line: int) -> None:
    """A row that cannot be used is refused in one line that begins with its file and line, wherever it stands."""
    bad, message = (LINES if form == "prompt_completion" else CHATS)[name]
    good = GOOD.strip() if form == "prompt_completion" else chat(U, A)
    rows = [good] * 80
    rows[line - 1] = bad
    (folder / "rows.jsonl").write_bytes(b"\n".join(rows))
    place = f"error: rows.jsonl:{line}: "
    errors = refused(folder, capsys, "rows.jsonl", message, f"data.format={form}")
    assert errors.startswith(place)


def test_a_bad_row_in_a_process_of_its_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command as users start it refuses a row beyond the head in the same way."""
    # Importing torch takes most of the time, three seconds on a free core, and as many more as others use it.
    (folder / "rows.jsonl").write_bytes(GOOD * 69 + pair(prompt=7) + b"\n")
    refused(folder, capsys, "rows.jsonl", "rows.jsonl:70: prompt is int", process=True, seconds=60.0)


def test_paths_that_hold_no_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pipes, broken links, folders without rows, an empty file among good ones and the same file twice are refused."""
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "gone.jsonl").symlink_to("nowhere")
    (folder / "none").mkdir()
    for name, content in (("a", GOOD), ("b", b""), ("c", GOOD)):
        (folder / "shards").mkdir(exist_ok=True)
        (folder / "shards" / f"{name}.jsonl").write_bytes(content)
    cases = {
        "./pipe.jsonl": "pipe.jsonl is not a regular file",
        "./gone.jsonl": "gone.jsonl is a broken symbolic link",
        "./none": "none is a folder without rows",
        "./*.jsonl": "gone.jsonl is a broken symbolic link",
        "./no*.jsonl": "no file matches this pattern",
        "./shards": "shards/b.jsonl: the file is empty",
        "[shards/a.jsonl, ./shards/*.jsonl]": "shards/a.jsonl is named twice",
        "./shrads": "no such file (did you mean shards?)",
        "http://example.org/a.jsonl": "no such file",
    }
    for data, message in cases.items():
        refused(folder, capsys, data, message)


def test_rows_that_cannot_be_used(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sound rows of which none fits, or whose type differs at line 10,000, are refused with the reason."""
    (folder / "a.jsonl").write_bytes(GOOD * 3)
    (folder / "long.jsonl").write_bytes(pair(completion="word " * 300) + b"\n")
    refused(
        folder, capsys, "a.jsonl", "none of 3 rows can be used with data.max_length 8", "data.max_length=8"
    )
    fills = ("data.max_length=8", "data.overlong=truncate_right")
    refused(folder, capsys, "a.jsonl", "the longest has 12 tokens (raise it)", *fills)
    limit = ("data.max_length=64", "data.overlong=error")
    refused(folder, capsys, "long.jsonl", "long.jsonl:1: ", *limit)
    (folder / "b.jsonl").write_bytes(GOOD * 9999 + pair(prompt=3) + b"\n")
    refused(folder, capsys, "b.jsonl", "b.jsonl:10000: prompt is int (text is needed)")
    (folder / "r.yaml").write_text(RECIPE.replace("DATA", "a.jsonl"))
    ran = run_here(capsys, "train", "r.yaml", "data.eval_rows=5")  # the cache of these sound rows may stay
    assert (ran.code, ran.errors.partition("(")[0]) == (
        2,
        "error: data.eval_rows: leaves 3 rows to evaluate and 0 to train ",
    )
    (folder / "c.jsonl").write_bytes(b'{"chosen": "a", "rejected": "b", "prompt": "q"}\n')
    refused(folder, capsys, "c.jsonl", "its rows are preference pairs")
    (folder / "d.jsonl").write_bytes(b'{"question": "a", "answer": "b"}\n')
    refused(folder, capsys, "d.jsonl", "d.jsonl:1: no format fits", process=True)
