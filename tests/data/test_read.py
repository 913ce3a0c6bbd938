"""Files as users have them: sound ones are read with their lines, damaged ones named by file and line."""

from __future__ import annotations

import gzip
import json
import os
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_cli.data import hub, lines, read
from lora_cli.data.faults import Faults
from lora_cli.data.head import check_head
from lora_cli.data.hub import load_hub
from lora_cli.errors import InputError
from lora_cli.recipe.schema import Data

GOOD = '{"text": "a"}'


def rows_of(path: Path) -> list[read.RawRow]:
    faults = Faults(str(path))
    rows = list(read.find_sources(str(path), "data.train", "train")[0].rows(faults))
    faults.raise_if_any()
    return rows


SOUND = {
    "plain": ("a.jsonl", b'{"text": "a"}\n{"text": "b"}\n', [1, 2]),
    "no final newline": ("a.jsonl", b'{"text": "a"}\n{"text": "b"}', [1, 2]),
    "CRLF": ("a.jsonl", b'{"text": "a"}\r\n{"text": "b"}\r\n', [1, 2]),
    "byte order mark": ("a.jsonl", b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n', [1, 2]),
    "blank lines": ("a.jsonl", b'\n{"text": "a"}\n  \n{"text": "b"}\n\n', [2, 4]),
    "upper-case ending": ("a.JSONL", b'{"text": "a"}\n{"text": "b"}\n', [1, 2]),
    "array": ("a.json", b'[{"text": "a"}, {"text": "b"}]', [1, 1]),
    "array over lines": ("a.json", b'[\n {\n  "text": "a"\n },\n\n {"text": "b"}\n]\n', [2, 6]),
    "array with a mark": ("a.json", b'\xef\xbb\xbf[{"text": "a"},\r\n{"text": "b"}]', [1, 2]),
    "csv": ("a.csv", b"text\na\nb\n", [2, 3]),
    "csv with quotes": ("a.csv", b'text,n\r\n"a",1\r\n"b",2\r\n', [2, 3]),
    "csv with a mark": ("a.csv", b"\xef\xbb\xbftext\na\nb\n", [2, 3]),
    "csv with a blank line": ("a.csv", b"text\n\na\nb\n", [3, 4]),
    "text": ("a.txt", b"a\n\nb", [1, 3]),
}


@pytest.mark.parametrize("name", list(SOUND))
def test_sound_files(tmp_path, name):
    """Each row is read with the line it begins on, whatever the line endings, marks and blank lines."""
    file, content, lines = SOUND[name]
    (tmp_path / file).write_bytes(content)
    rows = rows_of(tmp_path / file)
    assert [row.values["text"] for row in rows] == ["a", "b"]
    assert [row.number for row in rows] == lines
    assert [row.where for row in rows] == [f"{tmp_path / file}:{line}" for line in lines]


def test_csv_rows_over_several_lines(tmp_path):
    """A quoted cell may hold line breaks; the row's line is its first."""
    (tmp_path / "a.csv").write_text('text\n"a\nb"\nc\n')
    assert [(row.values["text"], row.number) for row in rows_of(tmp_path / "a.csv")] == [
        ("a\nb", 2),
        ("c", 4),
    ]


def test_parquet(tmp_path):
    """Parquet rows are named by their row number."""
    pq.write_table(pa.table({"text": ["a", "b"], "n": [1, None]}), tmp_path / "a.parquet")
    rows = rows_of(tmp_path / "a.parquet")
    assert [row.values for row in rows] == [{"text": "a", "n": 1}, {"text": "b", "n": None}]
    assert rows[1].where.endswith("a.parquet: row 2")


def _parquet() -> bytes:
    buffer = pa.BufferOutputStream()
    table = pa.table({"text": ["a" * 50, "b"] * 5})
    pq.write_table(table, buffer, compression="none", use_dictionary=False)  # so that damage reaches the text
    return buffer.getvalue().to_pybytes()


_PARQUET = _parquet()


def _zip() -> bytes:
    import io

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jsonl", GOOD)
    return buffer.getvalue()


FAULTS: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.jsonl", b"", "the file is empty"),
    "empty csv": ("a.csv", b"", "the file is empty"),
    "empty parquet": ("a.parquet", b"", "the file is empty"),
    "blank lines only": ("a.jsonl", b"\n \n\r\n", "holds no rows"),
    "blank text": ("a.txt", b"\n \n", "holds no rows"),
    "mark only": ("a.jsonl", b"\xef\xbb\xbf", "holds no rows"),
    "empty array": ("a.json", b"[]", "holds no rows"),
    "header only": ("a.csv", b"text\n", "holds no rows"),
    "not UTF-8": (
        "a.jsonl",
        GOOD.encode() + b'\n{"text": "\xe9t\xe9"}\n',
        ":2: not UTF-8: byte 0xe9 at byte 11",
    ),
    "latin-1 csv": ("a.csv", b"text\ncaf\xe9\n", ":2: not UTF-8"),
    "latin-1 text": ("a.txt", b"ok\ncaf\xe9\n", ":2: not UTF-8"),
    "latin-1 array": ("a.json", b'[{"text":\n"caf\xe9"}]', ":2: not UTF-8"),
    "UTF-16": ("a.jsonl", GOOD.encode("utf-16"), "UTF-16 text (save it as UTF-8)"),
    "UTF-16 big-endian": ("a.txt", b"\xfe\xff\0a", "UTF-16 text"),
    "NUL byte": ("a.jsonl", GOOD.encode() + b"\n{\0}\n", ":2: NUL byte"),
    "sparse file": ("a.jsonl", b"\0" * 100, ":1: NUL byte"),
    "invalid JSON": ("a.jsonl", f"{GOOD}\n\n{{'text': 'a'}}\n".encode(), ":3: invalid JSON"),
    "cut line": ("a.jsonl", f'{GOOD}\n{{"text": "a'.encode(), ":2: invalid JSON"),
    "two objects on a line": ("a.jsonl", f"{GOOD} {GOOD}\n".encode(), ":1: invalid JSON: Extra data"),
    "array in lines": ("a.jsonl", b'[\n{"text": "a"}\n]\n', ":1: begins a JSON array (name the file .json"),
    "deep nesting": ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", ":1: invalid JSON"),
    "huge integer": ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}\n", ":1: invalid JSON"),
    "row is a list": ("a.jsonl", f"{GOOD}\n[1]\n".encode(), ":2: the row is an array"),
    "row is a number": ("a.jsonl", f"{GOOD}\n7\n".encode(), ":2: the row is a number"),
    "row is null": ("a.jsonl", f"{GOOD}\nnull\n".encode(), ":2: the row is null"),
    "row is a string": ("a.json", b'[{"text": "a"},\n"b"]', ":2: the row is a string"),
    "NaN": ("a.jsonl", b'{"text": NaN}\n', ":1: NaN is not valid JSON"),
    "Infinity": ("a.jsonl", b'{"text": [-Infinity]}\n', ":1: -Infinity is not valid JSON"),
    "NaN in an array": ("a.json", b'[{"text": "a"},\n{"text": "b", "n": NaN}]', ":2: NaN is not valid JSON"),
    "duplicate key": ("a.jsonl", b'{"text": "a", "text": "b"}\n', ":1: key 'text' occurs twice"),
    "nested duplicate": ("a.jsonl", b'{"m": {"b": 1, "b": 2}}\n', ":1: key 'b' occurs twice"),
    "lines in .json": ("a.json", f"{GOOD}\n{GOOD}\n".encode(), ":1: not a JSON array"),
    "object in .json": ("a.json", b'{"data": []}', ":1: not a JSON array"),
    "open array": (
        "a.json",
        b'[{"text": "a"},\n{"text": "b"}\n',
        ":3: invalid JSON: the array is not closed",
    ),
    "trailing comma": ("a.json", b'[{"text": "a"},\n]', ":2: invalid JSON"),
    "missing comma": ("a.json", b'[{"text": "a"}\n{"text": "b"}]', ":2: invalid JSON"),
    "text after array": ("a.json", b'[{"text": "a"}]\nx', ":2: invalid JSON: text after the end"),
    "syntax in array": ("a.json", b'[{"text": "a"},\n{"text": }]', ":2: invalid JSON"),
    "long row": ("a.csv", b"text,n\na,1\nb,2,3\n", ":3: 3 cells, the header has 2"),
    "short row": ("a.csv", b"text,n\na\n", ":2: 1 cells, the header has 2"),
    "open quote": ("a.csv", b'text\na\n"b\n', ":3: invalid CSV"),
    "doubled column": ("a.csv", b"text,text\na,b\n", ":1: column 'text' occurs twice"),
    "gzip": ("a.jsonl", gzip.compress(GOOD.encode()), "a gzip archive"),
    "gzipped csv": ("a.csv", gzip.compress(b"text\na\n"), "a gzip archive"),
    "zip": ("a.jsonl", _zip(), "a zip archive"),
    "parquet as lines": ("a.jsonl", b"PAR1xxxx", "a parquet file (name it .parquet)"),
    "LFS pointer": ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    "cut parquet": ("a.parquet", _PARQUET[: len(_PARQUET) // 2], "damaged parquet file after row 0"),
    "lines as parquet": ("a.parquet", GOOD.encode(), "not a parquet file"),
    "unknown type": ("a.yaml", b"text: a\n", "unknown file type '.yaml'"),
    "no type": ("a", b"text\n", "unknown file type ''"),
}


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_fault_is_named_by_file_and_line(tmp_path, name):
    """Each damaged file gives one InputError with the file, the line if there is one, and what is wrong."""
    file, content, message = FAULTS[name]
    path = tmp_path / file
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        rows_of(path)
    expected = f"{path}{message}" if message.startswith(":") else message
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(caught.value.lines) == 1
    with pytest.raises(InputError):
        check_head(Data(train=str(path)), "train")


FRAGMENTS = [
    "{",
    "}",
    "[",
    "]",
    '"',
    ":",
    ",",
    "\n",
    "\r",
    "text",
    '{"text": "a"}',
    "1",
    "null",
    "NaN",
    "PAR1",
    "é",
    "\0",
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt", ".parquet"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=60)
    | st.lists(st.sampled_from(FRAGMENTS), max_size=25).map(lambda parts: "".join(parts).encode())
    | st.integers(0, len(_PARQUET) - 1).map(lambda place: _PARQUET[:place] + b"\xff" + _PARQUET[place + 1 :])
)
def test_any_bytes_give_rows_or_an_input_error(tmp_path, suffix, content):
    """No content makes a reader fail otherwise than by an InputError that names the file."""
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    for look in (rows_of, lambda path: check_head(Data(train=str(path)), "train")):
        said = str(path)
        try:
            look(path)
        except InputError as fault:
            said = str(fault)
        assert str(path) in said


def test_paths_that_are_no_files(tmp_path):
    """Folder, missing file, broken link and pipe are refused without being opened."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README").write_text("no rows")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "gone.jsonl")
    for name, message in {
        "notes": "is a folder without rows",
        "": "link.jsonl is a broken symbolic link",
        "*.jsonl": "link.jsonl is a broken symbolic link",
        "p*.jsonl": "pipe.jsonl is not a regular file",
        "missing.jsonl": "no such file",
        "link.jsonl": "broken symbolic link",
        "pipe.jsonl": "not a regular file",
    }.items():
        with pytest.raises(InputError, match=message):
            read.find_sources(str(tmp_path / name), "data.train", "train")


@pytest.mark.parametrize(
    "name", ["json", "csv", "parquet", "imagefolder", "gsm8k", "./a/b", "../a", "/a/b", "a/b/c", "a//b"]
)
def test_names_that_are_neither_file_nor_hub_id(name):
    """A builder's name, a bare name or a missing path never reaches the datasets library."""
    with pytest.raises(InputError, match="no such file"):
        read.find_sources(name, "data.train", "train")


def test_hub_ids():
    """owner/name, with or without a configuration, is a hub id; it is not checked ahead."""
    for name in ("openai/gsm8k", "openai/gsm8k:main", "a-b/c.d_e"):
        (source,) = read.find_sources(name, "data.train", "train")
        assert (source.path, source.name) == (None, name)
    assert check_head(Data(eval="openai/gsm8k:main"), "eval")[0].endswith("not checked")


def test_hub_rows_come_from_the_split(monkeypatch):
    """Hub rows are read from the split and configuration that were named, and are numbered."""
    import datasets

    calls = []

    def load(*arguments: object, **named: object) -> datasets.Dataset:
        calls.append((arguments, named))
        return datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hub, "_reader_of", lambda *_: "json")
    load_hub.cache_clear()
    rows = list(read.find_sources("owner/name:main", "data.train", "validation")[0].rows(Faults("x")))
    assert calls == [(("owner/name", "main"), {"split": "validation", "revision": None})]
    assert [row.where for row in rows] == ["owner/name:main: row 1", "owner/name:main: row 2"]
    load_hub.cache_clear()


