"""Runs that are killed at any moment, and go on by the same command to the bytes of a run that was left alone."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked_commands import ERRORS, ForkServer, environment
from run_results import differences, leftovers, result_of
from toy_methods import METHODS, write_method

pytestmark = pytest.mark.reliability("kills")
NAMES = list(METHODS)
CONSOLE = (3, 9)
"""Cases that run the plain command, imports included; the others run in forked processes."""
COMMAND = [sys.executable, "-c", "import sys; from lora_cli.cli import train_main; sys.exit(train_main())"]


@pytest.fixture(scope="module")
def uninterrupted(
    server: ForkServer, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[dict[str, object], float]]:
    """Return a function that gives a method's result when nobody stops it, and the seconds that this takes."""
    known: dict[str, tuple[dict[str, object], float]] = {}

    def result(method: str) -> tuple[dict[str, object], float]:
        if method not in known:
            folder = tmp_path_factory.mktemp(method)
            recipe = write_method(folder, base, method)
            seconds = server.succeed(folder, "train", recipe.name)
            known[method] = result_of(folder / "run"), seconds
        return known[method]

    return result


def killed(server: ForkServer, folder: Path, seconds: float) -> bool:
    """Kill a run after so many seconds; say whether it still ran."""
    server.start(folder, "train", "recipe.yaml")
    if server.code(seconds) is not None:
        return False
    return server.kill() == -signal.SIGKILL


def killed_in_console(folder: Path, seconds: float) -> bool:
    """Kill the plain command after so many seconds; say whether it still ran."""
    process = subprocess.Popen(
        [*COMMAND, "recipe.yaml"],
        cwd=folder,
        env=environment(LORA_CLI_CACHE=str(folder / "cache")),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
    return process.wait(30) == -signal.SIGKILL


@pytest.mark.cases(14, 140)
def test_a_killed_run_ends_in_the_same_bytes(
    server: ForkServer,
    base: Path,
    tmp_path: Path,
    uninterrupted: Callable[[str], tuple[dict[str, object], float]],
    case: int,
    full: bool,
    record_property: pytest.RecordProperty,
) -> None:
    """SIGKILL at a random moment, a few times in some cases; the same command ends as if nothing had been."""
    draw = random.Random(case)
    method, parts = NAMES[case % 7], 20 if full else 2
    expected, seconds = uninterrupted(method)
    write_method(tmp_path, base, method)
    # Of the run's time each case of a method has its own part, so that all phases are met.
    moment = (case // 7 + draw.random()) / parts * seconds
    if case in CONSOLE:
        assert killed_in_console(tmp_path, 4 * draw.random() + seconds)
    else:
        while not killed(server, tmp_path, moment):  # it was faster this time
            moment *= 0.8
            (tmp_path / "run").rename(tmp_path / f"finished after {moment:.3f} s")
        for _ in range(draw.randrange(3) if case % 3 == 0 else 0):
            killed(server, tmp_path, draw.random() * seconds)
    record_property("killed_at", round(moment / seconds, 3))
    server.succeed(tmp_path, "train", "recipe.yaml")
    assert differences(result_of(tmp_path / "run"), expected) == []
    assert leftovers(tmp_path) == []


@pytest.mark.cases(1, 7)
def test_kills_in_a_row_make_progress(
    server: ForkServer,
    base: Path,
    tmp_path: Path,
    uninterrupted: Callable[[str], tuple[dict[str, object], float]],
    case: int,
    record_property: pytest.RecordProperty,
) -> None:
    """Killed whenever it has saved once more, a run gets on each time, and ends in the same bytes."""
    method, draw = NAMES[case], random.Random(case)
    expected, seconds = uninterrupted(method)
    write_method(tmp_path, base, method)
    reached, kills = 0, 0
    while reached < 10:
        server.start(tmp_path, "train", "recipe.yaml")
        deadline = time.monotonic() + 60
        code = None
        while code is None and _newest(tmp_path) <= reached:
            assert time.monotonic() < deadline
            code = server.code(0.005)
        if code is None:
            code = server.code(draw.random() * 0.05 * seconds)
        if code is None:
            kills += server.kill() == -signal.SIGKILL
        assert _newest(tmp_path) > reached, (tmp_path / ERRORS).read_text()
        reached = _newest(tmp_path)
    assert kills >= 3
    record_property("kills", kills)
    server.succeed(tmp_path, "train", "recipe.yaml")
    assert differences(result_of(tmp_path / "run"), expected) == []


def _newest(folder: Path) -> int:
    """Return the highest step that a run has published."""
    names = [path.name for path in (folder / "run" / "checkpoints").glob("step-*")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)
