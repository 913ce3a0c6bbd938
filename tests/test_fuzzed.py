"""Whatever a recipe, row, file header, chat template or command line holds: a result or exit 2, never a traceback.

The short form draws the same inputs each time; --full draws others at each run, and says how to repeat what it found.
"""

from __future__ import annotations

import contextlib
import csv
import faulthandler
import io
import itertools
import json
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import COMMANDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_folders import CONFIG, safetensors_bytes, write_model
from toy import CHATML, rows, write_recipe, write_rows

from lora_cli.cli import train_main
from lora_cli.recipe.keys import all_keys

pytestmark = pytest.mark.reliability("fuzzed")
ROOT = Path(__file__).resolve().parent.parent
SECONDS = 5
TIMES = 45
"""How often the inputs of the short form the long one draws."""
Fuzz = Callable[[int, st.SearchStrategy[Any], Callable[[Any], None]], None]


class TooLong(BaseException):
    """A command took longer than SECONDS; not an Exception, so that it does not catch this itself."""


@contextlib.contextmanager
def deadline() -> Iterator[None]:
    """End what takes SECONDS of the processor, or a minute in all; if Python itself stands still, with the process."""

    def stop(number: int, frame: object) -> None:
        raise TooLong(f"more than {SECONDS} s of the processor, or a minute")

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, 60))
    before = [signal.signal(number, stop) for number, _, _ in timers]
    faulthandler.dump_traceback_later(90, exit=True)
    for _, timer, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)
        faulthandler.cancel_dump_traceback_later()


