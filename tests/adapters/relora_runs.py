"""A small model that trains with ReLoRA and a full-rank warm start, by the loop's own step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from small import make_model, make_rows
from transformers import PreTrainedModel

from lora_cli.adapters.relora import Relora
from lora_cli.models.adapted import AdaptedModel
from lora_cli.objectives.sft import Sft
from lora_cli.recipe import schema
from lora_cli.runtime.dist import Runtime
from lora_cli.stages._gradient_step import GradientStep
from lora_cli.types import Example

TOTAL, WARM, EVERY, RATE = 14, 4, 4, 1e-2
BASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "nf4": {"quantize": "nf4"},
}


class Rows(list[Example]):
    """Rows in memory, as the loop reads them."""

    fingerprint, max_token = "", 95

    @property
    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Tokens of each row."""
        return np.array([len(row.input_ids) for row in self])

    def where(self, index: int) -> str:
        """Return the row's number."""
        return str(index)


def begin(
    architecture: str, base: str = "fp32", **settings: Any
) -> tuple[PreTrainedModel, Relora, GradientStep]:
    """Return a model, its method and the loop's step, all rows in each batch."""
    model = make_model(architecture, **BASES[base])
    method = Relora(
        rank=4, alpha=8.0, restart_every=EVERY, restart_warmup=2, warm_start_steps=WARM, seed=3, **settings
    )
    method.plan(TOTAL)
    method.inject(model)
    train = schema.Train(
        max_steps=TOTAL, batch_size=8, learning_rate=RATE, warmup=2, schedule="cosine", max_grad_norm=None
    )
    adapted, rows = AdaptedModel(model, method.placed()), Rows(make_rows(8))
    return (
        model,
        method,
        GradientStep(train, adapted, method, Sft(pad_id=0), rows, 0, Runtime(torch.device("cpu")), print),
    )


def take(step: GradientStep, until: int) -> list[float]:
    """Train up to a step and leave the model in evaluation mode; return the losses."""
    losses = [step.take()["loss"] for _ in range(until - step.state.step)]
    step.model.model.eval()
    return losses
