"""Our adapter methods in PEFT's terms, and the values that they start from."""

from __future__ import annotations

import re
from typing import Any

import torch
from safetensors.torch import load_file

from side_by_side.records import Job, UnequalError


def config(job: Job, adapter: dict[str, Any]) -> Any:
    """Return PEFT's configuration of a recipe's `adapter` block; None for full fine-tuning."""
    from peft import AdaLoraConfig, LoraConfig, VeraConfig

    common: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if job.method == "full":
        return None
    if job.method == "vera":
        return VeraConfig(r=job.rank, d_initial=0.1, **common)
    if job.method == "adalora":
        return AdaLoraConfig(
            init_r=adapter["initial_rank"], target_r=adapter["target_rank"], lora_alpha=job.alpha,
            tinit=adapter["tinit"], tfinal=adapter["tfinal"], deltaT=adapter["delta_t"],
            total_step=job.options["planned_steps"], **common,
        )  # fmt: skip
    return LoraConfig(r=job.rank, lora_alpha=job.alpha, use_dora=job.method == "dora", **common)


@torch.no_grad()
def fill(model: torch.nn.Module, path: str) -> None:
    """Set the adapters of a PEFT model to the values of the file, every one of which has its place.

    Raises:
        UnequalError: it trains other tensors than the file has.
    """
    start = load_file(path)
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:  # AdaLoRA's rank, a constant, which PEFT 0.21 leaves to the optimizer
            parameter.requires_grad_(False)
    shared = {name: value for name, value in model.named_buffers() if re.search(r"\.vera_[AB]\.", name)}
    places: dict[str, torch.Tensor] = {
        _plain(name): value for name, value in model.named_parameters() if value.requires_grad
    }
    places |= {_plain(name).rpartition(".")[2]: value for name, value in shared.items()}
    if strange := sorted(places.keys() ^ start.keys()):
        raise UnequalError(f"it trains other tensors than we do: {', '.join(strange[:3])}")
    for name, value in start.items():
        places[name].copy_(value)


def _plain(name: str) -> str:
    for prefix in ("base_model.model.", "base_model."):
        name = name.removeprefix(prefix)
    return name.replace(".default", "").removesuffix(".weight")


def quantization(job: Job, *, bf16_compute: bool) -> Any:
    """Return what bitsandbytes is asked for: NF4 with doubly quantized scales, as ours; else None."""
    if job.method != "qlora":
        return None
    from transformers import BitsAndBytesConfig

    compute = {"bnb_4bit_compute_dtype": torch.bfloat16} if bf16_compute and job.dtype == "bfloat16" else {}
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, **compute
    )
