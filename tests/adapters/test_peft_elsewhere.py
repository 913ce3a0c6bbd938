"""Adapters that PEFT wrote, on a base folder, through what `lora-eval` and `lora-merge` do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from toy import write_base, write_recipe
from transformers import AutoModelForCausalLM

from lora_cli import without_training
from lora_cli.recipe.load import load_recipe

TARGETS = ["q_proj", "down_proj"]
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
PATTERNS: dict[str, Any] = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"1\..*down_proj": 3}}
ADALORA = {"init_r": 4, "target_r": 2, "total_step": 12, "tinit": 2, "tfinal": 3, "deltaT": 1}
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora, patterns": lambda: peft.LoraConfig(**LORA, **PATTERNS),
    "rslora, patterns": lambda: peft.LoraConfig(**LORA, **PATTERNS, use_rslora=True),
    "dora": lambda: peft.LoraConfig(**LORA, use_dora=True),
    "vera": lambda: peft.VeraConfig(r=16, target_modules=TARGETS, projection_prng_key=3),
    "vera, drawn": lambda: peft.VeraConfig(r=16, target_modules=TARGETS, save_projection=False),
    "adalora, pruned": lambda: peft.AdaLoraConfig(
        **ADALORA, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM"
    ),
}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Return the logits of fixed tokens."""
    found: torch.Tensor = model.eval()(input_ids=torch.arange(4, 44).view(2, 20), use_cache=False).logits
    return found


def write(folder: Path, base: Path, name: str) -> Any:
    """Write an adapter with a real update by PEFT, AdaLoRA after its budget steps, and return the live model."""
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), CONFIGS[name]())
    torch.manual_seed(7)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.3 * torch.randn_like(parameter))
    if name == "adalora, pruned":
        optimizer, ids = torch.optim.AdamW(trained, lr=1e-2), torch.arange(4, 44).view(2, 20)
        for step in range(12):
            model.train()(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
    model.save_pretrained(folder)
    return model


@pytest.mark.filterwarnings("ignore:Specified to not")
@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_scored_and_merged_as_peft_computes_it(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merged model's logits are PEFT's to 1e-5, and its held-out loss is the one scored for the adapter."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    base = write_base(tmp_path / "base")
    live = logits(write(tmp_path / "adapter", base, name))
    recipe = load_recipe(write_recipe(tmp_path / "job", base))
    without_training.merge(tmp_path / "adapter", tmp_path / "merged", recipe)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert float((logits(merged) - live).abs().max()) <= 1e-5
    scores = without_training.evaluate(tmp_path / "adapter", recipe)
    again = without_training.evaluate(tmp_path / "merged", recipe)
    assert scores["tuned"]["loss"] == pytest.approx(again["tuned"]["loss"], rel=1e-5)
    assert abs(scores["tuned"]["loss"] - scores["base"]["loss"]) > 1e-3
