"""What the commands do with good input, and how they end when something fails inside."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from command_line import run_here, run_process
from model_folders import write_model

from lora_cli import __version__, pipeline, preflight, without_training
from lora_cli.errors import DivergedError, GateError, InputError, ResourceError, Stopped
from lora_cli.interrupts import Interrupted
from lora_cli.recipe.gates import Gate
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.schema import Recipe
from lora_cli.runtime.run_folder import MARK

GOOD = "model: {base: ./base}\ndata: {train: rows.jsonl, eval: rows.jsonl}\nrun: {output: out}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a sound model, rows, a recipe and an adapter."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    (tmp_path / "r.yaml").write_text(GOOD)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    return tmp_path


def test_check_says_what_was_checked_and_writes_nothing(folder: Path) -> None:
    """`--check`, before or after the overrides, ends with 0 and leaves the folder as it was."""
    before = sorted(folder.rglob("*"))
    for arguments in (["r.yaml", "--check", "run.seed=3"], ["--check", "r.yaml", "run.seed=3"]):
        result = run_process(folder, "train", *arguments)
        assert (result.code, result.errors) == (0, "")
        assert "r.yaml: every key is valid" in result.output
        assert "model.base: ./base: llama, 0.0 M parameters in F32" in result.output
        assert "data.train: rows.jsonl" in result.output
        assert "run.output: out: new" in result.output
    assert sorted(folder.rglob("*")) == before


def test_hub_ids_are_not_contacted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name of the shape of a hub id that is no folder here is said to be unchecked."""
    result = run_here(
        capsys, "train", "r.yaml", "model.base=some-owner/some-model", "data.train=owner/rows", "--check"
    )
    assert result.code == 0, result.errors
    assert "some-owner/some-model: a hub id, not checked" in result.output
    assert "owner/rows: a hub data set, not checked" in result.output


