"""Any method's update as one plain LoRA of one rank, which readers other than PEFT understand.

    dW = B A,  A (R, in), B (out, R):  the scale is in B, r = lora_alpha = R, patterns empty, no other key in use

vLLM scales every layer by the one lora_alpha / r (or / sqrt(r)) of adapter_config.json; llama.cpp by lora_alpha over
the rows of each A, and knows no rslora. Both read LoRA's A and B alone. With r = lora_alpha = the rows of every A they
compute W x + B A x, as PEFT does. Layers of a lower rank are padded with zeros, which changes no product.

An update with factors (`AdapterLinear.plain_factors`) of at most R is written as it is. A wider one, and one without
factors (DoRA scales whole rows of W), becomes its best approximation of rank R in the Frobenius norm: its R largest
singular values (Eckart and Young, 1936). What that loses is returned for each layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_cli.adapters._base import AdapterLinear, Method
from lora_cli.adapters._low_rank import LoraLinear
from lora_cli.adapters._targets import BASE_LINEARS
from lora_cli.errors import InputError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `max_lora_rank` may be; its default is 16, and an adapter's rank must not exceed it."""

UNKNOWN_RANK = 16
"""Rank for an update without factors whose method has no rank either: vLLM's default takes it."""

_NOISE = 2.0**-22
"""Size of a difference of two weights, relative to them, below which it is their float32 rounding: two last bits."""

_SETTLED, _MOST_STEPS = 1e-4, 100
"""The error at the end is above the least there is by about half of _SETTLED, relatively."""


class PlainLora(Method):
    """LoRA in the classic subset of its keys, all variants off; not for training."""

    peft_type = "LORA"

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def disk_config(self) -> dict[str, Any]:
        """Return PEFT's LoRA keys of one rank for all layers and a scale of 1."""
        return {
            "r": self.rank,
            "lora_alpha": self.rank,  # an integer, as vLLM declares it
            "lora_dropout": 0.0,
            "fan_in_fan_out": any(layer.fan_in_fan_out for layer in self.layers.values()),
            "bias": "none",
            "init_lora_weights": True,
            "use_dora": False,
            "use_rslora": False,
            "rank_pattern": {},
            "alpha_pattern": {},
            **dict.fromkeys(("layers_to_transform", "layers_pattern", "modules_to_save")),
        }


def require_expressible(method: Method, model: PreTrainedModel) -> None:
    """Refuse what a plain LoRA on linear layers cannot hold.

    Raises:
        InputError: no layer has an adapter, or something else is trained, or the adapter parts tied weights.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[no-untyped-call]
    biased = [path for path, layer in method.layers.items() if layer.bias is not None]
    strange = [path for path, layer in method.layers.items() if not isinstance(layer.base, BASE_LINEARS)]
    tied = [
        path
        for path, layer in method.layers.items()
        if layer is head and layer.base.weight is getattr(embedding, "weight", None)
    ]
    if not method.layers:
        found = "the method has no adapter"
    elif method.whole:
        found = f"{next(iter(method.whole))} is trained whole"
    elif biased:
        found = f"the bias of {biased[0]} is trained"
    elif strange:
        found = f"{strange[0]} has an adapter and is no linear layer"
    elif tied:
        found = f"{tied[0]} has an adapter and shares its weight with the embedding"
    else:
        return
    raise InputError(
        f"portable: {found}, which a plain LoRA of linear layers cannot say to vLLM and llama.cpp"
        " (write a merged model: export.formats: [merged], or lora-merge TARGET --output DIR)"
    )


@torch.no_grad()
def plain_lora(method: Method, rank: int | None = None) -> tuple[PlainLora, dict[str, float]]:
    """Return the method's update as one plain LoRA around the same bases, and each layer's relative error, by path.

    The error is that of the Frobenius norm; 0 where the factors are written as they are. `rank` is the largest that is
    written. None: that of the widest layer, twice the method's own where its update has no factors: as many directions
    again for what the method does to the base's weight.
    """
    widest = max(_width(layer, rank) for layer in method.layers.values())
    rank = max(
        1, min(widest, rank or widest)
    )  # 1: pruned to nothing everywhere, which no reader takes as rank 0
    written, errors = PlainLora(rank), {}
    written.disk_targets = method.disk_targets
    for path, layer in method.layers.items():
        factors = layer.plain_factors()
        if factors is None:
            a, b, errors[path] = _approximate(layer, rank)
        elif len(factors[0]) > rank:
            b, a, errors[path] = truncate(factors[1], factors[0], rank)
        else:
            (a, b), errors[path] = factors, 0.0
        plain = LoraLinear(layer.base, rank=rank, alpha=float(rank))
        plain.lora_A[: len(a)] = a
        plain.lora_B[:, : b.shape[1]] = b
        written.layers[path] = plain
    return written, errors


def expected_bytes(method: Method, rank: int | None = None) -> int:
    """Return how many bytes the factors of `plain_lora` take in a file, about: a rank may still grow in training."""
    widest = max(_width(layer, rank) for layer in method.layers.values())
    width = max(1, min(widest, rank or widest))
    return sum(4 * width * (layer.in_features + layer.out_features) for layer in method.layers.values())


def _width(layer: AdapterLinear, rank: int | None) -> int:
    """Return the rank that a layer's update has, or for one without factors the rank that it should be given."""
    limit = min(layer.in_features, layer.out_features)
    factors = layer.plain_factors()
    if factors is not None:
        return min(len(factors[0]), limit)
    own = 2 * len(layer.lora_A) if isinstance(layer, LoraLinear) else UNKNOWN_RANK
    return min(rank or own, limit)


