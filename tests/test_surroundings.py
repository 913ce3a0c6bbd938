"""What is around a process - locale, time zone, clock, order of sets - does not reach into a run."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from forked_commands import ERRORS, OUTPUT, ForkServer
from run_results import differences, leftovers, result_of
from toy import rows, write_rows
from toy_methods import write_method

pytestmark = pytest.mark.reliability("surroundings")
HOUR = 3600.0


@pytest.fixture(scope="module")
def elsewhere(server: ForkServer, base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Return the result of the job in the usual surroundings."""
    folder = write_job(tmp_path_factory.mktemp("job"), base)
    server.succeed(folder, "train", "recipe.yaml")
    return result_of(folder / "run")


def write_job(folder: Path, base: Path, **changes: Any) -> Path:
    """Write a job whose rows and file names are not ASCII, with letters that Turkish changes the case of."""
    write_method(folder, base, "lora", data__train="İstanbul ığüş.jsonl", **changes)
    more = [{"prompt": "İstanbul'da kaç ılık çay?", "completion": "größer I i İ ı 東京 😀"}] * 2
    write_rows(folder / "İstanbul ığüş.jsonl", [*rows(40), *more])
    return folder


def test_a_locale_of_ascii(elsewhere: dict[str, object], base: Path, tmp_path: Path) -> None:
    """LC_ALL=C, with an output that takes ASCII alone: the same bytes, and nothing else is printed."""
    write_job(tmp_path, base)
    with ForkServer(LC_ALL="C", PYTHONIOENCODING="ascii") as server:
        server.succeed(tmp_path, "train", "recipe.yaml")
    assert differences(result_of(tmp_path / "run"), elsewhere) == []
    printed = (tmp_path / OUTPUT).read_bytes()
    assert (tmp_path / ERRORS).read_bytes() == b""
    assert printed.isascii()
    assert b"done" in printed


def test_a_turkish_locale_and_another_order_of_sets(
    elsewhere: dict[str, object], base: Path, tmp_path: Path
) -> None:
    """LANG and LC_ALL tr_TR.UTF-8, and another PYTHONHASHSEED: the same bytes.

    Where the locale is not installed, the C library stays with its own and the variables alone are tried.
    """
    write_job(tmp_path, base)
    with ForkServer(LC_ALL="tr_TR.UTF-8", LANG="tr_TR.UTF-8", PYTHONHASHSEED="77") as server:
        server.succeed(tmp_path, "train", "recipe.yaml")
    assert differences(result_of(tmp_path / "run"), elsewhere) == []


def test_another_time_zone_and_a_decimal_comma(
    elsewhere: dict[str, object], base: Path, tmp_path: Path
) -> None:
    """TZ at the other end of the world and a German locale: the same bytes."""
    write_job(tmp_path, base)
    with ForkServer(LC_ALL="de_DE.UTF-8", TZ="Pacific/Kiritimati") as server:
        server.succeed(tmp_path, "train", "recipe.yaml")
    assert differences(result_of(tmp_path / "run"), elsewhere) == []


def test_a_clock_that_is_moved_back(
    server: ForkServer, elsewhere: dict[str, object], base: Path, tmp_path: Path
) -> None:
    """A clock an hour back, at 1980 and in the future, and checkpoints of swapped ages: latest is the highest step."""
    write_job(tmp_path, base)
    checkpoints = tmp_path / "run" / "checkpoints"
    shifts = [0.0, -HOUR, 315532800.0 - time.time(), 50 * 365 * 24 * HOUR]
    for stop, shift in zip((2, 5), shifts, strict=False):
        server.start(tmp_path, "train", "recipe.yaml", clock=shift)
        while not (checkpoints / f"step-{stop}").is_dir():
            assert server.code(0.005) is None
        assert server.kill() == -signal.SIGKILL
        _swap_ages(checkpoints)
    steps = [int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*")]
    server.succeed(tmp_path, "train", "recipe.yaml", clock=shifts[2])
    assert f"continuing after step {max(steps)}" in (tmp_path / OUTPUT).read_text()
    assert differences(result_of(tmp_path / "run"), elsewhere) == []
    server.succeed(tmp_path, "train", "recipe.yaml", clock=shifts[3])
    assert "finished already" in (tmp_path / OUTPUT).read_text()
    assert leftovers(tmp_path) == []


def _swap_ages(checkpoints: Path) -> None:
    """Date the lowest step into the future and the others before 1980."""
    for age, path in enumerate(sorted(checkpoints.iterdir(), key=lambda one: one.name)):
        when = time.time() + HOUR if not age else 1000.0 - age
        for file in [path, *path.rglob("*")]:
            os.utime(file, (when, when))
