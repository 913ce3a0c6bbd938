"""`models/safety.py`: which model folders are let through, and what is said about the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run_here, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folders import CONFIG, safetensors_bytes, shard, write_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from toy import write_base
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lora_cli.errors import InputError
from lora_cli.models.safety import check_model_folder
from lora_cli.models.weight_files import read_header, stored_names


def _set(name: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | values))

    return change


def _write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def _remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def _cut(end: int) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:end])

    return change


def _pickled_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def _linked(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder.parent / "elsewhere").write_text("{}")
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return change


def _header(**entry: object) -> bytes:
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry
    text = json.dumps({"w": tensor}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (_remove("config.json"), "no config.json"),
    "config is not JSON": (_write("config.json", b"{"), "not valid JSON"),
    "config is a list": (_write("config.json", b"[]"), "not a JSON object"),
    "config is not UTF-8": (_write("config.json", b"\xff\xfe{}"), "not valid JSON"),
    "config nests too deep": (_write("config.json", b'{"a":' + b"[" * 100_000), "not valid JSON"),
    "auto_map": (_set("config.json", auto_map={"AutoModel": "m.py"}), "auto_map names code"),
    "internal attention": (_set("config.json", _attn_implementation_internal="x/y"), "names code"),
    "nested remote code": (_set("config.json", text_config={"trust_remote_code": True}), "text_config.trust"),
    "remote code in a list": (_set("config.json", parts=[{"auto_map": {"a": "b"}}]), "names code"),
    "tokenizer code": (_set("tokenizer_config.json", auto_map={"AutoTokenizer": ["t.py"]}), "names code"),
    "generation code": (_set("generation_config.json", custom_generate="x/y"), "names code"),
    "tokenizer code as a list": (_set("tokenizer_config.json", auto_map=["t.T", None]), "names code"),
    "kernel as attention": (_set("config.json", _attn_implementation="x/y"), "names code to run, a kernel"),
    "kernel of a revision": (
        _set("config.json", attn_implementation="y@main"),
        "names code to run, a kernel",
    ),
    "kernel of a part": (_set("config.json", attn_implementation={"": "sdpa", "text": "x/y:f"}), "a kernel"),
    "kernel in a part": (
        _set("config.json", text_config={"_attn_implementation": "x/y"}),
        "text_config._attn",
    ),
    "kernel as experts": (_set("config.json", experts_implementation="x|y"), "names code to run, a kernel"),
    "internal experts": (_set("config.json", _experts_implementation_internal="x"), "names code"),
    "config by version": (_set("config.json", configuration_files=["config.4.0.json"]), "names other files"),
    "tokenizer by version": (
        _set("tokenizer_config.json", fast_tokenizer_files=["tokenizer.4.json"]),
        "names other",
    ),
    "weights by name": (_set("config.json", transformers_weights="x.safetensors"), "names other files"),
    "more files": (_set("config.json", extra_files=["x.bin"]), "extra_files names other files"),
    "arguments of a tokenizer": (
        _set("tokenizer_config.json", init_inputs=["x"]),
        "init_inputs names other files",
    ),
    "adapter beside": (_write("adapter_config.json", b"{}"), "adapter_config.json: lies beside a model"),
    "distributed": (_write("shard-00000-model-00001-of-00001.safetensors", b""), "a distributed checkpoint"),
    "linked tokenizer": (_linked("tokenizer.model"), "is a link out of the folder"),
    "linked template": (_linked("additional_chat_templates/x.jinja"), "is a link out of the folder"),
    "no model type": (_set("config.json", model_type=None), "no model_type"),
    "encoder": (_set("config.json", model_type="bert"), "not a decoder-only"),
    "encoder-decoder": (_set("config.json", is_encoder_decoder=True), "encoder-decoder"),
    "a billion layers": (_set("config.json", num_hidden_layers=10**9), "(download it again)"),
    "a billion experts": (
        _set("config.json", num_experts=10**9, moe_intermediate_size=64),
        "the weight files hold",
    ),
    "a huge head": (_set("config.json", head_dim=10**10), "the weight files hold"),
    "a million learned positions": (_set("config.json", n_positions=10**6), "the weight files hold"),
    "a shard of an endless name": (lambda f: shard(f, {"embed": "x" * 5000 + ".safetensors"}), "not there"),
    "huge hidden size": (_set("config.json", hidden_size=10**400), "1e+13"),
    "larger than its weights": (_set("config.json", hidden_size=100_000), "the weight files hold"),
    "no weights": (_remove("model.safetensors"), "no weights"),
    "pickled weights only": (_pickled_only, "convert to safetensors"),
    "empty weights": (_write("model.safetensors", b""), "cut off in its header"),
    "header cut off": (_cut(20), "cut off in its header"),
    "body cut off": (_cut(-1), "its header says"),
    "longer than its header": (_write("model.safetensors", _header() + b"\0"), "its header says"),
    "header length 2^63": (_write("model.safetensors", b"\0" * 7 + b"\x80{}"), "cut off in its header"),
    "header is not JSON": (_write("model.safetensors", b"\2\0\0\0\0\0\0\0{]"), "not valid JSON"),
    "negative shape": (_write("model.safetensors", _header(shape=[-2])), "damaged"),
    "shape and bytes differ": (_write("model.safetensors", _header(shape=[3])), "damaged"),
    "offsets are text": (_write("model.safetensors", _header(data_offsets=["0", "8"])), "damaged"),
    "no tensors": (_write("model.safetensors", safetensors_bytes({})), "no tensor"),
    "absent shard": (lambda f: shard(f, {"embed": "a.safetensors", "x": "c.safetensors"}), "not there"),
    "shard elsewhere": (lambda f: shard(f, {"embed": "../a.safetensors"}), "not a plain file name"),
    "shard is absolute": (lambda f: shard(f, {"embed": "/etc/a.safetensors"}), "not a plain file name"),
    "shard is pickled": (lambda f: shard(f, {"embed": "a.bin"}), "not a safetensors file"),
    "index without a map": (lambda f: shard(f, {}), "weight_map"),
    "no tokenizer": (_remove("tokenizer.json"), "no tokenizer.json"),
    "tokenizer is not JSON": (_write("tokenizer.json", b"x"), "tokenizer.json: not valid JSON"),
}


def _linked_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "weights")
    (folder / "model.safetensors").symlink_to(folder.parent / "weights")


FINE: dict[str, Callable[[Path], object]] = {
    "an attention by name": _set(
        "config.json", _attn_implementation="flash_attention_2", attn_implementation=None
    ),
    "no inputs": _set("tokenizer_config.json", init_inputs=[], fast_tokenizer_files=None),
    "no remote code": _set("config.json", trust_remote_code=False, auto_map=None),
    "pickles beside": _write("pytorch_model.bin", b"\x80\x04."),
    "a link within": lambda folder: (folder / "tokenizer.model").symlink_to("tokenizer.json"),
    "linked weights": _linked_weights,
}


@pytest.mark.parametrize("case", FINE)
def test_what_is_harmless_is_let_through(tmp_path: Path, case: str) -> None:
    """Plain names, empty entries, pickles that nobody reads, and links within the folder are no fault."""
    folder = write_model(tmp_path / "model")
    FINE[case](folder)
    assert check_model_folder(folder).parameters == 40


def test_links_of_the_hubs_cache_are_let_through(tmp_path: Path) -> None:
    """A snapshot's files are links to blobs of the model, or to those that models share; no other link passes."""
    model = tmp_path / "models--x--y"
    folder = write_model(model / "snapshots" / "0123")
    (model / "blobs").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).rename(model / "blobs" / name)
        (folder / name).symlink_to(f"../../blobs/{name}")
    (tmp_path / "blobs").mkdir()
    (model / "blobs" / "tokenizer.json").rename(tmp_path / "blobs" / "ab")
    (model / "blobs" / "tokenizer.json").symlink_to("../../blobs/ab")
    assert check_model_folder(folder).parameters == 40
    (tmp_path / "secret").write_text("{}")
    (folder / "added_tokens.json").symlink_to("../../../secret")
    with pytest.raises(InputError, match=r"added_tokens\.json: is a link out of the folder"):
        check_model_folder(folder)


