"""The optimizer against torch's own, its masters, and its state on disk."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_cli.runtime.optim import MasterAdamW

SHAPES = {"a": (5, 3), "b": (7,), "large": (64, 70)}


def parameters(dtype: torch.dtype, seed: int = 0, large: bool = False) -> dict[str, nn.Parameter]:
    """Return two parameters of unlike shape, and one of more than 4096 values if asked for."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in SHAPES.items()
        if large or name != "large"
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


@pytest.mark.parametrize("keep_masters", [True, False])
def test_bf16_gradients_add_up_in_float32(keep_masters: bool) -> None:
    """The sum over micro-batches loses nothing to bfloat16: 256 gradients of 1 and one of 1/256 are all counted."""
    value = {"a": nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))}
    optimizer = MasterAdamW(value, keep_masters=keep_masters)
    for factor in [1.0] * 256 + [1 / 256]:
        (value["a"] * factor).sum().backward()
    assert float(optimizer.gradients()[0]) == 256 + 1 / 256
    assert value["a"].grad is None
    optimizer.zero_grad()
    assert float(optimizer.gradients()[0]) == 0.0


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("form", ["float32", "masters", "no masters"])
def test_state_goes_through_a_file(tmp_path: Path, form: str, eight_bit: bool) -> None:
    """An optimizer restored from its file continues bit-equal, with and without masters, float32 and 8-bit moments."""
    dtype = torch.float32 if form == "float32" else torch.bfloat16
    options: dict[str, Any] = {"eight_bit": eight_bit, "keep_masters": form != "no masters"}
    straight = parameters(dtype, large=True)
    first = MasterAdamW(straight, **options)
    for step in range(3):
        loss_of(straight, step).backward()
        first.step(0.01)
        first.zero_grad()
    state = {key: value.contiguous() for key, value in first.state_dict().items()}
    kinds = {"torch.uint8"} if eight_bit else set()
    kinds |= {"torch.float32"} | ({"torch.bfloat16"} if form == "no masters" else set())
    assert {str(value.dtype) for value in state.values()} == kinds
    save_file(state, tmp_path / "state.safetensors")
    resumed = parameters(dtype, seed=1, large=True)
    second = MasterAdamW(resumed, **options)
    second.load_state_dict(load_file(tmp_path / "state.safetensors"))
    for values, optimizer in ((straight, first), (resumed, second)):
        for step in (3, 4):
            loss_of(values, step).backward()
            optimizer.step(0.01)
            optimizer.zero_grad()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_eight_bit_updates_are_adamw_on_what_is_stored() -> None:
    """Each update is the paper's AdamW from the moments as they read, which are then stored to a code's precision."""
    values = parameters(torch.float32, large=True)
    optimizer = MasterAdamW(values, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, eight_bit=True)
    weight = values["large"]
    for step in range(1, 8):
        loss_of(values, step).backward()
        (gradient,) = (g.double() for g in optimizer.gradients()[-1:])
        before = optimizer.moments("large") or {"exp_avg": gradient * 0, "exp_avg_sq": gradient * 0}
        m = 0.8 * before["exp_avg"].double() + 0.2 * gradient
        v = 0.95 * before["exp_avg_sq"].double() + 0.05 * gradient**2
        update = (m / (1 - 0.8**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-6)
        expected = weight.detach().double() * (1 - 0.01 * 0.1) - 0.01 * update
        optimizer.step(0.01)
        optimizer.zero_grad()
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)
        for key, exact in (("exp_avg", m), ("exp_avg_sq", v)):
            largest = (
                nn.functional.pad(exact.flatten().abs(), (0, -exact.numel() % 256)).view(-1, 256).amax(dim=1)
            )
            scale = largest.repeat_interleave(256)[: exact.numel()].view_as(exact)
            # The widest code spans 0.014 of the scale; a value in it is at most half of that away.
            assert float(((optimizer.moments("large")[key] - exact).abs() / scale).max()) <= 0.0075


def test_small_weights_keep_float32_moments() -> None:
    """Below 4096 values the 8-bit optimizer is AdamW in float32, bit for bit."""
    low, high = parameters(torch.float32, large=True), parameters(torch.float32, large=True)
    optimizers = [MasterAdamW(low, eight_bit=True), MasterAdamW(high)]
    for step in range(5):
        for values, optimizer in zip((low, high), optimizers, strict=True):
            loss_of(values, step).backward()
            optimizer.step(0.01)
            optimizer.zero_grad()
    assert torch.equal(low["a"], high["a"])
    assert torch.equal(low["b"], high["b"])
    assert not torch.equal(low["large"], high["large"])


