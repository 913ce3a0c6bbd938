"""A small AdaLoRA run of ours and the same one of PEFT, which the AdaLoRA tests compare."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import torch
from small import make_model, make_rows
from transformers import PreTrainedModel

from lora_cli.adapters.adalora import AdaLora
from lora_cli.models.adapted import AdaptedModel
from lora_cli.objectives.sft import Sft
from lora_cli.runtime.optim import MasterAdamW
from lora_cli.types import Progress

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj", "up_proj"],
    "gpt2": ["c_attn", "c_fc"],
}
STEPS, TINIT, TFINAL, DELTA_T = 30, 5, 8, 3


def injected(architecture: str = "llama", **settings: Any) -> tuple[PreTrainedModel, AdaLora]:
    """Return a model with AdaLoRA in it, planned for 30 steps."""
    values: dict[str, Any] = {"initial_rank": 6, "target_rank": 3, "alpha": 24.0, "seed": 2}
    values |= {"targets": TARGETS[architecture], "tinit": TINIT, "tfinal": TFINAL, "delta_t": DELTA_T}
    method = AdaLora(**values | settings)
    method.plan(STEPS)
    model = make_model(architecture)
    method.inject(model)
    return model, method


def train(model: PreTrainedModel, method: AdaLora, stop: int = STEPS) -> Iterator[tuple[int, float, float]]:
    """Train as the loop does; yield after each step its number, its loss and its penalty."""
    adapted, objective = AdaptedModel(model, method.layers), Sft(pad_id=0)
    optimizer = MasterAdamW(method.trainable(model))
    data = make_rows(4 * STEPS, seed=9)
    model.train()
    for step in range(stop):
        mine = list(enumerate(data[4 * step : 4 * step + 4]))
        batches = objective.micro_batches(adapted, mine, Progress(step, STEPS), tokens=60)
        units, total = sum(map(objective.units, batches)), 0.0
        for batch in batches:
            loss = objective.loss_sum(adapted, batch)[0] / units
            loss.backward()
            total += float(loss.detach())
        penalty = method.penalty()
        if penalty is not None:
            penalty.backward()
        optimizer.clip(optimizer.gradient_norm(), 1.0)
        optimizer.step(1e-2)
        method.after_step(optimizer, Progress(step, STEPS))
        optimizer.zero_grad()
        yield step, total, 0.0 if penalty is None else float(penalty.detach())
    model.eval()


def run(model: PreTrainedModel, method: AdaLora, stop: int = STEPS) -> None:
    """Train to a step."""
    for _ in train(model, method, stop):
        pass


def pefts(architecture: str = "llama", **settings: Any) -> Any:
    """Return a model with PEFT's AdaLoRA of the same settings."""
    values: dict[str, Any] = {"init_r": 6, "target_r": 3, "lora_alpha": 24, "total_step": STEPS}
    values |= {"tinit": TINIT, "tfinal": TFINAL, "deltaT": DELTA_T, "task_type": "CAUSAL_LM"}
    values |= {"target_modules": TARGETS[architecture]}
    return peft.get_peft_model(make_model(architecture), peft.AdaLoraConfig(**values | settings))


def train_pefts(model: Any, stop: int = STEPS) -> Iterator[tuple[int, float]]:
    """Train with PEFT's own penalty and allocator, called as its documentation says; yield the whole loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    data = make_rows(4 * STEPS, seed=9)
    model.train()
    for step in range(stop):
        mine = data[4 * step : 4 * step + 4]
        longest = max(len(row.input_ids) for row in mine)
        ids, labels = torch.zeros(4, longest, dtype=torch.long), torch.full((4, longest), -100)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(mine):
            size = len(row.input_ids)
            ids[i, :size], mask[i, :size] = torch.from_numpy(row.input_ids), 1
            labels[i, :size] = torch.where(torch.from_numpy(row.trained), ids[i, :size], -100)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        yield step, float(loss.detach())
    model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Return the logits of fixed tokens."""
    return model(input_ids=torch.arange(1, 41).view(2, 20), use_cache=False).logits
