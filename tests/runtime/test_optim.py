"""The optimizer against torch's own, its masters, and its state on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_cli.runtime.optim import MasterAdamW


def parameters(dtype: torch.dtype, seed: int = 0) -> dict[str, nn.Parameter]:
    """Return two parameters of unlike shape."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in (("a", (5, 3)), ("b", (7,)))
    }


def loss_of(values: dict[str, nn.Parameter], step: int) -> torch.Tensor:
    """Return a loss whose gradient changes with the step."""
    return sum(((value.float() - step / 10) ** 3).sum() for value in values.values())  # type: ignore[return-value]


def test_fp32_is_torchs_adamw() -> None:
    """20 clipped steps with weight decay equal torch.optim.AdamW on float32 weights."""
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer = MasterAdamW(ours, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    adamw = torch.optim.AdamW(theirs.values(), lr=0.05, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for step in range(20):
        loss_of(ours, step).backward()
        optimizer.clip(optimizer.gradient_norm(), 1.0)
        optimizer.step(0.05)
        optimizer.zero_grad()
        loss_of(theirs, step).backward()
        nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        adamw.step()
        adamw.zero_grad()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)


def test_bf16_weights_move_by_less_than_their_spacing() -> None:
    """Steps too small for bfloat16 add up in the master: the weight follows the float32 run to its own rounding."""
    low, high = parameters(torch.bfloat16), parameters(torch.float32)
    for name, value in low.items():
        high[name].data.copy_(value.float())
    optimizers = [MasterAdamW(low), MasterAdamW(high)]
    for _ in range(200):
        for values, optimizer in zip((low, high), optimizers, strict=True):
            for value in values.values():
                (value.float() * 0.5).sum().backward()
            optimizer.step(1e-4)
            optimizer.zero_grad()
    for name, value in low.items():
        torch.testing.assert_close(value.float(), high[name].detach().bfloat16().float())
        assert float((value.float() - parameters(torch.bfloat16)[name].float()).abs().min()) > 0.01


def test_bf16_gradients_add_up_in_float32() -> None:
    """The sum over micro-batches loses nothing to bfloat16: 256 gradients of 1 and one of 1/256 are all counted."""
    value = {"a": nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))}
    optimizer = MasterAdamW(value)
    for factor in [1.0] * 256 + [1 / 256]:
        (value["a"] * factor).sum().backward()
    assert float(optimizer.gradients()[0]) == 256 + 1 / 256
    assert value["a"].grad is None


def test_state_goes_through_a_file(tmp_path: Path) -> None:
    """An optimizer restored from its file continues bit-equal, for float32 and for bfloat16 weights."""
    for dtype in (torch.float32, torch.bfloat16):
        straight = parameters(dtype)
        first = MasterAdamW(straight)
        for step in range(3):
            loss_of(straight, step).backward()
            first.step(0.01)
            first.zero_grad()
        save_file({k: v.contiguous() for k, v in first.state_dict().items()}, tmp_path / "state.safetensors")
        resumed = parameters(dtype, seed=1)
        second = MasterAdamW(resumed)
        second.load_state_dict(load_file(tmp_path / "state.safetensors"))
        for values, optimizer in ((straight, first), (resumed, second)):
            loss_of(values, 3).backward()
            optimizer.step(0.01)
            optimizer.zero_grad()
        assert all(torch.equal(straight[name], resumed[name]) for name in straight)
