"""For every method a packed batch has the loss and the gradients of the same rows padded, and of each row alone."""

from __future__ import annotations

import pytest
import torch
from small import make_model, make_rows
from test_adapters import SETTINGS

from lora_cli import adapters
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.packing import keep_apart
from lora_cli.objectives.sft import Sft
from lora_cli.types import Progress


def gradients(name: str, architecture: str, *, packs: bool, tokens: int) -> tuple[float, torch.Tensor, int]:
    """Return the loss, the gradients and the number of batches of eight rows, with B not zero."""
    model = make_model(architecture)
    method = adapters.build(SETTINGS[name], seed=3)
    method.plan(3)
    method.inject(model)
    for key, parameter in method.trainable(model).items() if method.layers else ():
        generator = torch.Generator().manual_seed(len(key))
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    if packs:
        assert keep_apart(model) is None
    adapted, objective = AdaptedModel(model, method.layers, packs=packs), Sft(pad_id=0)
    model.train()
    batches = objective.micro_batches(
        adapted, list(enumerate(make_rows(8, seed=5))), Progress(0, 1), tokens=tokens
    )
    units, total = sum(map(objective.units, batches)), 0.0
    for batch in batches:
        loss = objective.loss_sum(adapted, batch)[0] / units
        loss.backward()
        total += float(loss.detach())
    found = [parameter.grad.flatten() for parameter in method.trainable(model).values()]  # type: ignore[union-attr]
    return total, torch.cat(found), len(batches)


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_packing_changes_neither_loss_nor_gradient(name: str, architecture: str) -> None:
    """Packed into several sequences, padded, or row by row: loss and gradients agree to 1e-6 relative in fp32."""
    loss, gradient, count = gradients(name, architecture, packs=False, tokens=1)
    assert count == 8
    for packs, tokens, batches in ((False, 10_000, 1), (True, 60, 3)):
        other, found, count = gradients(name, architecture, packs=packs, tokens=tokens)
        assert count >= batches
        assert other == pytest.approx(loss, rel=1e-6)
        assert float((found - gradient).norm() / gradient.norm()) <= 1e-6
