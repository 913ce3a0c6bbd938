"""Other starts of LoRA's factors than the default: A (r, in) and B (out, r), float32, from a seed or from the base.

The first two leave B A at zero. PiSSA and OLoRA start at a part of the base weight W, from which it is taken away
again; see `ShiftedLoraLinear`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_cli.errors import InputError

FROM_BASE = ("pissa", "olora")
"""Starts that are a function of the base weight, and whose B A is not zero."""


def factors(
    init: str, weight: Tensor, rank: int, scale: float, seed: int, path: str
) -> tuple[Tensor, Tensor]:
    """Return A and B for the base weight (out, in) of the module at `path`; `scale` multiplies B A in the layer.

    Raises:
        InputError: the rank is more than the weight has.
    """
    if init in FROM_BASE and rank > min(weight.shape):
        raise InputError(
            f"adapter.rank: {init} takes {rank} directions out of {path}, whose weight {tuple(weight.shape)} has"
            f" {min(weight.shape)} (lower it, or set adapter.rank_pattern for this module)"
        )
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features = weight.shape
    if init == "gaussian":
        return _gaussian(rank, in_features, out_features, generator)
    if init == "orthogonal":
        return _orthogonal(rank, in_features, out_features, generator)
    return (_pissa if init == "pissa" else _olora)(weight.float(), rank, scale)


def _gaussian(rank: int, fan_in: int, fan_out: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw A as the LoRA paper does, with PEFT's deviation 1 / r; B is zero."""
    return torch.randn(rank, fan_in, generator=generator) / rank, torch.zeros(fan_out, rank)


def _orthogonal(rank: int, fan_in: int, fan_out: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw A and B in two orthogonal halves of the r-space, as PEFT does: neither is zero, but B A is.

    With Q (r, r) orthogonal, A lies in the span of its even rows and B in that of its odd ones.
    """
    basis = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
    a = basis[0::2].T @ torch.randn(rank // 2, fan_in, generator=generator) / 10
    b = torch.randn(fan_out, rank // 2, generator=generator) @ basis[1::2] / 10
    return a, b


def _pissa(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Split the r largest singular values evenly over A and B (arXiv 2404.02948, eq. 2 and 3)."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


def _olora(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Take the first r columns of Q as B and rows of R as A, W = Q R (arXiv 2406.01775, algorithm 1)."""
    del scale
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]
