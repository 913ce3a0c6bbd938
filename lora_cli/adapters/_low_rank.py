"""The layers of LoRA: a low-rank update beside a frozen linear layer, and one that starts elsewhere than at zero.

A and B are float32 and are multiplied in the input's dtype: bf16 steps would round small updates away, bf16 products
lose nothing that the base's own do not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lora_cli.adapters._base import AdapterLinear, BaseLinear
from lora_cli.adapters._fused import Cast, cast


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """Return what B A is multiplied by; rslora: arXiv 2312.03732, theorem 3.2."""
    return alpha / (math.sqrt(rank) if rslora else rank)


class LoraLinear(AdapterLinear):
    """A linear layer with a rank-r update: (..., in) -> (..., out)."""

    def __init__(
        self, base: BaseLinear, *, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False
    ) -> None:
        super().__init__(base)
        self.scale = scale_of(alpha, rank, rslora)
        self.dropout = dropout
        self.lora_A = nn.Parameter(torch.zeros(rank, self.in_features, device=self.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=self.device))
        self._cast = Cast()

    def reset(self, seed: int) -> None:
        """Draw A from U(-1/sqrt(in), 1/sqrt(in)) and set B to zero; equal on every device for equal `seed`."""
        generator = torch.Generator().manual_seed(seed)
        initial = torch.empty(self.lora_A.shape)
        nn.init.kaiming_uniform_(initial, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            self.lora_A.copy_(initial)
            self.lora_B.zero_()

    @torch.no_grad()
    def start_from(self, a: Tensor, b: Tensor) -> None:
        """Set A (r, in) and B (out, r)."""
        self.lora_A.copy_(a)
        self.lora_B.copy_(b)

    def adapt(self, x: Tensor) -> Tensor:
        """Return W x + scale B A x + bias: (..., in) -> (..., out)."""
        factors = self._cast.of(self.lora_A, self.lora_B, self.scale, x.dtype)
        return self.product(x, self.lora_A, self.lora_B, self.scale, factors)

    def merged_weight(self) -> Tensor:
        """Return W + scale B A, (out, in) float32."""
        return self.base_weight().float() + self.scale * (self.lora_B.float() @ self.lora_A.float())

    def disk_tensors(self) -> dict[str, Tensor]:
        """Return A (r, in) and B (out, r) by PEFT's names."""
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}

    def plain_factors(self) -> tuple[Tensor, Tensor] | None:
        """Return A (r, in) and B (out, r) float32 whose product B A is the whole update, the scale in B."""
        return self.lora_A.detach(), self.lora_B.detach() * self.scale


class ShiftedLoraLinear(LoraLinear):
    """A LoRA layer that starts at B0 A0 other than zero and leaves the base as it is: (..., in) -> (..., out).

        h = W x + scale (B A - B0 A0) x

    PiSSA and OLoRA store W - scale B0 A0 as a new base, which is not the original and is rounded to its dtype. Here the
    original stays, and the difference is taken as (B - B0) A + B0 (A - A0), in float32 before anything is rounded: it
    is exactly zero at the start, and a small one stays precise in bfloat16. It costs A0 and B0 in memory and products
    of rank 2 r, and stands on disk as a plain LoRA of rank 2 r. Dropout acts on the difference alone.

    With `frozen_a`, A is A0 for good: the difference is (B - B0) A, of rank r, and A0 is not kept a second time.
    """

    frozen_a = False
    initial_A: Tensor
    initial_B: Tensor

    def start_from(self, a: Tensor, b: Tensor) -> None:
        """Set A (r, in) and B (out, r), and keep them as A0 and B0."""
        super().start_from(a, b)
        if not self.frozen_a:
            self.register_buffer("initial_A", self.lora_A.detach().clone())
        self.register_buffer("initial_B", self.lora_B.detach().clone())

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (2r, in) and (out, 2r), float32, whose product is B A - B0 A0; with A frozen (r, in) and (out, r)."""
        if self.frozen_a:
            return self.lora_A, self.lora_B - self.initial_B
        a = torch.cat([self.lora_A, self.lora_A - self.initial_A])
        return a, torch.cat([self.lora_B - self.initial_B, self.initial_B], dim=1)

    def adapt(self, x: Tensor) -> Tensor:
        """Return W x, the scaled difference of x and the bias: (..., in) -> (..., out)."""
        a, b = self.factors()
        return self.product(x, a, b, self.scale, cast(a, b * self.scale, x.dtype))

    def merged_weight(self) -> Tensor:
        """Return W + scale (B A - B0 A0), (out, in) float32."""
        first = self.lora_A if self.frozen_a else self.initial_A
        shift = self.lora_B @ self.lora_A - self.initial_B @ first
        return self.base_weight().float() + self.scale * shift

    def disk_tensors(self) -> dict[str, Tensor]:
        """Return a plain LoRA of twice the rank on the original base; of the rank itself where A is frozen."""
        a, b = self.factors()
        return {"lora_A.weight": a, "lora_B.weight": b}

    def plain_factors(self) -> tuple[Tensor, Tensor]:
        """Return the difference's factors, float32, the scale in the second."""
        a, b = self.factors()
        return a.detach(), b.detach() * self.scale
