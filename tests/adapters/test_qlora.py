"""qlora through the whole pipeline: its defaults, resuming, PEFT, and a merge that is measured before it is chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import exporting
import peft
import pytest
import torch
from safetensors.torch import load_file
from small import make_model, make_rows
from toy import write_recipe
from transformers import AutoModelForCausalLM

from lora_cli import adapters, pipeline, without_training
from lora_cli.adapters import _peft
from lora_cli.adapters.lora import Lora
from lora_cli.errors import GateError, InputError
from lora_cli.models.load import load_model
from lora_cli.models.nf4 import Quantization, quantized_layers
from lora_cli.recipe import schema
from lora_cli.recipe.load import load_recipe

QLORA = {"method": "qlora", "rank": 4, "alpha": 8}


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Return the logits of fixed tokens."""
    return model(input_ids=torch.arange(4, 44).view(2, 20), use_cache=False).logits.float()


@pytest.mark.parametrize(
    ("overrides", "form"),
    [
        (["adapter.method=qlora"], "nf4"),
        (["adapter.method=qlora", "model.quantize=int8"], "int8"),
        (["model.quantize=fp4"], "fp4"),
        ([], "none"),
        (["adapter={method: full}"], "none"),
    ],
)
def test_the_default_follows_the_method(overrides: list[str], form: str) -> None:
    """NF4 is qlora's default and nobody else's; any method may ask for a quantized base."""
    assert load_recipe(None, overrides).quantization() == form


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter={method: full}", "model.quantize=nf4"], "full fine-tuning trains the weights themselves"),
        (["adapter.method=qlora", "model.quantize=none"], "qlora is LoRA on a quantized base"),
        (["export.merge_base=full"], "the base is not quantized"),
        (["export.max_merge_kl=0.1"], "the base is not quantized"),
    ],
)
def test_contradictions_are_refused(overrides: list[str], message: str) -> None:
    """A recipe that quantizes what it trains, or measures what it does not quantize, is refused with the rule."""
    with pytest.raises(InputError) as caught:
        load_recipe(None, overrides)
    assert message in str(caught.value)


def test_a_whole_run(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run learns, is resumed bit-equal, scores the same in lora-eval, merges as measured, and opens in PEFT."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    changes: dict[str, Any] = {
        "adapter": QLORA,
        "train__save_every": 4,
        "export__formats": ["peft", "merged"],
    }
    recipe = load_recipe(write_recipe(tmp_path / "job", base, **changes))
    summary = pipeline.train(recipe)
    run = tmp_path / "job" / "run"
    straight = load_file(run / "adapter" / _peft.TENSOR_FILE)
    assert summary["eval"]["tuned"]["loss"] < 0.8 * summary["eval"]["base"]["loss"]
    assert summary["export"]["peft"] <= 1e-5
    assert summary["export"]["merged"] <= 1e-5
    figures = summary["export"]["merge_base"]
    assert figures["chosen"] == "dequantized"
    assert figures["dequantized"]["kl"] <= 1e-6 < figures["full"]["kl"]
    assert figures["dequantized"]["loss"] == pytest.approx(figures["live"]["loss"], rel=1e-5)

    scores = without_training.evaluate(run, recipe)
    assert scores["tuned"]["loss"] == pytest.approx(summary["eval"]["tuned"]["loss"], rel=1e-6)
    assert scores["base"]["loss"] == pytest.approx(summary["eval"]["base"]["loss"], rel=1e-6)
    plain = without_training.evaluate(
        run, load_recipe(tmp_path / "job" / "recipe.yaml", ["adapter.method=lora"])
    )
    assert plain["base"]["loss"] != pytest.approx(scores["base"]["loss"], rel=1e-6)

    for number in (8, 10):
        (run / "checkpoints" / f"step-{number}").rename(tmp_path / f"aside-{number}")
    for name in ("adapter", "merged", "summary.json"):
        (run / name).rename(tmp_path / f"aside-{name}")
    pipeline.train(recipe, resume=True)
    resumed = load_file(run / "adapter" / _peft.TENSOR_FILE)
    assert all(torch.equal(resumed[key], value) for key, value in straight.items())

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = logits(peft.PeftModel.from_pretrained(model, run / "adapter").eval())
    ours = load_model(base, dtype=torch.float32, device=torch.device("cpu"))
    adapters.load(run / "adapter", ours)
    assert float((logits(ours) - theirs).abs().max()) <= 1e-5

    full = load_recipe(tmp_path / "job" / "recipe.yaml", ["export.merge_base=full"])
    result = without_training.merge(run, tmp_path / "full", full)
    assert result["merge_base"]["chosen"] == "full"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.float32).eval()
    assert float((logits(merged) - theirs).abs().max()) <= 1e-5


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
@pytest.mark.parametrize("targets", ["attention", "all-linear"])
def test_the_dequantized_merge_is_the_live_model(
    tmp_path: Path, base: Path, architecture: str, targets: str
) -> None:
    """Layers with and without an adapter, Linear, with bias, and Conv1D come out dense, with the live logits."""
    folder = tmp_path / "model"
    make_model(architecture).save_pretrained(folder)
    for file in base.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    model = load_model(
        folder, dtype=torch.float32, device=torch.device("cpu"), quantization=Quantization("nf4")
    )
    method = Lora(rank=4, alpha=8.0, targets=targets, seed=1)
    for layer in method.inject(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    live, names = logits(model), list(quantized_layers(model))

    def write(target: Path, rows: int = 3, **settings: Any) -> dict[str, Any]:
        targets, chosen = {"merged": target}, schema.Export(**settings)
        return exporting.write(targets, model, method, folder, chosen, sample=make_rows(rows))

    figures = write(tmp_path / "merged")["merge_base"]
    assert figures["chosen"] == "dequantized"
    assert figures["full"]["kl"] > 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert float((logits(merged) - live).abs().max()) <= 1e-5
    assert list(quantized_layers(model)) == names
    assert torch.equal(logits(model), live)  # the live model is as it was

    unmeasured = write(tmp_path / "random", rows=0, merge_base="dequantized")["merge_base"]
    assert set(unmeasured) == {"chosen", "dequantized"}
    assert set(unmeasured["dequantized"]) == {"kl", "max_logit_difference"}
    with pytest.raises(GateError, match=r"max_merge_kl.*nothing was published"):
        write(tmp_path / "refused", merge_base="full", max_merge_kl=1e-6)
    assert not (tmp_path / "refused").exists()
    assert torch.equal(logits(model), live)
