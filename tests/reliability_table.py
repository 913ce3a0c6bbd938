"""The table of docs/reliability.md, counted from the tests themselves.

A test that carries `@pytest.mark.reliability("kills")` counts for that row: one case, or as many as it records with
`record_property("cases", n)`. With `@pytest.mark.cases(14, 140)` a test with the argument `case` runs 14 times, and 140
times with `--full`. `bash scripts/reliability.sh` runs what is marked, prints the table and writes the page.
"""

from __future__ import annotations

import os
import platform
from collections import Counter, defaultdict
from collections.abc import Generator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Row:
    """What a row says, and how many cases its short and its full form have at least."""

    text: str
    short: int
    full: int


ROWS = {
    "kills": Row(
        "SIGKILL at a random moment of a real `lora-train`, the same command again: the final adapter has the sha256"
        " of the run that was never stopped (7 methods)",
        14,
        140,
    ),
    "writer": Row(
        "writer failpoint × {kill, ENOSPC, EIO} × {checkpoint, adapter, merged}: every public folder verifies or does"
        " not exist, the rerun completes",
        36,
        108,
    ),
    "damage": Row(
        "damaged file (0 bytes, -1 byte, half, missing, swapped, one bit flipped): found before a weight is used",
        300,
        2000,
    ),
    "twice": Row("the same recipe twice: bit-identical weights and metrics (7 methods)", 7, 21),
    "signals": Row(
        "SIGINT or SIGTERM in load, tokenization, training, evaluation, save, export: exit 130 or 143, resumable,"
        " at most one step lost",
        10,
        50,
    ),
    "malformed": Row(
        "malformed recipe, data, model folder, adapter, path: exit 2, one line a problem, no traceback, under 5 s",
        250,
        250,
    ),
    "fuzzed": Row("fuzzed recipe, row or file header (hypothesis): no traceback, no hang", 200, 10_000),
    "malicious": Row(
        "malicious artefact × train, eval, merge: nothing of it is run, no socket is opened", 60, 90
    ),
    "changed": Row("changed key of a recipe, or of what it names: the resume is refused by its name", 25, 25),
    "secrets": Row("planted secret: found in no file and no line of output", 20, 20),
    "surroundings": Row("LC_ALL=C, tr_TR.UTF-8, another time zone, a clock moved back: the same bytes", 4, 4),
    "disk": Row("a real full disk (tmpfs): exit 4, what was published stays, the rerun completes", 2, 2),
}
_COUNTS = pytest.StashKey["defaultdict[str, Counter[str]]"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the two options of the reliability script."""
    group = parser.getgroup("reliability")
    group.addoption("--full", action="store_true", help="run the long form of the reliability tests")
    group.addoption("--reliability-page", type=Path, metavar="FILE", help="print the table, write it there")


def pytest_configure(config: pytest.Config) -> None:
    """Name the markers."""
    config.addinivalue_line("markers", "reliability(row): counts for a row of docs/reliability.md")
    config.addinivalue_line("markers", "cases(short, full): how often a test with the argument `case` runs")
    config.stash[_COUNTS] = defaultdict(Counter)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test its cases."""
    marker = metafunc.definition.get_closest_marker("cases")
    if marker is not None:
        short, full = marker.args
        metafunc.parametrize("case", range(full if metafunc.config.getoption("full") else short))


@pytest.fixture()
def full(request: pytest.FixtureRequest) -> bool:
    """Say whether the long form runs."""
    return bool(request.config.getoption("full"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tell the report, which may travel to another process, for which row it counts."""
    report = yield
    marker = item.get_closest_marker("reliability")
    if marker is not None:
        assert marker.args[0] in ROWS, f"{item.nodeid}: there is no row {marker.args[0]}"
        report.user_properties.append(("reliability", marker.args[0]))
    return report


class _Counts:
    """Adds up what the reports say, in the process that has them all."""

    def __init__(self, counts: defaultdict[str, Counter[str]]) -> None:
        self.counts = counts

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found: dict[str, Any] = dict(report.user_properties)
        if "reliability" in found and (report.when == "call" or not report.passed):
            self.counts[found["reliability"]][report.outcome] += int(found.get("cases", 1))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Begin to count."""
    session.config.pluginmanager.register(_Counts(session.config.stash[_COUNTS]))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table, and write it where every row was run."""
    page: Path | None = config.getoption("reliability_page")
    if page is None:
        return
    full, counts = config.getoption("full"), config.stash[_COUNTS]
    lines = ["| what is done to it | passed | goal |", "|---|---|---|"]
    for name, row in ROWS.items():
        goal, seen = row.full if full else row.short, counts[name]
        ran = seen["passed"] + seen["failed"]
        cell = f"{seen['passed']:,}/{ran:,}" + (f" ({seen['skipped']} skipped)" if seen["skipped"] else "")
        lines.append(f"| {row.text} | {cell if seen else 'not run'} | {goal:,} |")
    table = "\n".join(lines)
    terminalreporter.write_line(f"\n{table}")
    if all(counts[name] for name in ROWS):
        _write(page, "full" if full else "short", f"{_machine()}\n\n{table}")
    else:
        terminalreporter.write_line(f"{page}: not written, as not every row was run")


def _machine() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "safetensors"))
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}:"


def _write(page: Path, form: str, text: str) -> None:
    begin, end = f"<!-- {form} -->", f"<!-- end of {form} -->"
    before, rest = page.read_text(encoding="utf-8").split(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")
