"""What was trained on an NF4 base, written as merged models: every method, biases and modules, a tied head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import exporting
import pytest
import torch
from small import make_model, make_rows
from test_adapters import SETTINGS, WITH_LAYERS, logits, train
from toy import write_base
from transformers import AutoModelForCausalLM, PreTrainedModel

from lora_cli import adapters
from lora_cli.adapters import Method
from lora_cli.models.load import load_model
from lora_cli.models.nf4 import Quantization, quantized_layers
from lora_cli.recipe import schema

CPU = torch.device("cpu")
BESIDES = schema.LoraAdapter(
    rank=4, alpha=8.0, bias="adapter", train_also=["norm", "lm_head", "embed_tokens"]
)
TIED_HEAD = schema.LoraAdapter(rank=4, alpha=8.0, targets=["lm_head", "q_proj"])
CASES = {
    **{name: (SETTINGS[name], "gpt2") for name in WITH_LAYERS},
    "biases and modules": (BESIDES, "qwen2"),
    "head of a tied model": (TIED_HEAD, "llama"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folder of each architecture's model, with tokenizer files."""
    tokenizer = write_base(tmp_path_factory.mktemp("models") / "base")
    made = {}
    for architecture in ("gpt2", "qwen2", "llama"):
        made[architecture] = tokenizer.parent / architecture
        make_model(architecture).save_pretrained(made[architecture])
        for file in tokenizer.glob("token*"):
            (made[architecture] / file.name).write_bytes(file.read_bytes())
    return made


def placed(settings: schema.Section, model: PreTrainedModel) -> Method:
    """Return the method, injected."""
    method = adapters.build(settings, seed=3)
    method.plan(3)
    method.inject(model)
    return method


@pytest.mark.parametrize("name", CASES)
def test_a_merge_is_the_adapter_on_that_base(tmp_path: Path, folders: dict[str, Path], name: str) -> None:
    """Merged into the dequantized base it has the live logits, into the full one those of the adapter placed there."""
    settings, architecture = CASES[name]
    folder = folders[architecture]
    model = load_model(folder, dtype=torch.float32, device=CPU, quantization=Quantization("nf4"))
    method = placed(settings, model)
    train(model, method)
    live, packed = logits(model), list(quantized_layers(model))

    def write(form: str) -> tuple[PreTrainedModel, dict[str, Any]]:
        measured = exporting.write(
            {"merged": tmp_path / form},
            model,
            method,
            folder,
            schema.Export(merge_base=form),
            sample=make_rows(3),
        )
        return AutoModelForCausalLM.from_pretrained(tmp_path / form, dtype=torch.float32).eval(), measured

    dequantized, measured = write("dequantized")
    assert measured["merge_base"]["dequantized"]["kl"] <= 1e-6
    assert float((logits(dequantized) - live).abs().max()) <= 1e-5
    full, measured = write("full")
    assert measured["merge_base"]["full"]["kl"] > 1e-6
    other = load_model(folder, dtype=torch.float32, device=CPU)
    again = placed(settings, other)
    again.load_state_dict(method.state_dict())
    trained = method.trainable(model)
    with torch.no_grad():
        for key, parameter in again.trainable(other).items():
            parameter.copy_(trained[key])
    assert float((logits(full) - logits(other)).abs().max()) <= 1e-5
    # The live model is as it was.
    assert list(quantized_layers(model)) == packed
    assert torch.equal(logits(model), live)
