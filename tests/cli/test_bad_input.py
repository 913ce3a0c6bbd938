"""Bad recipes, paths, data and models on the command line: exit 2, a line per problem, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from command_line import Result, run_here, run_process, snapshot
from model_folders import write_model

from lora_cli.runtime.run_folder import MARK

pytestmark = pytest.mark.reliability("malformed")
ROWS = '{"prompt": "a", "completion": "b"}\n' * 3
GOOD = "model: {base: ./base}\ndata: {train: rows.jsonl}\nrun: {output: out}\n"


@dataclass
class Case:
    """A command in a folder that is sound but for `change`, and a part of each line it must print."""

    expected: list[str]
    recipe: str | bytes = GOOD
    overrides: list[str] = field(default_factory=list)
    change: Callable[[Path], object] = lambda folder: None


def yaml(text: str, *expected: str) -> Case:
    """A case of a bad recipe."""
    return Case(list(expected), recipe=text)


def over(expected: str, *overrides: str, change: Callable[[Path], object] = lambda folder: None) -> Case:
    """A case of a good recipe with bad overrides or options, or in a folder that `change` spoilt."""
    return Case([expected], overrides=list(overrides), change=change)


def _bomb() -> str:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{y}: &{y} [{', '.join([f'*{x}'] * 10)}]" for x, y in zip("abcdefgh", "bcdefghi", strict=True)]
    return "\n".join(lines)


def _unfinished(folder: Path) -> None:
    (folder / "out" / "checkpoints").mkdir(parents=True)
    (folder / "out" / "recipe.yaml").write_text(f"{MARK}\n")
    (folder / "out" / "metrics.jsonl").write_text("{}")


def _put(name: str, text: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    return change


def _model(**config: object) -> Callable[[Path], object]:
    return lambda folder: write_model(folder / "base", **config)


def _remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def _link(folder: Path) -> None:
    (folder / "gone.jsonl").symlink_to("nowhere.jsonl")


CASES: dict[str, Case] = {
    # What is not YAML, or not the YAML of a recipe
    "empty": yaml("", "r.yaml:1:1: the recipe is empty"),
    "list": yaml("- a", "r.yaml:1:1: found a list"),
    "scalar": yaml("hello", "r.yaml:1:1: found a single value"),
    "tab": yaml("train:\n\tepochs: 1", "r.yaml:2:1: found a tab in the indentation"),
    "open quote": yaml("model: {base: 'x}\n", "not valid YAML"),
    "two documents": yaml("a: 1\n---\nb: 1", "r.yaml:2:1: found a second document"),
    "python tag": yaml("run: !!python/object/apply:os.system ['touch canary']", "found the tag"),
    "unknown tag": yaml("run: {output: !env HOME}", "found the tag '!env'"),
    "duplicate key": yaml("run: {seed: 1}\nrun: {seed: 2}", "r.yaml:2:1: run: the key is written twice"),
    "self reference": yaml("run: &a {output: *a}", "inside its own anchor"),
    "alias bomb": yaml(_bomb(), "more than 10000 values"),
    "deep": yaml("[" * 3000, "nested deeper than 32"),
    "not UTF-8": Case(["r.yaml:1:16: the file is not UTF-8"], recipe=b"run: {output: '\xff'}"),
    "NUL": yaml("run: {seed: 1}\n\0", "r.yaml:2:1: found the control character"),
    "too large": yaml("# " + "x" * 1_100_000, "larger than 1 MB"),
    # Keys and values
    "unknown block": yaml("modle: {}", "r.yaml:1:1: modle: unknown key (did you mean model?)"),
    "unknown key": yaml("train: {learning_rat: 1}", "did you mean train.learning_rate?"),
    "foreign key": yaml("per_device_train_batch_size: 4", "did you mean train.batch_size?"),
    "unknown nested key": yaml("data: {fields: {prompt: a, completion: b, sytem: c}}", "data.fields.system?"),
    "text for a number": yaml("train: {epochs: three}", "r.yaml:1:9: train.epochs: found the text 'three'"),
    "yes is text": yaml("train: {epochs: yes}", "found the text 'yes'"),
    "octal is text": yaml("run: {seed: 010}", "found the text '010'"),
    "sexagesimal is text": yaml("run: {seed: 12:30:45}", "found the text '12:30:45'"),
    "date is text": yaml("run: {seed: 2024-01-01}", "found the text '2024-01-01'"),
    "no interpolation": yaml("run: {seed: '${HOME}'}", "found the text '${HOME}'"),
    "nan": yaml("train: {learning_rate: .nan}", "found NaN"),
    "infinity": yaml("train: {epochs: .inf}", "found Infinity"),
    "negative": yaml("train: {batch_size: -1}", "found -1"),
    "zero": yaml("adapter: {rank: 0}", "found 0"),
    "2^63": yaml("train: {max_steps: 9223372036854775808}", "found 9223372036854775808"),
    "dropout 1": yaml("adapter: {dropout: 1.0}", "below 1"),
    "missing required": yaml("data: {fields: {prompt: a}}", "data.fields.completion: is missing"),
    "unknown method": yaml("adapter: {method: lroa}", "did you mean lora?"),
    "key of another method": yaml("adapter: {method: full, rank: 8}", "is a key of lora"),
    "warm-up beyond the end": yaml("train: {max_steps: 5, warmup: 9}", "train.warmup: found 9"),
    "evaluation without rows": yaml("train: {eval_every: 5}", "set data.eval"),
    "secret": yaml("model: {token: hf_AAAABBBBCCCCDDDDEEEE}", "a secret has no place in a recipe"),
    "five at once": yaml(
        "modle: {}\ntrain: {lr: 1, epochs: 0}\nadapter: {rank: x}\nrun: {seed: -1}",
        "1:1: modle", "2:9: train.lr", "2:16: train.epochs", "3:11: adapter.rank", "4:7: run.seed",
    ),
    # Overrides
    "unknown override": over("override lr=1: lr: unknown key", "lr=1"),
    "override without a value": over("found no key and value", "train.epochs"),
    "method by override": over("chosen by override adapter.method", "adapter.rank=3", "adapter.method=full"),
    "gate on an unknown score": over("--min los=1: unknown score", "--min", "los=1"),
    "gate without rows": over("set data.eval", "--max", "loss=1"),
    "resume and overwrite": over("exclude each other", "--resume", "--overwrite"),
    # Data
    "no data": Case(["data.train: not set"], recipe="model: {base: ./base}\nrun: {output: out}"),
    "data missing": yaml(GOOD.replace("rows", "row"), "2:8: data.train: row.jsonl: no such"),
    "data is a folder without rows": over("base/config.json", "data.train=./base"),
    "data of an unknown type": over("file type '.xyz'", "data.train=./r.xyz", change=_put("r.xyz", "x")),
    "data is a dead link": over("data.train", "data.train=gone.jsonl", change=_link),
    "data empty": over("rows.jsonl", change=_put("rows.jsonl", "")),
    "data is not JSON": over("rows.jsonl:1", change=_put("rows.jsonl", "{x\n")),
    "data is a URL": over("data.train", "data.train=https://example.org/rows.jsonl"),
    "data has a line break in its name": over("holds a NUL or a line break", 'data.train="a\\nb.jsonl"'),
    "data name too long": over("at most 255", f"data.train={'x' * 300}.jsonl"),
    "held-out rows missing": over("data.eval: ./no.jsonl: no such file", "data.eval=./no.jsonl"),
    # Model
    "model missing": over("model.base: ./bsae: no such folder (did you mean base?)", "model.base=./bsae"),
    "model is a file": over("is not a folder", "model.base=./rows.jsonl"),
    "model is no hub id": over("no such folder", "model.base=a b"),
    "model names code": over("auto_map names code", change=_model(auto_map={"A": "b.C"})),
    "model is an encoder": over("not a decoder-only", change=_model(model_type="bert")),
    "model without a tokenizer": over("no tokenizer.json", change=_remove("base/tokenizer.json")),
    "model cut off": over("cut off", change=_put("base/model.safetensors", "\x08")),
    "model with a revision": over("model.revision: ./base is a local folder", "model.revision=main"),
    # Output
    "output is a file": over("run.output: rows.jsonl is not a folder", "run.output=rows.jsonl"),
    "output below a file": over("run.output", "run.output=rows.jsonl/run"),
    "output holds other files": over("out holds other files (mine.txt)", change=_put("out/mine.txt", "x")),
    "output holds an unfinished run": over("--overwrite starts again", "--no-resume", change=_unfinished),
    "allow a key that is none": over("--allow train.lr: unknown key", "--allow", "train.lr"),
    "output is the model": over("in the base model's folder", "run.output=./base"),
    "output in the model": over("in the base model's folder", "run.output=out/../base/run"),
    "output empty": over("the name is empty", "run.output=''"),
    "output name too long": over("at most 255", f"run.output={'x' * 300}"),
    "all at once": Case(
        ["data.train: ./no.jsonl", "model.base: ./no", "run.output: rows.jsonl is not a folder"],
        overrides=["data.train=./no.jsonl", "model.base=./no", "run.output=rows.jsonl"],
    ),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a sound model and rows."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text(ROWS)
    return tmp_path


def assert_refused(result: Result, expected: list[str]) -> None:
    """Exit 2, nothing on stdout, and on stderr one line per problem in this order."""
    lines = result.errors.splitlines()
    assert result.code == 2, result.errors
    assert len(lines) == len(expected), result.errors
    for line, part in zip(lines, expected, strict=True):
        assert line.startswith("error: ")
        assert part in line
    assert result.output == ""


OWN_PROCESS = frozenset(list(CASES)[::6])


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Exit 2, exactly one `error: ` line per problem, no traceback, and not a byte written anywhere."""
    case = CASES[name]
    recipe = case.recipe.encode() if isinstance(case.recipe, str) else case.recipe
    (folder / "r.yaml").write_bytes(recipe)
    case.change(folder)
    before = snapshot(folder)
    assert_refused(run_here(capsys, "train", "r.yaml", *case.overrides), case.expected)
    if name in OWN_PROCESS:
        assert_refused(run_process(folder, "train", "r.yaml", *case.overrides), case.expected)
    assert snapshot(folder) == before


