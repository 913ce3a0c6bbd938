"""Other starts of LoRA's factors than the default: A (r, in) and B (out, r), float32, from a seed or from the base.

The first two leave B A at zero. PiSSA and OLoRA start at a part of the base weight W, from which it is taken away
again; see `ShiftedLoraLinear`. LoftQ starts at what a quantized base lacks of W, and keeps that. EVA: `_lora_eva.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lora_cli.errors import InputError
from lora_cli.models.nf4 import QuantizedLinear

FROM_BASE = ("pissa", "olora")
"""Starts that are a function of the base weight, and whose B A is not zero."""

PREPARED = ("eva", "loftq")
"""Starts that need more than the layer: the run's rows, or the weight as it is on disk."""


def factors(
    init: str, weight: Tensor, rank: int, scale: float, seed: int, path: str
) -> tuple[Tensor, Tensor]:
    """Return A and B for the base weight (out, in) of the module at `path`; `scale` multiplies B A in the layer.

    Raises:
        InputError: the rank is more than the weight has.
    """
    if init in FROM_BASE:
        require_rank(init, rank, weight, path)
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features = weight.shape
    if init == "gaussian":
        return _gaussian(rank, in_features, out_features, generator)
    if init == "orthogonal":
        return _orthogonal(rank, in_features, out_features, generator)
    return (_pissa if init == "pissa" else _olora)(weight.float(), rank, scale)


def require_rank(init: str, rank: int, weight: Tensor, path: str) -> None:
    """Refuse a start that takes more directions out of a weight (out, in) than it has.

    Raises:
        InputError: with the module and its shape.
    """
    if rank > min(weight.shape):
        raise InputError(
            f"adapter.rank: {init} takes {rank} directions out of {path}, whose weight {tuple(weight.shape)} has"
            f" {min(weight.shape)} (lower it, or set adapter.rank_pattern for this module)"
        )


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


def loftq_starts(
    model: nn.Module,
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    full_weight: Callable[[str], Tensor],
) -> tuple[dict[str, tuple[Tensor, Tensor]], str]:
    """Return A and B of LoftQ for each quantized layer, and a line on what they mend; one full weight at a time.

    Raises:
        InputError: no layer is quantized, or a rank is more than a weight has.
    """
    starts, before, after = {}, [], []
    for path, rank in ranks.items():
        layer = model.get_submodule(path)
        if not isinstance(layer, QuantizedLinear):
            continue
        quantized = layer.dequantized()
        require_rank("loftq", rank, quantized, path)
        weight = full_weight(path).to(quantized.device)
        a, b, error, left = loftq(weight, quantized, rank, scales[path])
        starts[path] = a, b
        before.append(error)
        after.append(left)
    if not starts:
        raise InputError(
            "adapter.init: loftq mends what quantization took, but none of the targets is quantized (use default)"
        )
    means = (sum(before) / len(before), sum(after) / len(after))
    return starts, (
        f"loftq: relative error of the weights {means[0]:.4f} quantized, {means[1]:.4f} with the adapter"
        f" (mean of {len(starts)} layers)"
    )


def loftq(weight: Tensor, quantized: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor, float, float]:
    """Return A and B of LoftQ, and the relative error of the weight without and with them (arXiv 2310.08659).

    Given Q, scale B A is the nearest matrix of its rank to W - Q (eq. 6 with Q fixed). It is one round (T = 1) of
    algorithm 1: further rounds would quantize another matrix than W, and the base would no longer be the user's own as
    the recipe quantizes it, which the exported adapter is meant for.
    """
    weight, quantized = weight.float(), quantized.float()
    missing = weight - quantized
    # The vectors on the shorter side are enough, and far cheaper than those of both: U^T R holds the other ones.
    wide = missing.shape[0] <= missing.shape[1]
    short = (missing if wide else missing.T).double()
    squares, u = torch.linalg.eigh(short @ short.T)
    squares, u = squares.flip(0)[:rank].clamp(min=0.0), u.flip(1)[:, :rank]
    root = (squares.sqrt() / scale).sqrt()  # in both factors
    other = torch.where(root > 0, 1.0 / (root * scale), 0.0)[:, None] * (u.T @ short)
    a, b = (other, u * root) if wide else ((u * root).T, other.T)
    a, b = a.float(), b.float()
    size = float(weight.norm())
    return a, b, float(missing.norm()) / size, float((missing - scale * (b @ a)).norm()) / size
