"""Rows are streamed: a file a hundred times larger needs no more memory. The whole stage: scripts/data_memory.py."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_cli.data.cache import CacheWriter
from lora_cli.types import Example

np = pytest.importorskip("numpy")
READ = """
import resource, sys
from lora_cli.data.faults import Faults
from lora_cli.data.read import find_sources
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
peaks = []
for name in sys.argv[1:]:
    faults, count = Faults(name), 0
    for row in find_sources(name, "data.train", "train")[0].rows(faults): count += 1
    faults.raise_if_any()
    peaks.append((count, peak()))
print(peaks)
"""


@pytest.mark.skipif(sys.platform == "darwin", reason="reads the peak in KiB")
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "gz"])
def test_a_file_a_hundred_times_larger(tmp_path: Path, kind: str) -> None:
    """Reading 25 MB after 0.25 MB of rows raises the peak of resident memory by less than 50 MB, in every format."""
    text = [
        f"row {number}: " + " ".join(str(number * 7919 % p) for p in range(90, 190)) for number in range(625)
    ]
    lines = [f"{one}\n" if kind == "csv" else json.dumps({"text": one}) + "\n" for one in text]
    paths = []
    for times in (1, 100):
        path = tmp_path / f"{times}.{'jsonl.gz' if kind == 'gz' else kind}"
        comma = "," if kind == "json" else ""
        block = comma.join(lines).encode()
        with gzip.open(path, "wb", 1) if kind == "gz" else path.open("wb") as file:
            file.write({"json": b"[", "csv": b"text\n"}.get(kind, b""))
            for index in range(times):
                file.write((comma.encode() if index else b"") + block)
            file.write(b"]" if kind == "json" else b"")
        paths.append(str(path))
    done = subprocess.run(
        [sys.executable, "-c", READ, *paths],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    (few, before), (many, after) = json.loads(done.stdout.replace("(", "[").replace(")", "]"))
    assert (few, many) == (625, 62_500)
    assert (after - before) / 1e3 < 50


def test_what_a_written_row_leaves_in_memory(tmp_path: Path) -> None:
    """A cache is written with at most 64 bytes of memory a row, whatever the row holds."""
    import tracemalloc

    example = Example(np.zeros(2, dtype=np.int32), np.ones(2, dtype=np.bool_))
    with CacheWriter(tmp_path / "cache", "name") as writer:
        tracemalloc.start()
        for row in range(40_000):
            writer.add(example, row, 2**63 + row)
        used, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert used < 64 * 40_000
