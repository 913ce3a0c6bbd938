"""DoRA: LoRA on the direction of each weight row, and a trained length of each row (arXiv 2402.09353).

    W' = m (W + s B A) / ||W + s B A||          section 4.1, eq. 5; s = alpha / r

The authors write W as (in, out) and take the norm of each column; here W is (out, in) and the norm is of each row, so
that m is (out,). The norm is a constant to the gradient (section 4.3). It costs one product with A an optimizer step:

    ||W + s B A||^2 = ||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>          by row

Where an update nearly cancels its row, these terms lose their digits in the sum, and the row is computed outright.

A bias stays outside the scaling, so that merged weights compute what the layer did. One departure from the authors'
code and PEFT's: dropout acts on the low-rank path alone, not on the input that the trained length scales as well. So
the length sees what the base computed, and no second product with W is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_cli.adapters._base import AdapterLinear, BaseLinear
from lora_cli.adapters._low_rank import LoraLinear
from lora_cli.adapters.lora import Lora
from lora_cli.seeding import stream_seed

_BLOCK = 2**20
"""Elements of W that are float32 at a time while norms are taken: 4 MB, never the whole matrix."""

_CANCELLED = 0.1
"""Share of ||W||^2 below which ||W + s B A||^2 is computed outright: the sum has lost one of its seven digits."""

_SMALLEST = 1e-12
"""Norm of a row of zeros, which a base may have."""


class DoraLinear(LoraLinear):
    """A linear layer whose rows have a trained length and a direction with a rank-r update: (..., in) -> (..., out)."""

    row_squares: Tensor

    def __init__(self, base: BaseLinear, *, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__(base, rank=rank, alpha=alpha, dropout=dropout)
        self.register_buffer("row_squares", self._square_rows(), persistent=False)  # (out,)
        self._known = (base,)  # whose ||W||^2 by row they are; in a tuple so that it is not registered
        self._norm: tuple[object, Tensor] | None = None
        self.lora_magnitude_vector = nn.Parameter(torch.zeros(self.out_features, device=self.device))

    def reset(self, seed: int) -> None:
        """Draw A, set B to zero, and take the lengths from the base: W' is W."""
        super().reset(seed)
        with torch.no_grad():
            self.lora_magnitude_vector.copy_(self.row_norm())

    def row_norm(self) -> Tensor:
        """Return ||W + s B A|| of each row, (out,) float32 without a gradient; computed once for each A and B."""
        a, b = self.lora_A, self.lora_B
        if self._known[0] is not self.base:  # an export may put the layer around another base
            self.row_squares, self._known, self._norm = self._square_rows(), (self.base,), None
        key = (id(a), a._version, id(b), b._version, a.device)
        if self._norm is None or self._norm[0] != key:
            self._norm = key, self._compute_row_norm(a.detach().float(), b.detach().float())
        return self._norm[1]

    def adapt(self, x: Tensor, y: Tensor) -> Tensor:
        """Return m / ||W + s B A|| (W x + s B A x) + bias: (..., in), (..., out) -> (..., out)."""
        # At injection m is the norm, bit for bit, so this is exactly zero and y is returned as it came.
        excess = self.lora_magnitude_vector / self.row_norm() - 1.0
        h = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))  # (..., r)
        adapted: Tensor = _Stretch.apply(y, h * self.scale, self.lora_B, excess, self.base.bias)
        return adapted

    def merged_weight(self) -> Tensor:
        """Return W', (out, in) float32, from the norm of the whole matrix."""
        weight = super().merged_weight()
        norm = torch.linalg.vector_norm(weight, dim=1).clamp(min=_SMALLEST)
        return weight * (self.lora_magnitude_vector.float() / norm)[:, None]

    def disk_tensors(self) -> dict[str, Tensor]:
        """Return A, B and m (out,) by PEFT's names; that of m ends without `.weight`."""
        return super().disk_tensors() | {"lora_magnitude_vector": self.lora_magnitude_vector}

    def plain_factors(self) -> None:
        """Return nothing: the lengths act on the base's weight too, so the update has no low rank."""

    def bounded_factors(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) of m / ||W + s B A|| s B A; the rest of the update is a part of each row."""
        length = (self.lora_magnitude_vector / self.row_norm()).detach()[:, None]
        return self.lora_A.detach(), self.lora_B.detach() * (self.scale * length)

    def _row_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield W in blocks of whole rows, float32."""
        weight = self.base_weight().detach()
        rows = max(1, _BLOCK // self.in_features)
        for first in range(0, self.out_features, rows):
            yield slice(first, first + rows), weight[first : first + rows].float()

    @torch.no_grad()
    def _square_rows(self) -> Tensor:
        return torch.cat([block.square().sum(dim=1) for _, block in self._row_blocks()])

    @torch.no_grad()
    def _compute_row_norm(self, a: Tensor, b: Tensor) -> Tensor:
        crossed = torch.cat([block @ a.T for _, block in self._row_blocks()])  # (out, r)
        terms = torch.addmm(crossed, b, a @ a.T, beta=2 * self.scale, alpha=self.scale**2)
        squared = self.row_squares + (terms * b).sum(dim=1)
        cancelled = squared < _CANCELLED * self.row_squares
        if bool(cancelled.any()):
            for rows, block in self._row_blocks():
                here = cancelled[rows]
                exact = block[here] + self.scale * (b[rows][here] @ a)
                squared[rows][here] = exact.square().sum(dim=1)
        return squared.clamp(min=_SMALLEST**2).sqrt()


class _Stretch(torch.autograd.Function):
    """y + e (y - bias) + (1 + e) B h: (..., out), (..., r), (out, r), (out,), (out,) -> (..., out).

    By hand, as the plain expression makes seven passes over (..., out), and this three: what scales the update, forward
    and backward, is multiplied into B.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, b: Tensor, excess: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(y, h, b, excess, bias)
        out = torch.addcmul(y, y if bias is None else y - bias, excess.to(y.dtype))
        scaled = (b * (1.0 + excess)[:, None]).to(y.dtype)
        out.view(-1, len(b)).addmm_(h.reshape(-1, b.shape[1]), scaled.T)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, h, b, excess, bias = ctx.saved_tensors
        factor, flat = (1.0 + excess)[:, None], grad.reshape(-1, len(b))
        of_y = torch.addcmul(grad, grad, excess.to(grad.dtype)) if ctx.needs_input_grad[0] else None
        of_h = (flat @ (b * factor).to(grad.dtype)).view_as(h) if ctx.needs_input_grad[1] else None
        outer = (flat.T @ h.reshape(-1, b.shape[1])).float()  # (out, r)
        # Sums over the tokens are float32: there may be thousands. The update's part of the sum is already in `outer`.
        of_excess = (flat * y.reshape(flat.shape)).sum(dim=0, dtype=torch.float32) + (outer * b).sum(dim=1)
        of_bias = None
        if bias is not None:
            total = flat.sum(dim=0, dtype=torch.float32)
            of_excess -= bias.float() * total
            of_bias = (-excess * total).to(bias.dtype)
        return of_y, of_h, outer * factor, of_excess, of_bias


class Dora(Lora):
    """DoRA on the layers that `targets` names."""

    # Of LoRA's variants none: what is not named here must be off in a file that is read.
    disk_keys = frozenset(
        {"r", "lora_alpha", "lora_dropout", "target_modules", "init_lora_weights", "use_dora"}
    )
    adapts_embeddings = False

    start_keys: ClassVar[Mapping[str, str]] = {"rank": "value", "alpha": "value", "targets": "modules"}

    def __init__(
        self,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        targets: str | list[str] = "all-linear",
        seed: int = 0,
    ) -> None:
        super().__init__(rank=rank, alpha=alpha, dropout=dropout, targets=targets, seed=seed)

    def make_layer(self, path: str, base: BaseLinear) -> AdapterLinear:
        """Return a DoraLinear whose A is a function of seed and path, and LoRA's."""
        layer = DoraLinear(base, rank=self.rank, alpha=self.alpha, dropout=self.dropout)
        layer.reset(stream_seed(self.seed, "adapter", path))
        return layer

    def disk_config(self) -> dict[str, Any]:
        """Return PEFT's LoRA keys with DoRA on."""
        return super().disk_config() | {"use_dora": True}

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Say whether an adapter_config.json is LoRA's with DoRA on."""
        return config.get("peft_type") == cls.peft_type and config.get("use_dora") is True


METHOD = Dora