def _approximate(layer: AdapterLinear, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return A (k, in) and B (out, k) float32 nearest to a layer's update, k <= rank, and the relative error."""
    base = layer.base_weight().float()
    update = layer.merged_weight() - base  # (out, in)
    whole = float(torch.linalg.vector_norm(update))
    if whole <= _NOISE * float(torch.linalg.vector_norm(base)):
        return update.new_zeros(0, update.shape[1]), update.new_zeros(len(update), 0), 0.0
    exact = update.double()
    basis = _leading_directions(exact, rank)
    b, a, _ = truncate(exact @ basis, basis.T, rank)
    return a, b, float(torch.linalg.vector_norm(update - b @ a)) / whole


def _leading_directions(matrix: Tensor, rank: int) -> Tensor:
    """Return an orthonormal basis (n, k) of the inputs that an (m, n) float64 matrix stretches most, k <= rank.

    By subspace iteration (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4) until a step adds less than
    _SETTLED of what is still missed; a whole SVD of a large layer takes minutes. The start is fixed, so that the same
    update gives the same adapter.
    """
    size = matrix.shape[1]
    start = torch.randn(size, min(size, 2 * rank + 8), generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(start.double().to(matrix.device)).Q
    whole, caught = float(matrix.square().sum()), 0.0
    for _ in range(_MOST_STEPS):
        image = matrix @ basis  # (m, q)
        _, values, v = torch.linalg.svd(image, full_matrices=False)
        before, caught = caught, float(values[:rank].square().sum())
        if caught - before <= _SETTLED * (whole - caught) + 1e-14 * whole:
            break
        basis = torch.linalg.qr(matrix.T @ image).Q
    else:
        _, _, v = torch.linalg.svd(matrix @ basis, full_matrices=False)
    return basis @ v[:rank].T


def truncate(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return the best approximation of b a, (out, R) (R, in), of at most `rank`, and its relative error.

    It is float32 factors (out, k), (k, in) that share the singular values evenly, k <= rank; the error is that of the
    Frobenius norm, and counts their rounding. All is computed in float64 on (R, R): the product is never formed.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, values, v = torch.linalg.svd(r_b @ r_a.T)
    root = values[:rank].sqrt()
    left = (q_b @ (u[:, : len(root)] * root)).float()
    right = ((root[:, None] * v[: len(root)]) @ q_a.T).float()
    lost = _norm(torch.cat([b, -left], dim=1), torch.cat([a, right]))
    whole = float(torch.linalg.vector_norm(values))
    return left, right, lost / whole if whole else 0.0


def _norm(b: Tensor, a: Tensor) -> float:
    """Return the Frobenius norm of b a."""
    r_b, r_a = (torch.linalg.qr(factor.double(), mode="r").R for factor in (b, a.T))
    return float(torch.linalg.matrix_norm(r_b @ r_a.T))
