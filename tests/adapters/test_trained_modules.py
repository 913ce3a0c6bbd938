"""Modules trained whole beside the adapters: tied ones, bfloat16, and a run from recipe to merged model."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from lora_variants import difference, logits, ours, stir
from small import make_model
from toy import write_base, write_recipe
from transformers import AutoModelForCausalLM

from lora_cli import adapters, pipeline, without_training
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.schema import LoraAdapter


def test_tied_modules_are_trained_as_one() -> None:
    """Either name trains the shared matrix once, in both places, and merging gives both its values."""
    for name in ("lm_head", "embed_tokens"):
        model = make_model("llama")
        method = adapters.build(LoraAdapter(train_also=[name], targets=["q_proj"]), 0)
        method.inject(model)
        assert sorted(method.whole) == ["lm_head", "model.embed_tokens"]
        assert method.whole["lm_head"].weight is method.whole["model.embed_tokens"].weight
        assert [key for key in method.trainable(model) if "lora" not in key] == ["model.embed_tokens.weight"]
        stir([method.whole["lm_head"].weight])
        for part in method.placed().values():
            part.merge()
        assert torch.equal(model.lm_head.base.weight, model.get_input_embeddings().base.weight)


def test_pefts_head_alone_on_a_tied_model_is_read(tmp_path: Path) -> None:
    """PEFT trains the head of a tied model apart from the embedding; read by us, it is apart as well."""
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    live = peft.get_peft_model(make_model("llama"), config).eval()
    stir(parameter for parameter in live.parameters() if parameter.requires_grad)
    live.save_pretrained(tmp_path)
    model = make_model("llama")
    method = adapters.load(tmp_path, model)
    assert list(method.whole) == ["lm_head"]
    assert difference(model, live) <= 1e-5


def test_bfloat16_keeps_small_updates() -> None:
    """Biases and whole modules are trained in float32 beside a bfloat16 base, and start as it is, bit for bit."""
    base = make_model("gpt2", torch.bfloat16)
    for name in ("every bias", "norm, embedding, head", "norm, biases"):
        model, method = ours(name, "gpt2", torch.bfloat16)
        assert torch.equal(logits(model), logits(base))
        assert all(parameter.dtype == torch.float32 for parameter in method.trainable(model).values())


@pytest.mark.parametrize("train_also", [["norm"], ["norm", "embed_tokens"]])
def test_a_run_leaves_its_modules_in_every_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_also: list[str]
) -> None:
    """On a tied base, the adapter in PEFT, the merged model and the command `merge` all score as the run did."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    base = write_base(tmp_path / "base")
    adapter = {"method": "lora", "rank": 4, "layers": "last 1", "init": "olora", "train_also": train_also}
    recipe = load_recipe(
        write_recipe(tmp_path, base, adapter=adapter, export__formats=["peft", "merged"], train__max_steps=3)
    )
    summary = pipeline.train(recipe)
    run = tmp_path / "run"
    assert (
        without_training.merge(run / "adapter", tmp_path / "merged", recipe)["max_logit_difference"] <= 1e-5
    )
    for target in (run / "adapter", run / "merged", tmp_path / "merged"):
        loss = without_training.evaluate(target, recipe)["tuned"]["loss"]
        assert loss == pytest.approx(summary["eval"]["tuned"]["loss"], rel=1e-5)
    assert without_training.evaluate(run, recipe)["base"]["loss"] == pytest.approx(
        summary["eval"]["base"]["loss"], rel=1e-6
    )
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    assert difference(loaded.eval(), merged.eval()) <= 1e-5
    assert merged.config.tie_word_embeddings  # what was tied stays tied
