"""Every file of everything that lora-cli writes, damaged in every way: found before a weight is used."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
from command_line import run_here
from toy import write_base, write_recipe

from lora_cli import pipeline, without_training
from lora_cli.data.cache import TokenCache
from lora_cli.recipe.load import load_recipe
from lora_cli.runtime.checkpoint import Checkpoints
from lora_cli.stages import _opened, inject

Damage = tuple[Path, str, int]
"""A file, the kind of damage, and for a flip the bit."""
KINDS = ("empty", "shorter", "half", "missing", "swapped")
CASES = {"checkpoint": (60, 400), "adapter": (90, 600), "merged": (85, 550), "cache": (65, 450)}
"""Cases of the short and the full form; together 300 and 2,000."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder with a finished run, one that has only a merged model, and their token cache."""
    folder = tmp_path_factory.mktemp("damage")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_CLI_CACHE", str(folder / "cache"))
        write_recipe(
            folder, write_base(folder / "base"), train__max_steps=4, train__save_every=2, train__keep_checkpoints=2,
            export__formats=["peft", "merged"],
        )  # fmt: skip
        pipeline.train(load_recipe(folder / "recipe.yaml"))
        shutil.copytree(folder / "run", folder / "merged-run")
        shutil.rmtree(folder / "merged-run" / "adapter")
        yield folder


def damages(folder: Path, count: int) -> list[Damage]:
    """Return `count` ways to damage a folder: each kind on each file, and bits flipped at random places."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found: list[Damage] = [(file, kind, 0) for file in files for kind in KINDS]
    assert len(found) < count
    draw = random.Random(0)
    while len(found) < count:
        file = draw.choice(files)
        found.append((file, "flipped", draw.randrange(8 * file.stat().st_size)))
    return found


@contextmanager
def damaged(damage: Damage) -> Iterator[None]:
    """Within it a file is damaged; both files of a swap."""
    file, kind, bit = damage
    before = {file: file.read_bytes()}
    content = before[file]
    if kind == "missing":
        file.unlink()
    elif kind == "swapped":
        beside = (path for path in sorted(file.parent.iterdir()) if path.is_file())
        other = next(path for path in beside if path.read_bytes() != content)
        before[other] = other.read_bytes()
        file.write_bytes(before[other])
        other.write_bytes(content)
    elif kind == "flipped":
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
    else:
        file.write_bytes({"empty": b"", "shorter": content[:-1], "half": content[: len(content) // 2]}[kind])
    try:
        yield
    finally:
        for path, whole in before.items():
            path.write_bytes(whole)


def undetected(folder: Path, count: int, is_found: Callable[[Damage], bool]) -> list[str]:
    """Return the damages of a folder that were not found."""
    left = []
    for damage in damages(folder, count):
        with damaged(damage):
            if not is_found(damage):
                left.append(f"{damage[0].name} {damage[1]} {damage[2]}")
    return left


@pytest.fixture()
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the reading of any weight a fault of ours, which exits 1."""

    def read(*arguments: object, **options: object) -> NoReturn:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(_opened, "load_model", read)
    monkeypatch.setattr(without_training, "load_model", read)
    monkeypatch.setattr(inject, "run", read)


@pytest.mark.reliability("damage")
def test_of_a_checkpoint(place: Path, full: bool, record_property: Callable[[str, object], None]) -> None:
    """A damaged checkpoint is passed over, with one warning line that names it, for the one before."""
    checkpoints = Checkpoints(place / "run" / "checkpoints", keep=2)

    def is_found(damage: Damage) -> bool:
        warnings: list[str] = []
        step = checkpoints.newest(warnings.append)
        return step == 2 and len(warnings) == 1 and "step-4" in warnings[0] and "\n" not in warnings[0]

    count = CASES["checkpoint"][full]
    assert checkpoints.newest(pytest.fail) == 4
    assert undetected(place / "run" / "checkpoints" / "step-4", count, is_found) == []
    assert checkpoints.newest(pytest.fail) == 4
    record_property("cases", count)


