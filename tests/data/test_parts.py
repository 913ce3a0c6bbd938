"""Large files in parts: the same rows and lines, and what becomes of them when a process is killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prepared_rows import lines_of, places, run, texts, write

from lora_cli.data import processes, tokenize
from lora_cli.errors import InputError, ResourceError

np = pytest.importorskip("numpy")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Each test has its own cache folder, in which no hidden folder may be left, and a process for each core."""
    monkeypatch.setattr(processes, "CORES", 1)
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "tokens"
    assert not list((tmp_path / "cache" / "tokens").glob(".*"))


@pytest.fixture
def tokenizer(make_tokenizer: Any) -> Any:
    """A tokenizer with a ChatML template."""
    return make_tokenizer("chatml")


def test_bad_rows_of_a_cached_part_are_named_where_they_stand_now(tmp_path, tokenizer, monkeypatch):
    """Equal content further down in another file is read from the cache, and its bad row has its own file and line."""
    monkeypatch.setattr(tokenize, "PART_BYTES", 500)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    good = lines_of([f"row {number:04}" for number in range(100)]).splitlines(keepends=True)
    head, bad = [line.replace(b"row", b"top") for line in good], [*good[:5], b'{"text": 1}\n', *good[5:]]
    how = {"on_bad_row": "skip", "max_bad_rows": 0.5}
    (tmp_path / "a.jsonl").write_bytes(b"".join(bad))
    assert (
        f"first: {tmp_path / 'a.jsonl'}:6: text is int"
        in run(tokenizer, train=str(tmp_path / "a.jsonl"), **how)[1][0]
    )
    # Parts end at the first line break after 500 bytes: whole parts before keep the borders where they were.
    size = len(head[0])
    before = head[: 2 * -(-500 // size)] if 500 % size else head[: 2 * (500 // size + 1)]
    (tmp_path / "b.jsonl").write_bytes(b"".join(before + bad))
    counted = _count_runs(monkeypatch)
    said = run(tokenizer, train=str(tmp_path / "b.jsonl"), **how)[1]
    assert f"first: {tmp_path / 'b.jsonl'}:{len(before) + 6}: text is int" in said[0]
    assert len(counted) == 2


def _count_runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that grows by a part each time one is tokenized in this process."""
    counted: list[Any] = []
    original = tokenize.Tokenization.run

    def counting(self: Any, task: Any) -> Any:
        counted.append(task.part)
        return original(self, task)

    monkeypatch.setattr(tokenize.Tokenization, "run", counting)
    return counted


def test_parts_have_the_rows_and_lines_of_the_whole(tmp_path, tokenizer, monkeypatch):
    """A file cut into parts, with blank lines, CRLF, a mark and no last line break, is read as in one piece."""
    rows = [f"row {number} " + "x" * (number % 37) for number in range(60)]
    parts = [
        json.dumps({"text": row}) + ("\r\n" if number % 3 else "\n\n") for number, row in enumerate(rows)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "".join(parts).rstrip().encode())
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    whole = run(tokenizer, train=str(path))[0].train
    for size in (1, 300, 777, 2048):
        monkeypatch.setattr(tokenize, "PART_BYTES", size)
        cut = run(tokenizer, train=str(path))[0].train
        assert texts(tokenizer, cut) == texts(tokenizer, whole) == rows
        assert places(cut) == places(whole)
    path.write_bytes(path.read_bytes().replace(b"row 50 ", b"row \xff "))
    with pytest.raises(InputError) as caught:
        run(tokenizer, train=str(path))
    wanted = places(whole)[50]
    assert caught.value.lines == [
        f"{wanted}: not UTF-8: byte 0xff at byte 15 of the line (save the file as UTF-8)"
    ]


def test_growth_is_tokenized_alone(tmp_path, tokenizer, monkeypatch):
    """Appended rows cost the last part and the new ones; a changed row costs the part it is in."""
    monkeypatch.setattr(tokenize, "PART_BYTES", 1000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    rows = [f"row {number:04}" for number in range(300)]
    counted = _count_runs(monkeypatch)
    path = write(tmp_path / "rows.jsonl", rows)
    run(tokenizer, train=path)
    parts = len(counted)
    assert parts >= 6
    counted.clear()
    write(tmp_path / "rows.jsonl", [*rows, "one more"])
    assert texts(tokenizer, run(tokenizer, train=path)[0].train)[-1] == "one more"
    assert len(counted) <= 2
    counted.clear()
    rows[150] = "row XXXX"
    write(tmp_path / "rows.jsonl", [*rows, "one more"])
    run(tokenizer, train=path)
    assert len(counted) == 1


SCRIPT = """
import os, sys
class Alone:
    def in_main(self, work): work()
if __name__ == "__main__":
    from lora_cli.data import processes, tokenize
    from lora_cli.models.load import load_tokenizer
    from lora_cli.models.safety import TINY
    from lora_cli.recipe.schema import Data
    from lora_cli.stages import prepare
    processes.CORES = 1
    tokenize.PART_BYTES = int(sys.argv[2])
    if sys.argv[3] == "one": os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    prepare.run(Data(train=sys.argv[1]), "assistant", load_tokenizer(TINY), Alone(), print)
"""


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a preparation as a process of its own; workers find the script as a file."""
    (folder / "script.py").write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(folder / "script.py"), *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until(condition: Any, seconds: float = 60) -> None:
    """Wait for a condition, which must come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the test keeps the process on one core")
def test_a_killed_preparation_goes_on_where_it_stood(tmp_path, cache, monkeypatch):
    """After SIGKILL in the middle, the parts that were done are kept, and the end is that of an undisturbed one."""
    from lora_cli.models.load import load_tokenizer
    from lora_cli.models.safety import TINY

    path = write(
        tmp_path / "rows.jsonl", [f"row {number} " + "some words of text " * 20 for number in range(4_000)]
    )
    process = started(tmp_path, path, "100000", "one")
    until(lambda: len(list(cache.glob("[!.]*"))) >= 3 or process.poll() is not None)
    process.kill()
    process.communicate()
    done = len(list(cache.glob("[!.]*")))
    monkeypatch.setattr(tokenize, "PART_BYTES", 100_000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    counted = _count_runs(monkeypatch)
    tokenizer = load_tokenizer(TINY)
    resumed = run(tokenizer, train=path)[0].train
    parts = len(resumed.parts)
    assert 3 <= done < parts
    assert len(counted) == parts - done
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "other"))
    straight = run(tokenizer, train=path)[0].train
    assert straight.fingerprint == resumed.fingerprint
    for ours, theirs in zip(resumed.parts, straight.parts, strict=True):
        folders = [root / ours.cache.fingerprint[:32] for root in (cache, tmp_path / "other" / "tokens")]
        assert ours.cache.fingerprint == theirs.cache.fingerprint
        for name in (
            "tokens.bin",
            "trained.bin",
            "offsets.npy",
            "lines.npy",
            "identities.npy",
            "manifest.json",
        ):
            assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def _children(pid: int) -> list[int]:
    try:
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(CORES < 2 or not Path("/proc/self/stat").exists(), reason="needs two cores and /proc")
def test_workers_end_with_their_parent(tmp_path, cache):
    """When the main process is killed, none of its workers goes on."""
    path = write(tmp_path / "rows.jsonl", ["some words of text " * 200] * 20_000)
    process = started(tmp_path, path, "8000000", "all")
    until(lambda: len(list(cache.glob(".tmp-*"))) >= 1 or process.poll() is not None)
    workers = _children(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.communicate()
    until(lambda: not any(map(_runs, workers)), 10)
    for folder in cache.glob(".tmp-*"):
        folder.rename(tmp_path / folder.name)  # the next writer would sweep it


@pytest.mark.skipif(CORES < 2, reason="one core works in one process")
def test_a_killed_worker_is_one_line(tmp_path, tokenizer, monkeypatch):
    """A worker that the system kills ends the stage with one line that says so, and no hidden folder."""
    monkeypatch.setattr(tokenize, "PART_BYTES", 1000)
    path = write(tmp_path / "rows.jsonl", [f"row {number:04}" for number in range(300)])

    def kill() -> None:
        until(multiprocessing.active_children)
        process = multiprocessing.active_children()[0]
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ResourceError, match="a process that prepared the data was killed") as caught:
        run(tokenizer, train=path)
    killer.join()
    assert len(caught.value.lines) == 1
    assert not multiprocessing.active_children()


def test_a_pool_that_broke_while_it_was_fed_is_one_line(tmp_path, tokenizer, monkeypatch):
    """The closed pipe of a broken pool counts as a killed worker; an error of the system with a number is itself."""
    path = write(tmp_path / "rows.jsonl", [f"row {number:04}" for number in range(300)])
    monkeypatch.setattr(tokenize, "PART_BYTES", 1000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    for error, expected in ((OSError("handle is closed"), ResourceError), (OSError(5, "I/O"), OSError)):

        def broken(*_: Any, error: OSError = error) -> Iterator[Any]:
            raise error

        monkeypatch.setattr(processes.ProcessPoolExecutor, "map", broken)
        with pytest.raises(expected) as caught:
            run(tokenizer, train=path)
        assert isinstance(caught.value, ResourceError) is (expected is ResourceError)


@pytest.mark.skipif(CORES < 2, reason="one core works in one process")
def test_a_fault_ends_the_other_workers(tmp_path, tokenizer, monkeypatch, cache):
    """When a file cannot be read, no worker goes on with the others, and no cache of them is left."""
    names = [
        write(tmp_path / f"{index}.jsonl", [f"row {index} {row}" for row in range(3000)])
        for index in range(12)
    ]
    (tmp_path / "bad.json").write_text("{}")
    names.insert(1, str(tmp_path / "bad.json"))
    began: list[int] = []
    original = multiprocessing.Process.terminate
    monkeypatch.setattr(
        multiprocessing.process.BaseProcess, "terminate", lambda self: (began.append(1), original(self))
    )
    with pytest.raises(InputError, match=r"bad\.json:1: not a JSON array"):
        run(tokenizer, train=names, format="text")
    assert began
    assert not multiprocessing.active_children()
    assert not list(cache.glob("*"))
