"""Singular values without the matrix, the two counts of directions, and the rule of the verdicts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lora_cli.stages import _spectrum
from lora_cli.stages._inspection import profile_of


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers, float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_values(values: list[float], side: int = 40) -> Tensor:
    """Return a (side, side) matrix with these singular values, then zeros."""
    left, right = (torch.linalg.qr(normal(side, side, seed=seed).double()).Q for seed in (1, 2))
    diagonal = torch.zeros(side, dtype=torch.float64)
    diagonal[: len(values)] = torch.tensor(values, dtype=torch.float64)
    return left @ torch.diag(diagonal) @ right


@pytest.mark.parametrize(
    ("outer", "inner", "rank"),
    [(40, 30, 8), (30, 40, 1), (40, 30, 30), (20, 30, 64), (30, 20, 64), (512, 192, 16)],
)
def test_of_a_product_they_are_those_of_the_matrix(outer: int, inner: int, rank: int) -> None:
    """The values from the factors are torch's of the dense product in float64, also where the factors are wider."""
    a, b = normal(rank, inner), normal(outer, rank, seed=1)
    dense = torch.linalg.svdvals(b.double() @ a.double())
    found = _spectrum.of_product(a, b)
    assert len(found) == min(outer, inner, rank)
    assert float((found - dense[: len(found)]).abs().max()) <= 1e-12 * float(dense[0])


@pytest.mark.parametrize(("outer", "inner"), [(30, 30), (4000, 300), (300, 4000), (1, 5)])
def test_of_a_matrix_they_are_torchs(outer: int, inner: int) -> None:
    """Values from the Gram matrix are those of an SVD in float64, over more than one block of rows or of columns."""
    matrix = normal(outer, inner) * 1e-3
    dense = torch.linalg.svdvals(matrix.double())
    assert float((_spectrum.of_matrix(matrix) - dense).abs().max()) <= 1e-12 * float(dense[0])


def test_lost_directions_of_a_matrix_are_nearly_zero() -> None:
    """Of a matrix of rank 3 all further values are below 1e-7 of the first: what the Gram matrix rounds away."""
    values = _spectrum.of_matrix(with_values([1.0, 0.5, 0.25]))
    assert values[:3].tolist() == pytest.approx([1.0, 0.5, 0.25], rel=1e-9)
    assert float(values[3:].max()) <= 1e-7


def test_an_update_of_no_directions_has_no_values() -> None:
    """Factors of rank 0, as AdaLoRA may leave them, have no singular values."""
    assert _spectrum.of_product(torch.zeros(0, 5), torch.zeros(7, 0)).tolist() == []


def test_the_effective_rank_is_the_exponent_of_the_entropy() -> None:
    """It is torch's entropy of the values as probabilities, n for n equal values, and does not depend on the scale."""
    values = normal(20).abs().sort(descending=True).values.double()
    entropy = torch.distributions.Categorical(probs=values).entropy()
    assert _spectrum.effective_rank(values.tolist()) == pytest.approx(math.exp(float(entropy)), rel=1e-12)
    assert _spectrum.effective_rank((1000 * values).tolist()) == pytest.approx(math.exp(float(entropy)))
    assert _spectrum.effective_rank([0.3] * 7) == pytest.approx(7.0)
    assert _spectrum.effective_rank([2.0, 0.0]) == 1.0
    assert _spectrum.effective_rank([0.0, 0.0]) == 0.0


def test_the_rank_for_99_percent_loses_a_tenth_of_the_norm() -> None:
    """The best approximation of that rank is within 10 % of the matrix in the Frobenius norm, of one less it is not."""
    matrix = with_values([0.8**index for index in range(30)])
    u, values, v = torch.linalg.svd(matrix)
    number = _spectrum.rank_for(values.tolist())

    def lost(rank: int) -> float:
        return float((matrix - (u[:, :rank] * values[:rank]) @ v[:rank]).norm() / matrix.norm())

    assert lost(number) <= 0.1 < lost(number - 1)
    assert _spectrum.rank_for([1.0, 1.0], energy=1.0) == 2
    assert _spectrum.rank_for([0.0]) == 0


@pytest.mark.parametrize(
    ("values", "rank", "narrow", "expected"),
    [
        ([1.0, 0.7] + [0.0] * 14, 16, 64, ("wasted", 2)),
        ([1.0, 0.7] + [1e-4] * 14, 16, 64, ("wasted", 2)),
        ([1.0] * 6 + [0.0] * 10, 16, 64, ("wasted", 6)),
        ([1.0] * 7 + [0.0] * 9, 16, 64, ("fits", None)),
        ([1.0] * 16, 16, 64, ("short", 32)),
        ([1.0] * 16, 16, 20, ("short", 20)),
        ([1.0] * 16, 16, 16, ("fits", None)),
        ([1.0] * 16, 256, 16, ("fits", None)),
        ([1.0, 0.9, 0.8, 0.7], 4, 64, ("short", 8)),
        ([1.0, 0.9, 0.8, 0.1], 4, 64, ("fits", None)),
        ([1.0] * 15 + [0.1], 16, 64, ("fits", None)),
        ([1.0] + [0.3] * 15, 16, 64, ("short", 32)),
        ([1.0] + [0.2] * 15, 16, 64, ("fits", None)),
        ([0.8**index for index in range(16)], 16, 64, ("fits", None)),
        ([1.0, 1.0, 1.0], 3, 64, (None, None)),
        ([1.0, 0.01, 0.01], 3, 64, ("wasted", 1)),
        ([1.0], 1, 64, (None, None)),
        ([0.0] * 4, 4, 64, ("zero", None)),
        ([], 0, 64, ("zero", None)),
    ],
)
def test_the_verdict_follows_the_rule(
    values: list[float], rank: int, narrow: int, expected: tuple[str | None, int | None]
) -> None:
    """Rank 2 in 16 is wasted, a flat spectrum short, a falling one fits; of under 4 values none is called flat."""
    assert _spectrum.judge(values, rank, narrow) == expected


def test_the_profile_is_the_means_of_neighbours() -> None:
    """16 values become 8 means of pairs as parts of the first value; fewer than 8 stay as they are."""
    assert profile_of([8.0, 4.0] + [2.0] * 14) == [0.75] + [0.25] * 7
    assert profile_of([4.0, 1.0]) == [1.0, 0.25]
    assert profile_of([0.0, 0.0]) == []
