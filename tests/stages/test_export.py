"""What is written is read back: merged models, shards, tied heads, and an export that went wrong."""

from __future__ import annotations

import json
from pathlib import Path

import exporting
import pytest
import torch
from safetensors.torch import load_file
from small import make_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from lora_cli.adapters import Method
from lora_cli.adapters.lora import Lora
from lora_cli.errors import LoraError
from lora_cli.recipe import schema
from lora_cli.stages import export


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Return the logits of fixed tokens."""
    return model(input_ids=torch.arange(4, 44).view(2, 20), use_cache=False).logits.float()


def adapted(
    architecture: str, targets: str | list[str], dtype: torch.dtype
) -> tuple[PreTrainedModel, Method]:
    """Return a model with an adapter whose update is not zero."""
    model = make_model(architecture, dtype)
    method = Lora(rank=4, alpha=8.0, targets=targets, seed=1)
    for layer in method.inject(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model, method


def write(
    model: PreTrainedModel, method: Method, base: Path, target: Path, form: str = "merged", shard: int = 10**9
):
    """Export one format and return the measured difference."""
    settings = schema.Export.model_construct(max_shard_bytes=shard)
    return exporting.write({form: target}, model, method, base, settings)[form]


@pytest.mark.parametrize("targets", ["all-linear", ["lm_head", "q_proj"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_model_is_merged_right(
    tmp_path: Path, base: Path, targets: str | list[str], dtype: torch.dtype
) -> None:
    """A merged tied model equals the live one after a plain reload; an adapted head is untied, and only then."""
    model, method = adapted("llama", targets, dtype)
    live = logits(model)
    embedding = model.get_input_embeddings().weight.detach().clone()
    assert write(model, method, base, tmp_path / "merged") == 0.0
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype).eval()
    if dtype == torch.float32:
        assert float((logits(reloaded) - live).abs().max()) <= 1e-5
    for path, layer in method.layers.items():  # in bfloat16 the sum is rounded, once
        assert torch.equal(reloaded.get_submodule(path).weight, layer.merged_weight().to(dtype))
    assert torch.equal(reloaded.get_input_embeddings().weight, embedding)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is (targets == "all-linear")
    assert torch.equal(logits(model), live)  # the live model is as it was


def test_conv1d_and_bias_are_merged_right(tmp_path: Path, base: Path, architecture: str) -> None:
    """Each kind of linear layer is merged and reloaded with the live logits, to 1e-5 in fp32."""
    model, method = adapted(architecture, "all-linear", torch.float32)
    live = logits(model)
    assert write(model, method, base, tmp_path / "merged") <= 1e-5
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert float((logits(reloaded) - live).abs().max()) <= 1e-5


def test_large_weights_are_sharded(tmp_path: Path, base: Path) -> None:
    """Weights beyond the shard size are split into files with an index that transformers loads."""
    model, method = adapted("qwen2", "all-linear", torch.float32)
    live = logits(model)
    write(model, method, base, tmp_path / "merged", shard=20_000)
    shards = sorted(tmp_path.glob("merged/*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert float((logits(reloaded) - live).abs().max()) <= 1e-5


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_a_bad_export_is_not_published(
    tmp_path: Path, base: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that were written wrong are found by reading them back, and nothing gets the public name."""
    model, method = adapted("llama", "all-linear", torch.float32)
    module, name = (export._peft, "save_tensors") if form == "peft" else (PreTrainedModel, "save_pretrained")
    original = getattr(module, name)

    def wrong(*arguments: object, **settings: object) -> None:
        if form == "peft":
            tensors = dict(arguments[0])  # type: ignore[call-overload]
            first = next(iter(tensors))
            original(tensors | {first: tensors[first] * 1.01}, *arguments[1:], **settings)
        else:
            original(*arguments, **settings)
            from safetensors.torch import save_file

            path = Path(str(arguments[1])) / "model.safetensors"
            weights = load_file(path)
            first = next(key for key in weights if "mlp" in key)
            save_file(weights | {first: weights[first] * 1.01}, path, metadata={"format": "pt"})

    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(LoraError, match="nothing was published"):
        write(model, method, base, tmp_path / "out", form)
    assert list(tmp_path.iterdir()) == []