def test_weights_come_before_an_index(tmp_path: Path) -> None:
    """Of a folder with both, what transformers reads is judged: model.safetensors, whatever the index says."""
    folder = write_model(tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"embed": "../../evil.bin"}}))
    assert stored_names(folder) == {"embed": "model.safetensors", "proj": "model.safetensors"}
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="cut off"):
        check_model_folder(folder)


def test_transformers_would_read_what_is_refused(tmp_path: Path) -> None:
    """The keys that name other files do lead it there: another config, another tokenizer, other weights."""
    base = write_base(tmp_path / "base")
    for name, key, value in (
        ("config", "configuration_files", ["config.4.0.0.json"]),
        ("tokenizer_config", "fast_tokenizer_files", ["tokenizer.4.0.0.json"]),
    ):
        content = json.loads((base / f"{name}.json").read_text())
        (base / f"{name}.json").write_text(json.dumps(content | {key: value}))
    config = json.loads((base / "config.json").read_text())
    (base / "config.4.0.0.json").write_text(json.dumps(config | {"hidden_size": 16}))
    (base / "tokenizer.4.0.0.json").write_text("not one")
    assert AutoConfig.from_pretrained(base).hidden_size == 16
    with pytest.raises(Exception, match=r"expected|Expecting"):
        AutoTokenizer.from_pretrained(base)
    del config["configuration_files"]
    (base / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    with pytest.raises(OSError, match=r"other\.safetensors|No such file"):
        AutoModelForCausalLM.from_pretrained(base)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_refused_in_one_line_that_names_it(tmp_path: Path, case: str) -> None:
    """Every fault is an InputError of one line that names the folder and says what was found."""
    change, expected = BAD[case]
    folder = write_model(tmp_path / "model")
    change(folder)
    with pytest.raises(InputError) as refusal:
        check_model_folder(folder)
    assert len(refusal.value.lines) == 1, refusal.value.lines
    assert expected in refusal.value.lines[0]
    assert str(folder) in refusal.value.lines[0]


def test_all_faults_of_a_folder_are_told_at_once(tmp_path: Path) -> None:
    """Config, weights and tokenizer are judged even when another of them is bad."""
    folder = write_model(tmp_path / "model", auto_map={"AutoModel": "m.py"}, model_type="t5")
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError) as refusal:
        check_model_folder(folder)
    assert len(refusal.value.lines) == 4