def command(name: str, *arguments: str) -> tuple[int, str]:
    """Run a command in this process within the deadline, check what each promises, and return code and errors."""
    out, err = io.StringIO(), io.StringIO()
    with deadline(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = COMMANDS[name](arguments)
    errors = err.getvalue()
    told = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code in (0, 2), f"exit {code}: {errors}"
    assert bool(told) == (code == 2), errors
    assert "Traceback" not in errors
    assert all(len(line) < 2000 for line in told), errors[:3000]
    return code, errors


@pytest.fixture()
def fuzz(full: bool, record_property: pytest.RecordProperty) -> Fuzz:
    """Return a function that draws so many inputs, and TIMES as many in the long form, and tries each."""

    def run(number: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
        tried = 0
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        @settings(
            max_examples=number * TIMES if full else number,
            deadline=None,
            derandomize=not full,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def each(value: Any) -> None:
            nonlocal tried
            tried += 1
            check(value)

        each()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2**20, (
            "1 GB more memory (in KiB)"
        )
        record_property("cases", tried)

    return run


@pytest.fixture()
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with rows, a model of two tensors, and a token cache in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    write_rows(tmp_path / "train.jsonl", rows(5))
    write_model(tmp_path / "model")
    return tmp_path


GOOD = "model: {base: ./model}\ndata: {train: train.jsonl}\nrun: {output: out}\n"
RECIPES = [GOOD, *(path.read_text(encoding="utf-8") for path in sorted((ROOT / "configs").glob("*.yaml")))]
PIECES = [
    b"- ", b": ", b"{", b"}", b"[", b"]", b"&a ", b"*a", b"<<: ", b"!!", b"!x ", b"|\n", b">-\n", b"'", b'"', b"#",
    b"\n", b"\t", b"  ", b"---\n", b"...\n", b"%YAML 9\n", b"? ", b"\0", b"\xff", b"\xef\xbb\xbf", b"\\u", b"null",
    b"1e999", b".nan", b"0x1", b"\r", "ı😀".encode(), b"~", b"9" * 400, b"[" * 40, b"${HOME}",
    b"hf_abcdefghijklmnopqrstuvwxyz",
]  # fmt: skip


def mutated(seeds: list[bytes], pieces: list[bytes]) -> st.SearchStrategy[bytes]:
    """Return one of the seeds after a few cuts, copies and insertions."""

    def apply(seed: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
        for at, length, piece in edits:
            start = at % (len(seed) + 1)
            seed = seed[:start] + piece + seed[start + length :]
        return seed

    edit = st.tuples(
        st.integers(0, 5000),
        st.sampled_from([0, 0, 1, 2, 7, 60]),
        st.sampled_from(pieces) | st.binary(max_size=3),
    )
    return st.builds(apply, st.sampled_from(seeds), st.lists(edit, min_size=1, max_size=4))


def test_bytes_of_a_recipe(folder: Path, fuzz: Fuzz) -> None:
    """Every recipe of the project, damaged."""

    def check(content: bytes) -> None:
        (folder / "r.yaml").write_bytes(content)
        command("lora", "recipe", "show", "r.yaml")
        command("train", "r.yaml", "--check")

    fuzz(50, mutated([text.encode() for text in RECIPES], PIECES), check)


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["1e-4", "auto", "all-linear", "train.jsonl", "./model", "~nobody/x", "..", "a" * 300, "(", "\ud800"]
    )
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
KEYS = sorted({key.path for key in all_keys()})


def test_structures_of_a_recipe(folder: Path, fuzz: Fuzz) -> None:
    """Known and unknown keys with values of any kind, in a file and as overrides."""

    def check(drawn: tuple[dict[str, Any], list[tuple[str, Any]]]) -> None:
        blocks, overrides = drawn
        recipe: dict[str, Any] = yaml.safe_load(GOOD)
        for key, value in blocks.items():
            section, _, name = key.partition(".")
            inner = recipe.setdefault(section, {})
            if name and isinstance(inner, dict):
                inner[name] = value
            else:
                recipe[section] = value
        (folder / "r.yaml").write_bytes(json.dumps(recipe).encode("utf-8", "surrogatepass"))
        texts = [f"{key}={json.dumps(value)}".encode("utf-8", "replace").decode() for key, value in overrides]
        command("train", "r.yaml", "--check", *texts)

    keys = st.sampled_from(KEYS) | st.text("abtrain._ ", min_size=1, max_size=9)
    drawn = st.tuples(
        st.dictionaries(keys, values, max_size=3),
        st.lists(st.tuples(st.sampled_from(KEYS), values), max_size=2),
    )
    fuzz(50, drawn, check)


U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ROWS: list[dict[str, Any]] = [
    {"text": "a b c"},
    {"prompt": "q", "completion": "a"},
    {"prompt": [U], "completion": [A]},
    {"instruction": "q", "input": "x", "output": "a", "system": "s"},
    {"messages": [U, A, U, {**A, "reasoning_content": "r", "weight": 1}]},
    {"messages": [U, {**A, "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
                  {"role": "tool", "content": "1"}, A], "tools": [{"name": "f", "parameters": {}}]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"chosen": [U, A], "rejected": [U, A]},
    {"prompt": "q", "completion": "a", "label": True},
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value within a value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*path, key))


def spoilt(value: Any, edits: list[tuple[int, Any]]) -> Any:
    """Return a copy of a value, with others in some places of it."""
    value = json.loads(json.dumps(value))
    for at, other in edits:
        ways = list(places(value))[1:]
        if not ways:
            break
        *way, last = ways[at % len(ways)]
        inner = value
        for key in way:
            inner = inner[key]
        inner[last] = json.loads(json.dumps(other))  # a copy: the same one may be put into itself
    return value


cells = values | st.sampled_from(
    [
        "<|im_end|>",
        "<|im_start|>system\n",
        "{{ 7 * 7 }}",
        "{% for %}",
        "x" * 5000,
        "\0",
        "\ud800",
        " ",
        "a\u2028b",
    ]
)
edits = st.lists(st.tuples(st.integers(0, 99), cells), max_size=2)
written = st.tuples(
    st.lists(st.tuples(st.sampled_from(ROWS), edits), min_size=1, max_size=4),
    st.sampled_from(["a.jsonl", "a.jsonl", "a.json", "a.csv", "a.txt"]),
    st.sampled_from([b"", b"", b"", b"\xff", b"\n", b"}", b",", b'"', b"\0", b"\r\n"]),
    st.sampled_from(["auto", "auto", "model", "chatml", "alpaca", "plain"]),
)


def test_rows(folder: Path, base: Path, fuzz: Fuzz) -> None:
    """Rows of each format with other values in some places, in each kind of text file, tokenized as for training."""
    count = itertools.count()

    def check(drawn: tuple[list[tuple[dict[str, Any], list[tuple[int, Any]]]], str, bytes, str]) -> None:
        lines, name, extra, template = drawn
        found = [spoilt(row, changes) for row, changes in lines]
        if name == "a.csv":
            text = io.StringIO()
            writer = csv.writer(text)
            writer.writerow(lines[0][0])
            writer.writerows([list(map(str, row.values())) for row in found])
            content = text.getvalue().encode("utf-8", "surrogatepass")
        elif name == "a.json":
            content = json.dumps(found).encode()
        else:
            content = b"".join(json.dumps(row).encode() + b"\n" for row in found)
        at = len(content) // 2
        here = folder / f"rows{next(count)}"  # a folder of its own: file times decide what is read again
        here.mkdir()
        (here / name).write_bytes(content[:at] + extra + content[at:] if extra else content)
        (folder / "r.yaml").write_text(f"model: {{base: {base}}}\nrun: {{output: out}}\n")
        data = [f"data.train={here / name}", f"data.template={template}", "data.max_length=64"]
        command("lora", "data", "r.yaml", "--show", "1", *data)
        shutil.rmtree(here)

    fuzz(30, written, check)


def headers(seed: bytes) -> st.SearchStrategy[bytes]:
    """Return a safetensors file with other values in its header, of another length, or with other bytes."""
    size = int.from_bytes(seed[:8], "little")
    header, body = json.loads(seed[8 : 8 + size]), seed[8 + size :]

    def rebuild(changes: list[tuple[int, Any]], shift: int, cut: int) -> bytes:
        text = json.dumps(spoilt(header, changes)).encode()
        length = max(0, len(text) + shift) % 2**64
        whole = length.to_bytes(8, "little") + text + body
        return whole[: len(whole) - cut]

    numbers = st.sampled_from([0, 0, 0, 1, -1, 7, 2**40, 2**63])
    entries = values | st.sampled_from([[2**62, 4], [-1], [0, 2**63], "F32", "BF16", "F4", {}])
    changed = st.lists(st.tuples(st.integers(0, 99), entries), max_size=3)
    built = st.builds(rebuild, changed, numbers, st.sampled_from([0, 0, 0, 1, 9]))
    return built | mutated([seed], [b"\0", b"{", b'"', b"9", b"\xff"])


def test_a_models_files(folder: Path, fuzz: Fuzz) -> None:
    """config.json, tokenizer files, an index of shards and the header of the weights, damaged."""
    (folder / "r.yaml").write_text(GOOD)
    seed = safetensors_bytes({"embed": [6, 4], "proj": [4, 4]})
    others: dict[str, Any] = {
        "config.json": CONFIG,
        "tokenizer.json": {
            "version": "1.0",
            "model": {"type": "BPE"},
            "added_tokens": [{"id": 0, "content": "<s>"}],
        },
        "tokenizer_config.json": {
            "eos_token": {"content": "</s>"},
            "chat_template": CHATML,
            "extra_special_tokens": [],
        },
        "generation_config.json": {"eos_token_id": [1, 2]},
        "model.safetensors.index.json": {"weight_map": {"embed": "model.safetensors"}, "metadata": {}},
    }

    def check(drawn: tuple[bytes, str, list[tuple[int, Any]], bytes]) -> None:
        weights, name, changes, extra = drawn
        model = write_model(folder / "model")
        (model / "model.safetensors").write_bytes(weights)
        (model / name).write_bytes(json.dumps(spoilt(others[name], changes)).encode() + extra)
        command("train", "r.yaml", "--check")
        command("lora", "inspect", "model", "model.base=./model")
        shutil.rmtree(model)

    content = st.lists(st.tuples(st.integers(0, 99), values), max_size=3)
    extra = st.sampled_from([b"", b"", b"}", b"\xff", b"\0"])
    fuzz(30, st.tuples(st.just(seed) | headers(seed), st.sampled_from(sorted(others)), content, extra), check)


def test_an_adapters_files(folder: Path, base: Path, fuzz: Fuzz) -> None:
    """adapter_config.json and the header of the adapter's weights, damaged: merged, and as a start."""
    recipe = write_recipe(folder, base, train__max_steps=1)
    assert train_main([str(recipe)]) == 0
    sound, adapter, count = folder / "run" / "adapter", folder / "adapter", itertools.count()
    seed = (sound / "adapter_model.safetensors").read_bytes()
    config = json.loads((sound / "adapter_config.json").read_text())

    def check(drawn: tuple[bytes, list[tuple[int, Any]]]) -> None:
        weights, changes = drawn
        shutil.copytree(sound, adapter)
        (adapter / "manifest.json").unlink()
        (adapter / "adapter_model.safetensors").write_bytes(weights)
        (adapter / "adapter_config.json").write_text(json.dumps(spoilt(config, changes)))
        output = folder / f"merged{next(count)}"
        command("merge", "adapter", "--output", str(output), f"model.base={base}", "model.dtype=float32")
        start = ["adapter.init_from=./adapter", "run.output=third", "adapter={method: lora}"]
        command("train", "recipe.yaml", "--check", *start)
        shutil.rmtree(adapter)
        shutil.rmtree(output, ignore_errors=True)

    changed = st.lists(st.tuples(st.integers(0, 99), values), max_size=2)
    fuzz(15, st.tuples(st.just(seed) | headers(seed), changed), check)


JINJA = [
    "{{", "}}", "{%", "%}", "{#", "{% for m in messages %}", "{% endfor %}", "{% if ", "{% endif %}",
    "{{ m.content }}", "{{ m.role }}", "messages[0]", ".__class__", "|tojson", "|length", "{% set x = ",
    "{% macro f() %}", "{{ f() }}", "range(10**9)", "range(99999)", "'a' * 10**9", "10**10**7",
    "{{ cycler() }}", "namespace(a=1)", "{% generation %}", "{% endgeneration %}", "{% break %}",
    "{{ raise_exception('x') }}", "strftime_now('%Y')", "{{ bos_token }}", "loop", "{% include 'x' %}",
    "{% import 'os' as os %}", "{{ '%999999999d' % 1 }}", "|format(1)", "{{ [1]|map('x') }}", "\0",
]  # fmt: skip


def test_a_chat_template(folder: Path, base: Path, fuzz: Fuzz) -> None:
    """A template file of the user's, sound or not, hostile or not."""
    (folder / "r.yaml").write_text(
        f"model: {{base: {base}}}\ndata: {{train: train.jsonl, template: ./t.jinja}}\nrun: {{output: out}}\n"
    )

    def check(content: bytes) -> None:
        (folder / "t.jinja").write_bytes(content)
        command("train", "r.yaml", "--check")

    pieces = st.lists(st.sampled_from(JINJA) | st.text(max_size=3), max_size=6)
    free = pieces.map(lambda parts: " ".join(parts).encode("utf-8", "replace"))
    fuzz(30, free | mutated([CHATML.encode()], [piece.encode() for piece in JINJA]), check)


WORDS = [
    "r.yaml", "model", "train.jsonl", ".", "..", "nothing", "--check", "--resume", "--no-resume", "--overwrite",
    "--allow", "--min", "--max", "loss=1", "exact_match=x", "--json", "--show", "-1", "3", "--row",
    "train.jsonl:1", "--html", "x.html", "--strict", "--output", "out", "--dtype", "bfloat16", "--adapter",
    "portable", "recipe", "show", "explain", "--schema", "train.lr", "train", "eval", "merge", "data",
    "inspect", "--all", "-h", "--", "-", "", "=", "a=", "model.base=./model", "run.output=/dev/null/x",
    "data.train=/dev/zero", "data.train=/dev/null", "--version", "\n", "\ud800", "é", "x" * 5000,
]  # fmt: skip


def test_command_lines(folder: Path, fuzz: Fuzz) -> None:
    """Words of the commands in any order, and words that are none."""
    (folder / "r.yaml").write_text(GOOD.replace("train.jsonl", "missing.jsonl"))

    def check(drawn: tuple[str, list[str]]) -> None:
        name, words = drawn
        command(name, *words)

    words = st.sampled_from(WORDS) | st.text(max_size=5) | st.sampled_from(KEYS).map(lambda key: f"{key}=1")
    fuzz(40, st.tuples(st.sampled_from(sorted(COMMANDS)), st.lists(words, max_size=5)), check)
