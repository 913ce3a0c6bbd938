"""Readers of a plain LoRA beside ours: PEFT, one that goes by key names alone, and what vLLM asks of the settings."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import torch
from lora_variants import difference
from safetensors.torch import load_file
from small import make_model
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return settings and tensors of an adapter folder."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


@torch.no_grad()
def as_llama_cpp(folder: Path, model: PreTrainedModel) -> PreTrainedModel:
    """Add lora_alpha / rows of A times B A to each weight: by key names, with no other setting, as llama.cpp does."""
    config, tensors = read(folder)
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            a, b = tensors[name], tensors[f"base_model.model.{path}.lora_B.weight"]
            module, delta = model.get_submodule(path), config["lora_alpha"] / len(a) * b @ a
            module.weight += delta.T if isinstance(module, Conv1D) else delta
    return model


def check_plain(folder: Path, base: str = "some/base") -> int:
    """Check what vLLM and llama.cpp ask of names, shapes and settings, and return the rank."""
    config, tensors = read(folder)
    assert isinstance(config["lora_alpha"], int)
    assert config["r"] == config["lora_alpha"] > 0
    for key in (
        "use_rslora",
        "use_dora",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
    ):
        assert not config[key], key
    assert (config["bias"], config["peft_type"], config["lora_dropout"]) == ("none", "LORA", 0.0)
    assert (config["base_model_name_or_path"], config["revision"]) == (base, None)
    ends = set()
    for name, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        assert match, name
        ends.add(match[1].rpartition(".")[2])
        assert tensor.shape[0 if match[2] == "A" else 1] == config["r"]
        assert tensor.dtype == torch.float32
    assert ends == {target.rpartition(".")[2] for target in config["target_modules"]}
    rank: int = config["r"]
    return rank


def check_exact(folder: Path, live: PreTrainedModel, architecture: str, quantize: str | None = None) -> None:
    """PEFT and the reader by names compute the live model's logits to 1e-5."""
    theirs = peft.PeftModel.from_pretrained(make_model(architecture, quantize=quantize), folder).eval()
    assert difference(theirs, live) <= 1e-5
    # PEFT would add the base's weight of an adapted head.
    keys = {key for key in peft.get_peft_model_state_dict(theirs) if ".base_layer." not in key}
    assert keys == set(read(folder)[1])
    assert difference(as_llama_cpp(folder, make_model(architecture)), live) <= 1e-5
    assert difference(make_model(architecture), live) > 0.01
