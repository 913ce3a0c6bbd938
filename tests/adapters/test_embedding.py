"""LoRA on an embedding: scaled ones, tied heads, what is refused, and a run from recipe to merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lora_variants import difference, logits, ours, start_embeddings_alike, stir, theirs
from safetensors.torch import load_file, save_file
from small import make_model
from test_lora_training import adamw, follow, start_alike
from toy import write_base, write_recipe
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GraniteConfig, OPTConfig, PreTrainedModel

from lora_cli import adapters, pipeline, without_training
from lora_cli.adapters import Method, _peft
from lora_cli.adapters._lora_embedding import LoraEmbedding
from lora_cli.adapters._targets import match_targets
from lora_cli.errors import InputError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.schema import AdaLoraAdapter, DoraAdapter, LoraAdapter, ReloraAdapter, VeraAdapter

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
SCALED = {
    # The module multiplies what it looks up by the root of its width.
    "inside": Gemma3TextConfig(**SIZES, head_dim=8, pad_token_id=0),
    # The model multiplies what the module returns.
    "outside": GraniteConfig(**SIZES, embedding_multiplier=5.0, pad_token_id=0),
}


def scaled(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a small model that scales its embedding, inside the module or outside."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(SCALED[name], dtype=dtype).eval()


def inject(model: PreTrainedModel, **settings: Any) -> Method:
    """Return LoRA in the model, on the embedding and one more layer."""
    method = adapters.build(LoraAdapter(rank=4, targets=["q_proj", "embed_tokens"], **settings), 1)
    method.inject(model)
    return method


@pytest.mark.parametrize("name", SCALED)
def test_a_scaled_embedding_is_adapted_as_pefts(name: str, tmp_path: Path) -> None:
    """Where the module or the model scales the rows, ours starts as the base and is PEFT's and the merged to 1e-5."""
    for dtype in (torch.float32, torch.bfloat16):
        model = scaled(name, dtype)
        inject(model)
        assert torch.equal(logits(model), logits(scaled(name, dtype)))
    model = scaled(name)
    method = inject(model)
    stir(method.trainable(model).values())
    assert difference(model, scaled(name)) > 0.01
    _peft.write(tmp_path, method, base_name="base", revision=None)
    assert difference(peft.PeftModel.from_pretrained(scaled(name), tmp_path).eval(), model) <= 1e-5
    live = logits(model)
    for layer in method.placed().values():
        layer.merge()
    assert float((logits(model) - live).abs().max()) <= 1e-5


def test_a_tied_head_keeps_the_base() -> None:
    """With the embedding adapted the tied head stays the base's matrix, and unmerged the two are one again."""
    model = make_model("llama")
    table = model.lm_head.weight
    before = table.detach().clone()
    method = inject(model)
    stir(method.trainable(model).values())
    layer = method.layers["model.embed_tokens"]
    assert layer.base.weight is table
    layer.merge()
    assert torch.equal(model.lm_head.weight, before)
    assert not torch.equal(layer.base.weight, before)
    layer.unmerge()
    assert layer.base.weight is table
    assert torch.equal(table, before)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_losses_follow_pefts(architecture: str) -> None:
    """30 steps in fp32 from the same start keep the losses of PEFT's model to 1e-4."""
    model, method = ours("embedding", architecture)
    other = theirs("embedding", architecture)
    start_alike(method, other)
    start_embeddings_alike(method, other)
    assert follow(model, method, other, adamw(other)) <= 1e-4


def test_its_start_is_pefts() -> None:
    """A is zero and B has deviation 1 as in PEFT's, and the layer says its update as factors."""
    _, method = ours("embedding", "llama")
    other = theirs("embedding", "llama").get_submodule("base_model.model.model.embed_tokens")
    layer = method.layers["model.embed_tokens"]
    assert isinstance(layer, LoraEmbedding)
    for mine, peer in (
        (layer.lora_embedding_A, other.lora_embedding_A["default"]),
        (layer.lora_embedding_B, other.lora_embedding_B["default"]),
    ):
        assert mine.shape == peer.shape
        assert float(mine.std()) == pytest.approx(float(peer.std()), rel=0.3)
    stir([layer.lora_embedding_A])
    a, b = layer.plain_factors()
    update = layer.merged_weight() - layer.base_weight()
    assert float((b @ a - update).abs().max()) <= 1e-5


