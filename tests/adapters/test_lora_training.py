"""LoRA's variants trained beside PEFT's."""

from __future__ import annotations

import peft
import pytest
import torch
from lora_variants import difference, ours, theirs
from peft.optimizers import create_loraplus_optimizer
from small import make_model, make_rows
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from lora_cli import adapters
from lora_cli.adapters import Method
from lora_cli.adapters._low_rank import LoraLinear
from lora_cli.models.adapted import AdaptedModel
from lora_cli.objectives.sft import Sft
from lora_cli.recipe.schema import LoraAdapter
from lora_cli.runtime.optim import MasterAdamW
from lora_cli.types import Progress


def follow(
    model: PreTrainedModel,
    method: Method,
    other: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    rate: float = 2e-3,
    steps: int = 30,
) -> float:
    """Train both side by side on the same rows; return the largest relative difference of their losses."""
    rows = make_rows(4 * steps, seed=9)
    adapted, objective = AdaptedModel(model, method.placed()), Sft(pad_id=0)
    trainable = method.trainable(model)
    factors = {name: method.rate_factor(name) for name in trainable}
    mine = MasterAdamW(trainable, rate_factors=factors)
    model.train()
    other.train()
    worst = 0.0
    for step in range(steps):
        batch_rows = rows[4 * step : 4 * step + 4]
        (batch,) = objective.micro_batches(
            adapted, list(enumerate(batch_rows)), Progress(step, steps), tokens=9999
        )
        loss = objective.loss_sum(adapted, batch)[0] / objective.units(batch)
        loss.backward()
        mine.step(rate)
        mine.zero_grad()
        # Plain torch, padded at the right, where a causal model does not look: nothing of ours is used.
        ids = pad_sequence([torch.from_numpy(row.input_ids).long() for row in batch_rows], batch_first=True)
        keep = pad_sequence([torch.from_numpy(row.trained) for row in batch_rows], batch_first=True)[:, 1:]
        expected = F.cross_entropy(other(input_ids=ids).logits[:, :-1][keep], ids[:, 1:][keep])
        expected.backward()
        optimizer.step()
        optimizer.zero_grad()
        worst = max(worst, abs(float(loss.detach()) - float(expected.detach())) / float(expected.detach()))
    return worst


def start_alike(method: Method, other: torch.nn.Module) -> None:
    """Give PEFT's model our initial values."""
    with torch.no_grad():
        for path, layer in method.layers.items():
            if isinstance(layer, LoraLinear):
                module = other.get_submodule(f"base_model.model.{path}")
                module.lora_A["default"].weight.copy_(layer.lora_A)
                module.lora_B["default"].weight.copy_(layer.lora_B)


def adamw(model: torch.nn.Module, rate: float = 2e-3) -> torch.optim.Optimizer:
    """Return torch's AdamW over what is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, foreach=False)


def freeze_a(model: torch.nn.Module) -> None:
    """Freeze PEFT's A."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        (name, "llama")
        for name in (
            "rslora",
            "patterns",
            "layers",
            "frozen A",
            "orthogonal",
            "pissa",
            "pissa, frozen A",
            "olora",
            "norm",
        )
    ]
    + [("bias of adapters", "qwen2"), ("every bias", "gpt2"), ("norm, biases", "gpt2")],
)
def test_losses_follow_pefts(name: str, architecture: str) -> None:
    """30 steps in fp32 from the same start keep the losses of PEFT's model to 1e-4."""
    model, method = ours(name, architecture)
    other = theirs(name, architecture)
    start_alike(method, other)
    if "frozen A" in name:
        freeze_a(other)
    assert follow(model, method, other, adamw(other)) <= 1e-4


def test_plain_lora_follows_pefts(architecture: str) -> None:
    """30 steps of LoRA on every linear layer keep the losses of PEFT's model to 1e-4, with bias and in Conv1D too."""
    model = make_model(architecture)
    method = adapters.build(LoraAdapter(rank=4, alpha=6.0), seed=1)
    method.inject(model)
    values = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    other = peft.get_peft_model(make_model(architecture), peft.LoraConfig(**values))
    start_alike(method, other)
    assert follow(model, method, other, adamw(other)) <= 1e-4


def test_lora_plus_follows_pefts() -> None:
    """30 steps with a ratio of 8 keep the losses of PEFT's LoRA+ optimizer to 1e-4, and are not plain LoRA's."""
    model = make_model("llama")
    method = adapters.build(LoraAdapter(rank=4, alpha=6.0, plus_ratio=8.0), seed=1)
    method.inject(model)
    values = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    other = peft.get_peft_model(make_model("llama"), peft.LoraConfig(**values))
    start_alike(method, other)
    optimizer = create_loraplus_optimizer(other, torch.optim.AdamW, lr=5e-4, loraplus_lr_ratio=8.0)
    assert follow(model, method, other, optimizer, rate=5e-4) <= 1e-4
    plain = make_model("llama")
    method = adapters.build(LoraAdapter(rank=4, alpha=6.0), seed=1)
    method.inject(plain)
    assert difference(plain, make_model("llama")) == 0.0
    other = peft.get_peft_model(make_model("llama"), peft.LoraConfig(**values))
    start_alike(method, other)
    optimizer = create_loraplus_optimizer(other, torch.optim.AdamW, lr=5e-4, loraplus_lr_ratio=8.0)
    assert follow(plain, method, other, optimizer, rate=5e-4, steps=5) > 1e-4
