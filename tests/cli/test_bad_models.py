"""Bad base models on the command line: exit 2, one line that names the folder and the fault, soon, nothing written.

Faults of single files, of which each has one, stand in tests/models/test_safety.py (BAD) and are tried here too by the
command; the others below are folders that only a loaded model or tokenizer shows to be bad.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run_here, snapshot
from safetensors.torch import load_file, save_file
from toy import rows, write_base, write_rows

pytestmark = pytest.mark.reliability("malformed")
RECIPE = (
    "model: {base: ./model, dtype: float32}\ndata: {train: train.jsonl}\nrun: {output: out, device: cpu}\n"
)
WEIGHTS = "model.safetensors"


def config(**values: Any) -> Callable[[Path], object]:
    """Return a change of config.json; a value of ... removes the key."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text()) | values
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return change


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Return a change of the weights."""

    def change(folder: Path) -> None:
        content = load_file(folder / WEIGHTS)
        edit(content)
        save_file(content, folder / WEIGHTS, {"format": "pt"})

    return change


def template(text: str) -> Callable[[Path], object]:
    """Return a change of the model's chat template."""
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def tokenizer(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Return a change of tokenizer.json."""

    def change(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        edit(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return change


def _more_tokens_than_rows(content: dict[str, torch.Tensor]) -> None:
    content["model.embed_tokens.weight"] = content["model.embed_tokens.weight"][:40].clone()


def _embedding_of_40(folder: Path) -> None:
    tensors(_more_tokens_than_rows)(folder)
    config(vocab_size=40)(folder)


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _a_loop_of_links(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to("model")


def _of_unknown_numbers(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content.replace(b'"F32"', b'"F99"', 1))


def _unreadable_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    # The weights are not those of the config
    "a layer too many": (config(num_hidden_layers=3), "weights are missing"),
    "a weight missing": (tensors(lambda content: content.pop("model.norm.weight")), "weights are missing"),
    "a weight of another shape": (config(intermediate_size=32), "weights are mismatched"),
    "an embedding of other rows": (tensors(_more_tokens_than_rows), "weights are mismatched"),
    "tokens beyond the embedding": (_embedding_of_40, "the model's embedding ends at 39"),
    "heads that do not divide": (config(num_attention_heads=5, head_dim=...), "attention heads (5)"),
    "no heads": (config(num_attention_heads=0), "model"),
    "negative layers": (config(num_hidden_layers=-1), "model"),
    "sizes as text": (config(hidden_size="32"), "model"),
    "an unknown activation": (config(hidden_act="gleu"), "gleu"),
    "an unknown type": (config(model_type="lama3"), "lama3"),
    "an unknown rope": (config(rope_scaling={"rope_type": "yarnn", "factor": 2.0}), "model"),
    "another quantization": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantiz"),
    # Tokenizers that cannot be used
    "no model in the tokenizer": (tokenizer(lambda content: content.pop("model")), "tokenizer"),
    "an unknown kind of tokenizer": (tokenizer(lambda content: content["model"].update(type="X")), "tokenizer"),
    "merges that do not exist": (tokenizer(lambda content: content["model"].update(merges=["zz yy"])), "tokenizer"),
    "a tokenizer's config that is a list": (
        lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "tokenizer_config.json"
    ),
    # Chat templates that cannot be rendered, or do harm
    "a template that reads classes": (template("{{ ''.__class__.__mro__ }}"), "no template may"),
    "a template without end": (
        template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
        "does not end within",
    ),
    "a template of a gigabyte": (template("{{ 'x' * 10**9 }}{{ 'y' * 10**9 }}"), "memory"),
    "a template that is none": (template("{% for m in messages %}"), "chat template fails"),
    "a template that includes": (template("{% include '/etc/passwd' %}"), "chat template"),
    "a template that writes nothing": (template("{# nothing #}"), "template"),
    "a template without the answer": (template("{{ messages[0].content }}"), "template"),
    # Folders
    "an unknown kind of numbers": (_of_unknown_numbers, "F99"),
    "empty": (_empty, "config.json"),
    "a loop of links": (_a_loop_of_links, "model"),
    "weights that are a pipe": (_unreadable_weights, "model.safetensors"),
}  # fmt: skip


TWICE = "a tokenizer's config that is a list"
"""Told as a fault of the folder, and of the chat template that was looked for in it."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model folder that no test changes."""
    return write_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture()
def folder(tmp_path: Path, sound: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a sound model, rows and a recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    shutil.copytree(sound, tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", rows(9))
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


def seconds() -> float:
    """Return the processor's time of this process."""
    used = os.times()
    return used.user + used.system


@pytest.mark.parametrize("name", BAD)
def test_a_bad_model(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """One line with what was found, no traceback, under 5 s, and nothing is left but tokens of sound rows."""
    change, message = BAD[name]
    change(folder / "model")
    before = set(snapshot(folder))
    began = seconds()
    result = run_here(capsys, "train", "r.yaml")
    assert seconds() - began < 5
    assert result.code == 2, result.errors
    lines = result.errors.splitlines()
    assert len(lines) == (2 if name == TWICE else 1), lines
    assert all(line.startswith("error: ") and len(line) < 1000 for line in lines)
    assert message in lines[0]
    left = {path for path in snapshot(folder) if not path.startswith("cache")}
    assert left == {path for path in before if not path.startswith("cache")}