def test_the_table_of_positions_can_be_adapted_by_name() -> None:
    """GPT-2's positions get an adapter where they are named, and merged compute what it does; all-linear has none."""
    model = make_model("gpt2")
    method = adapters.build(LoraAdapter(rank=4, targets=["wpe", "wte"]), 1)
    assert list(method.inject(model)) == ["transformer.wte", "transformer.wpe"]
    stir(method.trainable(model).values())
    live = logits(model)
    for layer in method.layers.values():
        layer.merge()
    assert float((logits(model) - live).abs().max()) <= 1e-5
    for targets in ("all-linear", "attention", "mlp"):
        named = match_targets(make_model("gpt2"), targets, embeddings=True)
        assert not any("wte" in path or "wpe" in path for path in named)


def test_pefts_copy_of_the_table_must_be_the_bases(tmp_path: Path) -> None:
    """The base's table that PEFT stores beside the adapter is passed over, rounded too, and another one is refused."""
    live = theirs("embedding", "llama")
    live.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / _peft.TENSOR_FILE)
    (name,) = [key for key in tensors if key.endswith("embed_tokens.base_layer.weight")]
    for value in (tensors[name], tensors[name].bfloat16()):
        save_file(tensors | {name: value}, tmp_path / _peft.TENSOR_FILE)
        adapters.load(tmp_path, make_model("llama"))
    for value in (tensors[name] + 1, tensors[name][:-1].contiguous()):
        save_file(tensors | {name: value}, tmp_path / _peft.TENSOR_FILE)
        with pytest.raises(InputError, match=r"a weight of model\.embed_tokens that is not the base's"):
            adapters.load(tmp_path, make_model("llama"))


def test_what_does_not_go_is_refused_in_one_line() -> None:
    """Other methods, other starts, a frozen A, and a table that is no plain lookup: each named with what to do."""
    for block in (DoraAdapter, VeraAdapter, AdaLoraAdapter, ReloraAdapter):
        method = adapters.build(block(targets=["q_proj", "embed_tokens"]), 0)
        with pytest.raises(InputError, match=r"'embed_tokens' is an embedding, which .* use method: lora"):
            method.inject(make_model("llama"))
    for settings, key in (({"init": "pissa"}, "init"), ({"freeze_a": True}, "freeze_a")):
        with pytest.raises(InputError, match=rf"adapter\.{key}: .*take model\.embed_tokens out of"):
            inject(make_model("llama"), **settings)
    config = OPTConfig(vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match="'embed_positions' is an embedding and computes more than a lookup"):
        adapters.build(LoraAdapter(targets=["embed_positions"]), 0).inject(model)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_run_adapts_its_embedding_in_every_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: str
) -> None:
    """On a tied base, plain or NF4, adapter and merged model score as the run did; the merged head is the base's."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    base = write_base(tmp_path / "base")
    adapter = {"method": "lora", "rank": 4, "targets": ["q_proj", "embed_tokens"], "plus_ratio": 4.0}
    settings: dict[str, Any] = {"model__quantize": quantize, "export__formats": ["merged", "peft"]}
    if quantize != "none":
        settings["export__merge_base"] = "dequantized"
    recipe = load_recipe(write_recipe(tmp_path, base, adapter=adapter, train__max_steps=3, **settings))
    summary = pipeline.train(recipe)
    run = tmp_path / "run"
    plain = load_recipe(tmp_path / "recipe.yaml", ["model.quantize=none", "export.merge_base=auto"])
    for target, its in ((run / "adapter", recipe), (run / "merged", plain)):
        loss = without_training.evaluate(target, its)["tuned"]["loss"]
        assert loss == pytest.approx(summary["eval"]["tuned"]["loss"], rel=1e-5)
    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    assert not merged.config.tie_word_embeddings
    original = AutoModelForCausalLM.from_pretrained(base)
    assert torch.equal(merged.lm_head.weight, original.lm_head.weight)
    if quantize == "none":
        loaded = peft.PeftModel.from_pretrained(original, run / "adapter")
        assert difference(loaded.eval(), merged.eval()) <= 1e-5


def test_the_reference_is_the_base_and_the_state_resumes_it() -> None:
    """Switched off the model is the base bit for bit, and every trained tensor is in what a resumed run restores."""
    model, method = ours("embedding", "llama", torch.bfloat16)
    stir(method.trainable(model).values())
    with AdaptedModel(model, method.placed()).reference():
        assert torch.equal(logits(model), logits(make_model("llama", torch.bfloat16)))
    names = {name for name in method.trainable(model) if "embed" in name}
    assert names == {f"model.embed_tokens.lora_embedding_{part}" for part in "AB"}
    assert all(parameter.dtype == torch.float32 for parameter in method.trainable(model).values())
