"""Stochastic rounding to bfloat16."""

from __future__ import annotations

import torch

from lora_cli.runtime._rounding import stochastic_round


def generator(seed: int = 0) -> torch.Generator:
    """Return a stream."""
    return torch.Generator().manual_seed(seed)


def values() -> torch.Tensor:
    """Return float32 values of both signs and of all sizes, down to subnormal ones."""
    sizes = 10.0 ** torch.linspace(-40, 38, 2000, dtype=torch.float64)
    return (torch.randn(2000, generator=generator(5), dtype=torch.float64) * sizes).clamp(-3e38, 3e38).float()


def test_a_value_goes_to_one_of_its_two_neighbours() -> None:
    """Every result is the largest bfloat16 below or the smallest above, found by numpy-like stepping of the bits."""
    exact = values()
    for seed in range(5):
        rounded = stochastic_round(exact, generator(seed))
        assert rounded.dtype == torch.bfloat16
        nearest = exact.bfloat16()
        above = torch.where(
            nearest.float() >= exact, nearest, torch.nextafter(nearest, nearest * 0 + torch.inf)
        )
        below = torch.where(
            nearest.float() <= exact, nearest, torch.nextafter(nearest, nearest * 0 - torch.inf)
        )
        assert bool(((rounded == above) | (rounded == below)).all())


def test_what_bfloat16_holds_stays() -> None:
    """A value that bfloat16 can hold is never changed, in no draw."""
    held = torch.cat([values().bfloat16().float(), torch.tensor([0.0, -0.0, 1.0, -2.5])])
    for seed in range(20):
        assert torch.equal(stochastic_round(held, generator(seed)).float(), held)


def test_the_mean_is_exact() -> None:
    """Over 100,000 draws the mean of each value is the value, to 5 standard errors of a coin with its odds."""
    exact = torch.tensor([1.001, -1.003, 3.14159, 0.1, -1e-5, 1.0 + 2**-9, 2.0**-133 * 1.3])
    draws = 100_000
    rounded = stochastic_round(exact.repeat(draws), generator())
    mean = rounded.view(draws, -1).double().mean(dim=0)
    spacing = 2.0 ** (exact.abs().log2().floor().clamp(min=-126).double() - 7)
    odds = (exact.double() / spacing) % 1.0
    error = spacing * (odds * (1 - odds) / draws).sqrt()
    assert bool(((mean - exact.double()).abs() <= 5 * error).all())


def test_nothing_becomes_infinite_or_finite() -> None:
    """NaN of any pattern and both infinities stay, and the largest float32 becomes the largest bfloat16."""
    largest = torch.finfo(torch.float32).max
    patterns = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32)
    for seed in range(20):
        assert bool(stochastic_round(patterns.view(torch.float32), generator(seed)).isnan().all())
        ends = stochastic_round(torch.tensor([torch.inf, -torch.inf, largest, -largest]), generator(seed))
        limit = torch.finfo(torch.bfloat16).max
        assert ends.tolist() == [torch.inf, -torch.inf, limit, -limit]
