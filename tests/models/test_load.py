"""A base as it is loaded: its own memory, nothing filled in at random, nothing fetched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import write_base

from lora_cli.errors import InputError
from lora_cli.models.load import TINY, base_fingerprint, base_folder, load_model, load_tokenizer

CPU = torch.device("cpu")


def test_a_rewritten_file_does_not_change_a_loaded_model(tmp_path: Path) -> None:
    """Weights are copied out of the mapped file: overwriting it in place leaves a loaded model as it was."""
    base = write_base(tmp_path / "base")
    model = load_model(base, dtype=torch.float32, device=CPU)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    file = base / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(-2000, 2)
        stream.write(bytes(2000))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight  # still tied


@pytest.mark.parametrize("fault", ["missing", "misshapen"])
def test_a_weight_that_is_not_there_is_refused(tmp_path: Path, fault: str) -> None:
    """A missing or misshapen weight is an error that names it; transformers would fill it with random numbers."""
    base = write_base(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if fault == "missing":
        del weights[name]
    else:
        weights[name] = torch.zeros(3, 3)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"up_proj|cannot be loaded"):
        load_model(base, dtype=torch.float32, device=CPU)


def test_the_fingerprint_follows_weights_and_config(tmp_path: Path) -> None:
    """Equal folders have equal fingerprints; other weights of the same shapes, or another config, do not."""
    one, two = write_base(tmp_path / "one"), write_base(tmp_path / "two")
    assert base_fingerprint(one) == base_fingerprint(two)
    weights = load_file(two / "model.safetensors")
    save_file(
        {key: value + 1 for key, value in weights.items()},
        two / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert base_fingerprint(one) != base_fingerprint(two)
    config = json.loads((one / "config.json").read_text())
    before = base_fingerprint(one)
    (one / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    assert base_fingerprint(one) != before


def test_tiny_is_bundled() -> None:
    """`tiny` is a model of 2 to 4 million parameters in at most 8 MB, whose tokenizer ends a turn with its eos."""
    assert base_folder("tiny") == TINY
    assert sum(path.stat().st_size for path in TINY.glob("*.safetensors")) <= 8_000_000
    model, tokenizer = load_model(TINY, dtype=torch.float32, device=CPU), load_tokenizer(TINY)
    assert 2_000_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 4_000_000
    text = tokenizer.apply_chat_template([{"role": "assistant", "content": "x"}], tokenize=False)
    assert text.rstrip("\n").endswith(tokenizer.eos_token)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert 2_000 <= len(tokenizer) <= 4_096


def test_no_such_base_is_an_input_error() -> None:
    """A name that is neither a folder nor on the hub is one clear line, also without a network."""
    with pytest.raises(InputError, match="no such folder"):
        base_folder("./no-such-model")
    with pytest.raises(InputError, match="no such folder, and the hub"):
        base_folder("nobody/no-such-model")
