"""Stochastic rounding to bfloat16: up or down with the odds that make the mean exact.

A bfloat16 weight without a float32 master moves by at least 2^-9 of itself or not at all, and most steps are smaller.
Rounded to nearest they are all lost; rounded stochastically they are made in the mean (arXiv 2010.06192).
"""

from __future__ import annotations

import torch
from torch import Tensor

_KEPT = -(1 << 16)
"""Mask of the bits of a float32 that bfloat16 has."""


def stochastic_round(values: Tensor, generator: torch.Generator) -> Tensor:
    """Return float32 values as bfloat16: each one of its two neighbours, the nearer one more often.

    What bfloat16 holds stays as it is, and so does what is not finite. A finite value never becomes infinite: beyond
    the largest bfloat16 it is rounded to that.
    """
    bits = values.view(torch.int32)
    drawn = torch.randint(1 << 16, bits.shape, generator=generator, dtype=torch.int32, device=bits.device)
    # Sign and magnitude: what is added to the bits that go carries into those that stay with the right odds.
    rounded = ((bits + drawn) & _KEPT).view(torch.float32)
    down = (bits & _KEPT).view(torch.float32)
    rounded = torch.where(rounded.isfinite(), rounded, down)
    return torch.where(values.isfinite(), rounded, values).bfloat16()