def test_a_path_that_is_no_model_folder_is_refused(tmp_path: Path) -> None:
    """A missing folder, a file and an adapter folder each get their own words."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for name, expected in {"gone": "no such folder", "file": "not a folder", "adapter": "an adapter"}.items():
        with pytest.raises(InputError, match=expected):
            check_model_folder(tmp_path / name)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_header_of_a_sound_folder(tmp_path: Path, sharded: bool) -> None:
    """Parameters, bytes and types are those of the stored tensors, in one file or in shards."""
    folder = write_model(tmp_path / "model")
    if sharded:
        shard(folder, {"embed": "a.safetensors", "proj": "b.safetensors"})
    header = check_model_folder(folder)
    assert (header.model_type, header.architectures) == ("llama", ("LlamaForCausalLM",))
    assert (header.parameters, header.bytes, header.dtypes, header.tied) == (40, 160, ("F32",), True)


def test_the_words_of_a_vocabulary_are_not_taken_for_code(tmp_path: Path) -> None:
    """`auto_map` may be a token of the vocabulary."""
    folder = write_model(tmp_path / "model")
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"auto_map": 1}}}))
    check_model_folder(folder)


def test_a_file_that_safetensors_wrote_is_read_alike(tmp_path: Path) -> None:
    """Names, shapes and types agree with the safetensors library, metadata and scalars included."""
    tensors = {
        "a": torch.zeros(3, 2, dtype=torch.bfloat16),
        "b": torch.zeros(5, dtype=torch.int64),
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "x.safetensors")
    assert {name: count for name, (_, count, _) in found.items()} == {
        n: t.numel() for n, t in tensors.items()
    }
    assert {name: size for name, (_, _, size) in found.items()} == {n: t.nbytes for n, t in tensors.items()}
    assert found["a"][0] == "BF16"


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(values=st.dictionaries(st.sampled_from([*CONFIG, "text_config", "auto_map", "n_positions"]), _json))
def test_any_config_is_judged(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    """Whatever JSON stands in a config, the folder is let through or refused with an InputError."""
    folder = write_model(tmp_path_factory.mktemp("config"), **values)
    try:
        header = check_model_folder(folder)
    except InputError:
        return
    assert header.parameters == 40


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_what_safetensors_refuses_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """After any change of bytes the file is refused, or read as the safetensors library reads it."""
    content = bytearray(safetensors_bytes({"embed": [3, 2], "proj": [2]}))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    path.write_bytes(content)
    try:
        read_header(path)
    except InputError:
        return
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        # It knows fewer types and escapes than JSON allows; sizes and offsets must not pass here.
        assert "invalid" in str(error).lower() or "unknown" in str(error).lower(), error  # noqa: PT017


@pytest.mark.reliability("malformed")
@pytest.mark.parametrize("case", BAD)
def test_the_command_refuses_a_bad_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """`lora-train` ends with exit 2 and one line that says what was found, and writes nothing."""
    change, expected = BAD[case]
    monkeypatch.chdir(tmp_path)
    change(write_model(tmp_path / "model"))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "r.yaml").write_text(
        "model: {base: ./model}\ndata: {train: rows.jsonl}\nrun: {output: out}\n"
    )
    before = snapshot(tmp_path)
    result = run_here(capsys, "train", "r.yaml")
    assert result.code == 2
    (line,) = result.errors.splitlines()
    assert line.startswith("error: ")
    assert expected in line
    assert snapshot(tmp_path) == before
