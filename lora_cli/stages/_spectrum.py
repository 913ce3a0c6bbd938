"""The singular values of an update, how many directions it uses, and whether that was the rank it had. Pure functions.

    effective rank    exp(-sum p_i ln p_i), p_i = s_i / sum s     Roy and Vetterli, EUSIPCO 2007, definitions 1 and 2
    rank for 99 %     the least n with s_1^2 + ... + s_n^2 >= 0.99 sum s_i^2

The first counts directions by their length and is a smooth number; the second is the rank of the best approximation
that loses a tenth of the update's Frobenius norm (Eckart and Young), and is what a rank is judged by.

The rule, on an update that its factors bound to `rank` directions:

    zero      all singular values are 0
    wasted    99 % of the energy is in at most WASTED x rank directions; suggested is that number
    short     the last quarter of the values still holds FLAT_ENERGY of the energy, and the last value is at least
              FLAT_RATIO of the first; suggested is twice the rank, at most the smaller side of the matrix
    fits      neither

Fewer than LEAST values are too few to be flat, and an update as wide as its matrix cannot be short.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ENERGY = 0.99
WASTED = 0.4
FLAT_ENERGY, FLAT_RATIO = 0.1, 0.25
LEAST = 4

_BLOCK = 2**20
"""Elements of a dense update that are float64 at a time: 8 MB."""


@torch.no_grad()
def of_product(a: Tensor, b: Tensor) -> Tensor:
    """Return the singular values of B A from A (R, in) and B (out, R), (min(R, in, out),) float64, falling.

    They are those of R_b R_a^T, at most (R, R), where Q R are the factors' QR decompositions: B A is never formed.
    """
    if not len(a):
        return torch.zeros(0, dtype=torch.float64)
    r_a, r_b = (torch.linalg.qr(factor.double(), mode="r").R for factor in (a.T, b))
    values: Tensor = torch.linalg.svdvals(r_b @ r_a.T)
    return values.cpu()


@torch.no_grad()
def of_matrix(matrix: Tensor) -> Tensor:
    """Return the singular values of a matrix (out, in), (min(in, out),) float64, falling.

    They are the roots of the eigenvalues of its Gram matrix on the smaller side, added up in float64 by blocks: a sixth
    of the time of an SVD at (1024, 4096), and right to 1e-8 of the largest, which an SVD in float32 is not.
    """
    tall = matrix if len(matrix) >= matrix.shape[1] else matrix.T
    side = tall.shape[1]
    gram = torch.zeros(side, side, dtype=torch.float64, device=matrix.device)
    rows = max(1, _BLOCK // side)
    for first in range(0, len(tall), rows):
        block = tall[first : first + rows].double()
        gram.addmm_(block.T, block)
    values: Tensor = torch.linalg.eigvalsh(gram).clamp(min=0.0).sqrt().flip(0)
    return values.cpu()


def effective_rank(values: Sequence[float]) -> float:
    """Return exp of the entropy of the singular values as shares of their sum; 0 where all are zero."""
    total = math.fsum(values)
    shares = [value / total for value in values if value > 0.0] if total else []
    return math.exp(-math.fsum(share * math.log(share) for share in shares)) if shares else 0.0


def rank_for(values: Sequence[float], energy: float = ENERGY) -> int:
    """Return how many of the largest singular values hold this part of the sum of their squares."""
    squares = [value * value for value in values]
    wanted, held = energy * math.fsum(squares), 0.0
    if not wanted:
        return 0
    for number, square in enumerate(squares, start=1):
        held += square
        # The last values may be lost in rounding: the first so many then hold all there is.
        if held >= wanted * (1.0 - 1e-12):
            return number
    return len(squares)


def judge(values: Sequence[float], rank: int, narrow: int) -> tuple[str | None, int | None]:
    """Return the verdict on the rank of an update, and the rank that is suggested instead, None for no other.

    `values` are the singular values, at most `rank` of them; `narrow` is the smaller side of the matrix. The verdict is
    None where the spectrum has too few values to say.
    """
    if not any(values):
        return "zero", None
    rank = min(rank, narrow)
    used = rank_for(values)
    if used <= WASTED * rank:
        return "wasted", used
    if rank == narrow:
        return "fits", None
    if rank < LEAST:
        return None, None
    padded = [*values, *[0.0] * (rank - len(values))]
    squares = [value * value for value in padded]
    tail = math.fsum(squares[-math.ceil(rank / 4) :]) / math.fsum(squares)
    if tail >= FLAT_ENERGY and padded[-1] >= FLAT_RATIO * padded[0]:
        return "short", min(2 * rank, narrow)
    return "fits", None