def test_hub_faults_are_input_errors(monkeypatch):
    """A missing data set or split gives one line that names it."""
    import datasets

    def load(*_: object, **__: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist\ndetails")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hub, "_reader_of", lambda *_: "json")
    load_hub.cache_clear()
    with pytest.raises(
        InputError, match=r"owner/name: the hub data set cannot be loaded \(split train\)"
    ) as caught:
        list(read.find_sources("owner/name", "data.train", "train")[0].rows(Faults("x")))
    assert "details" not in str(caught.value)


def test_the_first_five_bad_rows_and_the_total(tmp_path):
    """Twelve bad lines of twenty give five lines and the total, all in one error."""
    written = [GOOD if number > 12 else "{" for number in range(1, 21)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(written))
    with pytest.raises(InputError) as caught:
        rows_of(path)
    assert [line.split(": ")[0] for line in caught.value.lines[:5]] == [f"{path}:{n}" for n in range(1, 6)]
    assert caught.value.lines[5:] == [f"{path}: 12 bad rows in all, the first 5 are above"]


def test_an_unreadable_file(tmp_path):
    """A file that may not be read is named with the system's reason."""
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read every file")
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        rows_of(path)


def test_long_lines(tmp_path, monkeypatch):
    """A line of a million characters is a row; one beyond the limit is refused before it is read whole."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a" * 10**6}) + "\n")
    assert len(rows_of(path)[0].values["text"]) == 10**6
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 2**20 // 2)
    with pytest.raises(InputError, match=r":1: the line is longer than 0 MiB"):
        rows_of(path)


def test_reading_streams(tmp_path):
    """Rows come one by one: a fault at the end does not keep the first rows back."""
    path = tmp_path / "a.jsonl"
    path.write_text(f"{GOOD}\n" * 3 + "{")
    faults = Faults(str(path))
    iterator = read.find_sources(str(path), "data.train", "train")[0].rows(faults)
    assert next(iterator).number == 1
    assert faults.count == 0


def test_local_files_do_not_import_the_slow_libraries(tmp_path):
    """Checking the head of a local file imports neither torch, nor transformers, nor datasets."""
    import subprocess
    import sys

    path = tmp_path / "a.jsonl"
    path.write_text(GOOD)
    code = (
        "import sys\nfrom lora_cli.data.head import check_head\nfrom lora_cli.recipe.schema import Data\n"
        f"print(check_head(Data(train={str(path)!r}), 'train'))\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == ["['data.train: a.jsonl: text, first row ok']", "[]"]