@pytest.mark.reliability("damage")
@pytest.mark.parametrize(("run", "export"), [("run", "adapter"), ("merged-run", "merged")])
def test_of_an_export(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    no_weights: None,
    full: bool,
    record_property: Callable[[str, object], None],
    run: str,
    export: str,
) -> None:
    """eval, merge, inspect and a run that starts from it refuse a damaged export with exit 2, no weight being read."""
    target, out = place / run, tmp_path / "out"
    commands: list[list[str]] = [["eval", str(target)], ["lora", "inspect", str(target)]]
    if export == "adapter":
        start = [f"adapter.init_from={target}", f"run.output={out}"]
        commands += [["merge", str(target), "-o", str(out)], ["train", str(place / "recipe.yaml"), *start]]
    turn = iter(range(10**6))

    def is_found(damage: Damage) -> bool:
        command, *arguments = commands[next(turn) % len(commands)]
        ended = run_here(capsys, command, *arguments)
        lines = ended.errors.splitlines()
        return ended.code == 2 and bool(lines) and all(line.startswith("error: ") for line in lines)

    for command, *arguments in commands:  # sound, each of them gets as far as the weights
        assert run_here(capsys, command, *arguments).code == 1
    count = CASES[export][full]
    assert undetected(target / export, count, is_found) == []
    assert not out.exists()
    record_property("cases", count)


@pytest.mark.reliability("damage")
def test_of_a_token_cache(place: Path, full: bool, record_property: Callable[[str, object], None]) -> None:
    """A damaged cache is not used."""
    folder = min((place / "cache" / "tokens").iterdir())

    def is_found(damage: Damage) -> bool:
        try:
            TokenCache(folder, check=True)
        except ValueError:
            return True
        return False

    count = CASES["cache"][full]
    TokenCache(folder, check=True)
    assert undetected(folder, count, is_found) == []
    record_property("cases", count)


def test_of_the_runs_recipe(place: Path, capsys: pytest.CaptureFixture[str], no_weights: None) -> None:
    """A run whose recipe.yaml is not the one that made the adapter is not scored by it."""
    file = place / "run" / "recipe.yaml"
    bits = [random.Random(1).randrange(8 * file.stat().st_size) for _ in range(20)]
    for damage in [
        *((file, kind, 0) for kind in ("empty", "shorter", "half")),
        *((file, "flipped", b) for b in bits),
    ]:
        with damaged(damage):
            ended = run_here(capsys, "eval", str(place / "run"))
            assert ended.code == 2, damage
            assert ended.errors.startswith("error: ")


def test_a_folder_from_elsewhere_needs_no_manifest(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter without a manifest is scored; with one that is not ours it is refused, and said what to do."""
    shutil.copytree(place / "run" / "adapter", tmp_path / "adapter")
    manifest = tmp_path / "adapter" / "manifest.json"
    manifest.unlink()
    rest = (f"model.base={place / 'base'}", f"data.eval={place / 'eval.jsonl'}")
    assert run_here(capsys, "eval", str(tmp_path / "adapter"), *rest).code == 0
    manifest.write_text('{"name": "a web page", "icons": []}')
    ended = run_here(capsys, "eval", str(tmp_path / "adapter"), *rest)
    assert ended.code == 2
    assert "remove manifest.json" in ended.errors


def test_a_damaged_base_of_ours_is_not_trained_on(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_weights: None
) -> None:
    """A merged model that is the base of a run is compared with its manifest first."""
    base = tmp_path / "base"
    shutil.copytree(place / "run" / "merged", base)
    flip: Damage = (base / "model.safetensors", "flipped", 8 * 20_000)
    command = ("train", str(place / "recipe.yaml"), f"model.base={base}", f"run.output={tmp_path / 'out'}")
    with damaged(flip):
        ended = run_here(capsys, *command)
    assert ended.code == 2
    assert "model.safetensors: missing or damaged" in ended.errors
    assert run_here(capsys, *command).code == 1
