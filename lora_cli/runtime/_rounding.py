"""Stochastic rounding to bfloat16: up or down with the odds that make the mean exact.

A bfloat16 weight without a float32 master moves by at least 2^-9 of itself or not at all, and most steps are smaller.
Rounded to nearest they are all lost; rounded stochastically they are made in the mean (arXiv 2010.06192).
"""

from __future__ import annotations

import torch
from torch import Tensor

_KEPT = -(1 << 16)
"""Mask of the bits of a float32 that bfloat16 has."""
_MAGNITUDE, _LARGEST = 0x7FFFFFFF, 0x7F7F0000
"""Mask of all bits but the sign, and the largest finite bfloat16."""


def stochastic_round(values: Tensor, generator: torch.Generator) -> Tensor:
    """Return float32 values (n,) as bfloat16: each one of its two neighbours, the nearer one more often.

    What bfloat16 holds stays as it is, and so does what is not finite. A finite value never becomes infinite: beyond
    the largest bfloat16 it is rounded to that.
    """
    bits = values.view(torch.int32)
    drawn = _draw(len(values), generator)
    drawn.masked_fill_((bits & _MAGNITUDE) >= _LARGEST, 0)
    # Sign and magnitude: what is added to the bits that go carries into those that stay with the right odds.
    rounded = ((bits + drawn) & _KEPT).view(torch.float32)
    return torch.where(values.isnan(), values, rounded).bfloat16()


def _draw(number: int, generator: torch.Generator) -> Tensor:
    """Return integers from 0 to 2^16 - 1, int32; four from each 64-bit draw, which takes half the time."""
    words = torch.empty(-(-number // 4), dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[:number].to(torch.int32).bitwise_and_(0xFFFF)
