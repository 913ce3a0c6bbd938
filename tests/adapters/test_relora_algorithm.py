"""ReLoRA with its warm start against the paper's algorithm in plain torch (arXiv 2307.05695, section 3)."""

from __future__ import annotations

import math

import pytest
import torch
from relora_runs import EVERY, RATE, TOTAL, WARM, begin, take
from small import make_model, make_rows
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters._base import replace_module
from lora_cli.models.adapted import AdaptedModel
from lora_cli.objectives.sft import Sft


class PlainLora(nn.Module):
    """The paper's layer: a weight that updates are merged into, and a low-rank update beside it."""

    def __init__(self, base: nn.Linear | Conv1D) -> None:
        super().__init__()
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = base.bias
        self.a = nn.Parameter(torch.zeros(4, self.weight.shape[1]))
        self.b = nn.Parameter(torch.zeros(self.weight.shape[0], 4))

    def forward(self, x: Tensor) -> Tensor:
        """Apply W + 2 B A, with 2 = alpha / rank."""
        return nn.functional.linear(x, self.weight + 2.0 * self.b @ self.a, self.bias)


def rate_at(step: int) -> float:
    """Return the jagged cosine: warm-up of 2 steps at the start, re-warm-up of 2 after the warm start and restarts."""
    cosine = (step + 1) / 3 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / (TOTAL - 2)))
    since = (step - WARM) % EVERY
    return RATE * cosine * (min((since + 1) / 3, 1.0) if step >= WARM else 1.0)


def prune_by_magnitude(moments: dict[str, Tensor]) -> None:
    """Zero the nine tenths of the entries whose first moment is smallest, in both moments."""
    size = moments["exp_avg"].abs()
    count = round(0.9 * size.numel())
    smallest = torch.topk(size.flatten(), count, largest=False).indices
    for key in ("exp_avg", "exp_avg_sq"):
        moments[key].view(-1)[smallest] = 0.0


def test_it_is_the_papers_algorithm(architecture: str) -> None:
    """Every loss of a run with warm start and restarts is that of the algorithm in plain torch, to 1e-5 relative.

    There W itself is trained, then A and B beside it, which are merged into it; new draws of A are taken over.
    """
    _, method, step = begin(architecture)
    theirs = make_model(architecture).requires_grad_(False)
    plain = {path: PlainLora(theirs.get_submodule(path)) for path in method.layers}
    for path, module in plain.items():
        replace_module(theirs, path, module)
        module.a.data.copy_(method.layers[path].lora_A.detach())
    batches = Sft(pad_id=0).micro_batches(
        AdaptedModel(theirs, {}),
        list(enumerate(make_rows(8))),
        None,
        tokens=100_000,  # type: ignore[arg-type]
    )
    adam = torch.optim.AdamW([module.weight for module in plain.values()], weight_decay=0.0)
    for number in range(TOTAL):
        (batch,) = batches
        scores = theirs(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        loss = nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
        loss.backward()
        for group in adam.param_groups:
            group["lr"] = rate_at(number)
        adam.step()
        adam.zero_grad()
        (expected,) = take(step, number + 1)
        assert expected == pytest.approx(float(loss.detach()), rel=1e-5), number
        if number + 1 == WARM:
            for module in plain.values():
                module.weight.requires_grad_(False)
            factors = [factor for module in plain.values() for factor in (module.a, module.b)]
            for factor in factors:
                factor.grad = None
            adam = torch.optim.AdamW(factors, weight_decay=0.0)
        elif number + 1 > WARM and (number + 1 - WARM) % EVERY == 0:
            for path, module in plain.items():
                with torch.no_grad():
                    module.weight += 2.0 * module.b @ module.a
                    module.b.zero_()
                    module.a.copy_(method.layers[path].lora_A)
                for factor in (module.a, module.b):
                    prune_by_magnitude(adam.state[factor])
    for path, module in plain.items():
        torch.testing.assert_close(
            method.layers[path].merged_weight(),
            module.weight + 2.0 * module.b @ module.a,
            rtol=1e-4,
            atol=1e-5,
        )
