"""What a run left behind, in a form in which two runs can be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def result_of(run: Path) -> dict[str, object]:
    """Return what must be equal in two runs: every exported file, the generations, the metrics without their timing.

    Names are those of a run's folder. The base, and so all paths in the export, must be the same.
    """
    found: dict[str, object] = {
        str(path.relative_to(run)): path.read_bytes()
        for name in ("adapter", "merged", "portable")
        for path in sorted((run / name).rglob("*"))
        if path.is_file()
    }
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    timing = ("tokens_per_second",)
    found["metrics.jsonl"] = [
        {key: value for key, value in line.items() if key not in timing} for line in lines
    ]
    answers = run / "generations.jsonl"
    found["generations.jsonl"] = answers.read_bytes() if answers.exists() else b""
    return found


def differences(one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    """Return the names of what differs."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def leftovers(folder: Path) -> list[str]:
    """Return the hidden files and folders below a folder."""
    return sorted(str(path) for path in folder.rglob(".*"))
