"""Schedules against transformers' own, and their properties."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import optimization

from lora_cli.runtime.schedule import multiplier, warmup_steps

NAMES = ("constant", "linear", "cosine", "wsd", "polynomial", "inverse_sqrt")


def transformers_curve(make: str, total: int, **settings: float) -> list[float]:
    """Return the learning rates of a transformers scheduler of peak 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = getattr(optimization, make)(optimizer, **settings)
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(
    ("name", "make", "theirs", "ours"),
    [
        ("linear", "get_linear_schedule_with_warmup", {"num_training_steps": 50}, {}),
        ("cosine", "get_cosine_schedule_with_warmup", {"num_training_steps": 50}, {}),
        (
            "cosine",
            "get_cosine_with_min_lr_schedule_with_warmup",
            {"num_training_steps": 50, "min_lr_rate": 0.1},
            {"floor": 0.1},
        ),
        (
            "polynomial",
            "get_polynomial_decay_schedule_with_warmup",
            {"num_training_steps": 50, "power": 2.0, "lr_end": 1e-12},
            {"power": 2.0},
        ),
        ("constant", "get_constant_schedule_with_warmup", {}, {}),
    ],
)
def test_after_the_warmup_the_curve_is_transformers(
    name: str, make: str, theirs: dict[str, float], ours: dict[str, float], warmup: int
) -> None:
    """After the warm-up each schedule equals transformers' at every step."""
    expected = transformers_curve(make, 50, num_warmup_steps=warmup, **theirs)
    for step in range(warmup, 50):
        assert multiplier(name, step, total_steps=50, warmup=warmup, **ours) == pytest.approx(
            expected[step], abs=1e-9
        )


@pytest.mark.parametrize("name", NAMES)
@given(total=st.integers(1, 300), fraction=st.floats(0, 1), floor=st.floats(0, 0.9))
def test_the_multiplier_stays_in_bounds(name: str, total: int, fraction: float, floor: float) -> None:
    """Warm-up rises strictly from above 0; then the rate never rises, never exceeds 1, never falls below the floor."""
    warmup = warmup_steps(fraction, total)
    rates = [multiplier(name, step, total_steps=total, warmup=warmup, floor=floor) for step in range(total)]
    rising, falling = rates[:warmup], rates[warmup:]
    assert all(0 < rate < 1 for rate in rising)
    assert rising == sorted(set(rising))
    assert all(floor - 1e-12 <= rate <= 1 for rate in falling)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(falling))


def test_wsd_is_flat_then_linear() -> None:
    """wsd holds the peak until the last `decay` part of all steps, then falls linearly to the floor."""
    rates = [multiplier("wsd", step, total_steps=100, warmup=10, decay=0.2, floor=0.1) for step in range(100)]
    assert rates[10:81] == [1.0] * 71
    assert rates[90] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[99] == pytest.approx(0.1 + 0.9 * 0.05)


def test_inverse_sqrt_follows_its_law() -> None:
    """After the warm-up the rate falls as 1 / sqrt(step) (arXiv 1706.03762, eq. 3)."""
    assert multiplier("inverse_sqrt", 400, total_steps=1000, warmup=100) == pytest.approx(0.5)


@pytest.mark.parametrize(("warmup", "expected"), [(5, 5), (0, 0), (0.1, 20), (1.0, 200), (500, 200), (1, 1)])
def test_warmup_is_steps_or_a_fraction(warmup: int | float, expected: int) -> None:
    """An integer warm-up counts steps, a float is a fraction of all steps: 1 is one step, 1.0 is all of them."""
    assert warmup_steps(warmup, 200) == expected