def _adapter(folder: Path) -> None:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        ("train", [], ["Missing argument 'RECIPE'"]),
        ("train", ["no.yaml"], ["no.yaml: no such file"]),
        ("train", ["base"], ["base: is a folder"]),
        ("train", ["r.yaml", "--nope"], ["No such option: --nope"]),
        ("train", ["r.yaml", "--train.epochs=1"], ["an override has no dashes"]),
        ("train", ["model.base=x"], ["no such file (give a recipe file)"]),
        ("train", ["a\nb"], ["no such file"]),
        ("eval", ["bsae"], ["bsae: no such folder (did you mean base?)"]),
        ("eval", ["rows.jsonl"], ["rows.jsonl: is not a folder"]),
        ("eval", ["."], ["neither a run, an adapter nor a model"]),
        ("eval", ["base"], ["data.eval: not set"]),
        ("eval", ["base", "data.eval=rows.jsonl", "--min", "exact_match=1"], ["add exact_match to"]),
        ("eval", ["adapter", "data.eval=rows.jsonl"], ["model.base=..."]),
        ("eval", ["adapter", "model.base=./no"], ["model.base: ./no: no such folder", "data.eval: not set"]),
        ("eval", ["~no-such-user/run"], ["~no-such-user/run: no such folder"]),
        ("train", ["r.yaml", "run.output=~no-such-user"], ["run.output: ~no-such-user: there is no user of that name"]),
        ("merge", ["base"], ["Missing option '--output'"]),
        ("merge", ["adapter", "--output", "~no-such-user/out", "model.base=./base"], ["no user of that name"]),
        ("merge", ["adapter", "--output", "out", "model.base=./base", "--dtype", "int8"], ["Invalid value"]),
        ("merge", ["adapter", "--output", "base", "model.base=./base"], ["in the base model's folder"]),
        ("merge", ["adapter", "--output", "adapter", "model.base=./base"], ["is in the folder that is read"]),
        ("merge", ["adapter", "--output", "rows.jsonl", "model.base=./base"], ["rows.jsonl exists already"]),
        ("lora", [], ["Missing command"]),
        ("lora", ["trian"], ["No such command 'trian'"]),
        ("lora", ["train", "no.yaml"], ["no.yaml: no such file"]),
        ("lora", ["recipe", "explain", "lr"], ["did you mean train.learning_rate?"]),
        ("lora", ["recipe", "show", "r.yaml", "lr=1"], ["did you mean train.learning_rate?"]),
    ],
)  # fmt: skip
def test_a_bad_command_line_is_refused(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    arguments: list[str],
    expected: list[str],
) -> None:
    """Every command ends with exit 2 and one line per problem."""
    (folder / "r.yaml").write_text(GOOD)
    _adapter(folder)
    before = snapshot(folder)
    assert_refused(run_here(capsys, command, *arguments), expected)
    if len(arguments) == 1:
        assert_refused(run_process(folder, command, *arguments), expected)
    assert snapshot(folder) == before