def test_train_hands_the_recipe_and_the_options_to_the_pipeline(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overrides, --overwrite and the gates arrive as they were written."""
    calls: list[dict[str, object]] = []
    monkeypatch.setattr(
        pipeline, "train", lambda recipe, **options: calls.append({"recipe": recipe} | options)
    )
    arguments = ["r.yaml", "train.epochs=2", "--overwrite", "--min", "token_accuracy=0.5", "--max", "loss=2"]
    arguments += ["--allow", "data.train"]
    assert run_here(capsys, "train", *arguments).code == 0
    (call,) = calls
    recipe = call["recipe"]
    assert isinstance(recipe, Recipe)
    assert recipe.resolved() == load_recipe(folder / "r.yaml", ["train.epochs=2"]).resolved()
    assert (call["resume"], call["overwrite"], call["allow"]) == (None, True, ["data.train"])
    assert call["gates"] == (Gate("token_accuracy", 0.5, "min"), Gate("loss", 2.0, "max"))


def test_the_scores_of_eval_are_json_on_stdout_even_when_a_gate_misses(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All else goes to stderr; the missed gate is exit 5 with its figure."""

    def score(target: Path, recipe: object) -> dict[str, dict[str, float]]:
        print("a line of the log")
        return {"base": {"loss": 3.0}, "tuned": {"loss": 1.5}}

    monkeypatch.setattr(without_training, "evaluate", score)
    arguments = ["adapter", "model.base=./base", "data.eval=rows.jsonl", "--json", "--max", "loss=1"]
    result = run_here(capsys, "eval", *arguments)
    assert result.code == 5
    assert json.loads(result.output)["tuned"] == {"loss": 1.5}
    assert result.errors.splitlines() == [
        "a line of the log",
        "error: --max loss=1: loss 1.5 is above the bound 1",
    ]


def test_eval_of_a_run_reads_the_recipe_of_the_run(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """RUN/recipe.yaml with overrides is what is scored."""
    seen = {}
    monkeypatch.setattr(
        without_training,
        "evaluate",
        lambda target, recipe: seen.update({target: recipe}) or {"base": {}, "tuned": {}},
    )
    (folder / "run").mkdir()
    (folder / "run" / "recipe.yaml").write_text(f"{MARK}\n" + GOOD + "adapter: {rank: 3}\n")
    result = run_here(capsys, "eval", "run", "data.max_length=99")
    assert result.code == 0, result.errors
    recipe = seen[Path("run")]
    assert (recipe.adapter.rank, recipe.data.max_length) == (3, 99)


def test_merge_hands_over_folder_and_type(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--output, --dtype and --adapter arrive; without --dtype it is None, the recipe's, without --adapter a model."""
    calls = []
    monkeypatch.setattr(
        without_training,
        "merge",
        lambda target, output, recipe, **how: calls.append((target, output, *how.values())),
    )
    assert (
        run_here(capsys, "merge", "adapter", "--output", "m", "model.base=./base", "--dtype", "float32").code
        == 0
    )
    assert run_here(capsys, "lora", "merge", "adapter", "-o", "m", "model.base=./base").code == 0
    assert (
        run_here(capsys, "merge", "adapter", "-o", "m", "model.base=./base", "--adapter", "portable").code
        == 0
    )
    assert calls == [
        (Path("adapter"), Path("m"), "float32", "merged"),
        (Path("adapter"), Path("m"), None, "merged"),
        (Path("adapter"), Path("m"), None, "portable"),
    ]


@pytest.mark.parametrize(
    ("fault", "code", "line"),
    [
        (InputError(["one", "two"]), 2, "error: one\nerror: two\n"),
        (DivergedError("loss is nan"), 3, "error: loss is nan\n"),
        (ResourceError("disk"), 4, "error: disk\n"),
        (MemoryError(), 4, "error: out of memory (lower train.micro_batch_tokens)\n"),
        (
            OSError(errno.EIO, "I/O", "x"),
            4,
            "error: x: the disk reports an input/output error (look at the disk, or choose another folder)\n",
        ),
        (GateError("missed"), 5, "error: missed\n"),
        (Stopped("saved", 15), 143, "error: saved\n"),
        (Interrupted(2), 130, "error: stopped by signal 2, nothing was left half-written\n"),
        (InputError("a\nb\x1b[0m"), 2, "error: a\\nb\\x1b[0m\n"),
    ],
)
def test_each_kind_of_fault_has_its_exit_code(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fault: BaseException,
    code: int,
    line: str,
) -> None:
    """Lines on stderr, control characters escaped, nothing else."""

    def fail(*arguments: object, **options: object) -> None:
        raise fault

    monkeypatch.setattr(pipeline, "train", fail)
    result = run_here(capsys, "train", "r.yaml")
    assert (result.code, result.errors.lstrip()) == (code, line)


@pytest.mark.parametrize("run_exists", [False, True])
def test_a_fault_of_ours_is_one_line_and_a_traceback_in_a_file(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, run_exists: bool
) -> None:
    """Exit 1; the traceback is in the run folder if there is one, else among temporary files."""

    def fail(*arguments: object, **options: object) -> None:
        if run_exists:
            (folder / "out").mkdir()
        raise RuntimeError("boom\nmore")

    monkeypatch.setattr(pipeline, "train", fail)
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    result = run_here(capsys, "train", "r.yaml")
    assert result.code == 1
    start, _, rest = result.errors.partition(" (traceback in ")
    assert start == "error: a fault of lora-cli: RuntimeError: boom"
    log = Path(rest.removesuffix(")\n"))
    assert log.resolve().parent == (folder / "out" if run_exists else folder).resolve()
    assert "Traceback" in log.read_text()
    assert "boom\nmore" in log.read_text()


def _run_in(folder: Path, **summary: object) -> None:
    (folder / "out" / "checkpoints").mkdir(parents=True)
    (folder / "out" / "recipe.yaml").write_text(f"{MARK}\n" + GOOD)
    if summary:
        (folder / "out" / "summary.json").write_text(json.dumps(summary))


def test_the_state_of_the_output_folder_decides(folder: Path) -> None:
    """An unfinished run is gone on with, or refused where that is forbidden; a finished and a new one pass."""
    recipe = load_recipe(folder / "r.yaml")
    (folder / "out").mkdir()
    assert preflight.check(recipe)[-1] == "run.output: out: new"
    (folder / "out").rmdir()
    _run_in(folder)
    with pytest.raises(InputError, match="--overwrite starts again"):
        preflight.check(recipe, resume=False)
    assert preflight.check(recipe)[-1].endswith("to be resumed")
    assert preflight.check(recipe, overwrite=True)[-1].endswith("to be overwritten")
    (folder / "out" / "summary.json").write_text(
        '{"status": "done", "eval": {}, "fingerprints": {}, "recipe": {}}'
    )
    assert preflight.check(recipe)[-1].endswith("holds a finished run")


def test_only_the_first_process_judges_the_output_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under torchrun the first process may have begun to write before another one looks."""
    _run_in(folder)
    monkeypatch.setenv("RANK", "1")
    assert not any("run.output" in line for line in preflight.check(load_recipe(folder / "r.yaml")))


def test_help_version_and_schema_are_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """-h and --help of every command, the version, the schema, a key and a resolved recipe."""
    for command in ("train", "eval", "merge", "lora"):
        short, long = (run_here(capsys, command, flag) for flag in ("-h", "--help"))
        assert short == long
        assert (short.code, short.errors) == (0, "")
        assert short.output.startswith("Usage: ")
    assert run_here(capsys, "lora", "--version").output == f"lora-cli {__version__}\n"
    assert "properties" in json.loads(run_here(capsys, "lora", "recipe", "--schema").output)
    assert (
        "Peak learning rate." in run_here(capsys, "lora", "recipe", "explain", "train.learning_rate").output
    )
    assert "The training loop." in run_here(capsys, "lora", "recipe").output
    shown = run_here(capsys, "lora", "recipe", "show", "r.yaml", "run.seed=7").output
    (folder / "resolved.yaml").write_text(shown)
    assert load_recipe(folder / "resolved.yaml").run.seed == 7


def test_an_override_without_effect_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """lora-eval and lora-merge name an override that they would not read; nothing asked for is skipped silently."""
    (folder / "run").mkdir()
    (folder / "run" / "recipe.yaml").write_text(f"{MARK}\n" + GOOD)
    for arguments in (
        ("eval", "run", "adapter.rank=9"),
        ("merge", "run", "--output", "m", "evaluate.metrics=[loss]"),
    ):
        result = run_here(capsys, *arguments)
        assert result.code == 2
        assert "has no effect here" in result.errors


def test_an_override_given_twice_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same key twice on the command line is as ambiguous as in the file."""
    result = run_here(capsys, "train", "r.yaml", "train.epochs=1", "train.epochs=2", "--check")
    assert result.code == 2
    assert "override train.epochs: is given twice" in result.errors