def test_eight_bits_learn_what_float32_learns() -> None:
    """200 noisy steps of a regression end with a loss within 2 % of float32 AdamW's, on weights within 3 % of its."""
    ends = []
    for eight_bit in (False, True):
        generator = torch.Generator().manual_seed(0)
        target = torch.randn(96, 64, generator=generator)
        weight = nn.Parameter(torch.zeros(96, 64))
        optimizer = MasterAdamW({"w": weight}, eight_bit=eight_bit)
        for step in range(200):
            x = torch.randn(32, 64, generator=generator) * 10.0 ** torch.linspace(-1, 0, 64)
            noise = torch.randn(32, 96, generator=generator)
            (x @ (weight - target).T + noise).square().mean().backward()
            optimizer.step(0.05 * (1 - step / 200))
            optimizer.zero_grad()
        scale = 10.0 ** torch.linspace(-2, 0, 64)
        ends.append((float(((weight - target).square() * scale).sum(dim=1).mean() + 1), weight.detach()))
    assert abs(ends[1][0] / ends[0][0] - 1) <= 0.02
    assert float((ends[1][1] - ends[0][1]).norm() / ends[0][1].norm()) <= 0.03


def test_no_eight_bit_update_leaps() -> None:
    """Where gradients in a block differ 1000-fold no update exceeds 1.5 times the rate: none is divided by nothing."""
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** torch.linspace(-3, 0, 64)
    target, weight = torch.randn(96, 64, generator=generator), nn.Parameter(torch.zeros(96, 64))
    optimizer = MasterAdamW({"w": weight}, eight_bit=True)
    for _ in range(200):
        x = torch.randn(32, 64, generator=generator) * sizes
        noise = 0.01 * torch.randn(32, 96, generator=generator)
        (x @ (weight - target).T + noise).square().mean().backward()
        before = weight.detach().clone()
        optimizer.step(0.02)
        optimizer.zero_grad()
        assert float((weight.detach() - before).abs().max()) <= 1.5 * 0.02


def test_without_masters_small_steps_are_made_in_the_mean() -> None:
    """400 steps of 1e-4, each lost to rounding to nearest, move 4096 weights of 1 by 0.04 in the mean."""
    weight = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    assert torch.equal((weight.float() - 1e-4).bfloat16(), weight)
    optimizer = MasterAdamW({"w": weight}, keep_masters=False)
    for _ in range(400):
        weight.float().sum().backward()
        optimizer.step(1e-4)
        optimizer.zero_grad()
    assert optimizer.masters["w"] is weight
    moved = 1.0 - weight.detach().double()
    # Each step is a coin of 1e-4 against the spacing below 1: its variance, 400 times, over 4096 weights.
    error = (400 * 1e-4 * 2.0**-8 / 4096) ** 0.5
    assert abs(float(moved.mean()) - 0.04) <= 5 * error


def test_rounding_is_a_function_of_seed_name_and_step() -> None:
    """Equal seeds and names round alike, whatever else is trained; another seed or name rounds otherwise."""

    def trained(seed: int, name: str, *others: str) -> torch.Tensor:
        weights = {key: nn.Parameter(torch.ones(64, dtype=torch.bfloat16)) for key in (*others, name)}
        optimizer = MasterAdamW(weights, keep_masters=False, seed=seed)
        for _ in range(20):
            sum(weight.float().sum() for weight in weights.values()).backward()  # type: ignore[union-attr]
            optimizer.step(1e-3)
            optimizer.zero_grad()
        return weights[name].detach()

    assert torch.equal(trained(0, "w"), trained(0, "w", "v"))
    assert not torch.equal(trained(0, "w"), trained(1, "w"))
    assert not torch.equal(trained(0, "w"), trained(0, "v"))


def test_decay_spares_what_is_named() -> None:
    """A weight in `undecayed` moves as without weight decay, the others as with it."""
    ends = []
    for decay, spared in ((0.0, ()), (0.5, ("b",))):
        values = parameters(torch.float32)
        optimizer = MasterAdamW(values, weight_decay=decay, undecayed=spared)
        loss_of(values, 1).backward()
        optimizer.step(0.1)
        ends.append(values)
    assert torch.equal(ends[0]["b"], ends[1]["b"])
    assert not torch.equal(ends[0]["a"], ends[1]["a"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_parameters_release_the_old_ones(dtype: torch.dtype) -> None:
    """After `set_parameters` the old weights' state is freed, their gradients are autograd's, the new ones train."""
    old, new = parameters(dtype), parameters(dtype, seed=1)
    optimizer = MasterAdamW(old)
    loss_of(old, 1).backward()
    optimizer.step(0.1)
    optimizer.zero_grad()
    kept = [weakref.ref(moment) for moment in optimizer.moments("a").values()]
    assert optimizer.updates(old)
    optimizer.set_parameters(new)
    gc.collect()
    assert all(reference() is None for reference in kept)
    assert not optimizer.updates(old)
    assert optimizer.moments("a") == {}
    loss_of(old, 1).backward()
    assert all(value.grad is not None for value in old.values())
    before = {name: value.detach().clone() for name, value in new.items()}
    loss_of(new, 1).backward()
    optimizer.step(0.1)
    assert all(not torch.equal(value, before[name]) for name, value in new.items())
