"""The wrapped linear layer: a frozen base with an update beside it, which can be merged into it and taken out again.

    before                      after
    q_proj: nn.Linear           q_proj: AdapterLinear
                                  .base: nn.Linear, frozen
                                  .lora_A, .lora_B, ...: float32, trained

Shapes: `in`, `out` are the layer's features; weights are (out, in) whatever the base stores (GPT-2's Conv1D and an
embedding store (in, out), a QuantizedLinear packed codes).
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters._fused import LowRankProduct
from lora_cli.adapters._targets import BaseLinear
from lora_cli.models.nf4 import QuantizedLinear


class AdapterLinear(nn.Module, ABC):
    """A frozen linear layer with an update beside it: (..., in) -> (..., out)."""

    def __init__(self, base: BaseLinear | nn.Embedding) -> None:
        super().__init__()
        self.base: BaseLinear = cast(BaseLinear, base)  # an embedding is a linear layer of unit vectors
        self.enabled = True
        """False: the layer computes exactly what the base does."""
        self.dropout = 0.0
        """Part of the update's input that is left out in training."""
        self.bias: nn.Parameter | None = None
        """Trained in place of the base's own where `train_bias` was called, (out,) float32."""
        self._unmerged: tuple[nn.Parameter | QuantizedLinear] | None = None
        """While merged: the old weight, or the quantized base, in a tuple so that it is not registered."""
        self._unmerged_bias: Tensor | None = None
        self.device = next(itertools.chain(base.parameters(), base.buffers())).device
        """Where the base is, and what a method adds to it must be."""
        self.fan_in_fan_out = isinstance(base, Conv1D) or (isinstance(base, QuantizedLinear) and base.conv1d)
        """PEFT's name for a linear base whose weight is stored (in, out) on disk."""
        if isinstance(base, QuantizedLinear):
            self.in_features, self.out_features = base.in_features, base.out_features
        else:
            sizes = base.weight.shape if self.transposed else base.weight.shape[::-1]
            self.in_features, self.out_features = sizes

    @property
    def transposed(self) -> bool:
        """True: the base's `weight` is (in, out). A layer may be moved from a quantized base to a dense one."""
        return isinstance(self.base, Conv1D | nn.Embedding)

    @property
    def merged(self) -> bool:
        """True while the update stands in the base weight."""
        return self._unmerged is not None

    def forward(self, x: Tensor) -> Tensor:
        """Apply base and update: (..., in) -> (..., out)."""
        y: Tensor
        if not self.enabled or self.merged:
            y = self.base(x)
            return y
        y = self.adapt(x)
        if self.bias is not None and self.base.bias is not None:
            y = y + (self.bias - self.base.bias.float()).to(y.dtype)
        return y

    def train_bias(self) -> bool:
        """Train a copy of the base's bias, and return whether it has one."""
        if self.base.bias is not None:
            self.bias = nn.Parameter(self.base.bias.detach().float().clone())
        return self.bias is not None

    @abstractmethod
    def adapt(self, x: Tensor) -> Tensor:
        """Return what base and update make of an input: (..., in) -> (..., out)."""

    def product(
        self,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scale: float,
        factors: tuple[Tensor, Tensor],
        frozen: Sequence[Sequence[Tensor]] = (),
    ) -> Tensor:
        """Return W x + scale B A x + bias and `frozen` updates of x, see `LowRankProduct`: (..., in) -> (..., out)."""
        bias = self.base.bias
        y: Tensor = LowRankProduct.apply(
            x, self.dropped(x), a, b, scale, factors, self.base_weight, bias, frozen
        )
        return y

    def dropped(self, x: Tensor) -> Tensor | None:
        """Return x after dropout; None where there is none."""
        return F.dropout(x, self.dropout) if self.dropout and self.training else None

    @abstractmethod
    def merged_weight(self) -> Tensor:
        """Return base weight and update as one matrix, (out, in) float32; stated apart from `adapt` on purpose."""

    @abstractmethod
    def disk_tensors(self) -> dict[str, Tensor]:
        """Return the trained tensors by their PEFT names, relative to the layer."""

    def plain_factors(self) -> tuple[Tensor, Tensor] | None:
        """Return A (R, in) and B (out, R) float32 whose product B A is the whole update of the weight, its scale in B.

        None where the update is no product of known factors; then it is `merged_weight` less `base_weight`.
        """
        return None

    def bounded_factors(self) -> tuple[Tensor, Tensor] | None:
        """Return A (R, in) and B (out, R) float32 of the part of the update that the rank bounds: mostly all of it."""
        return self.plain_factors()

    def base_weight(self) -> Tensor:
        """Return the base's own weight as (out, in), in the base's dtype, without an update merged into it.

        Of a quantized base it is the dequantized weight, made anew at each call.
        """
        (kept,) = self._unmerged or (self.base,)
        if isinstance(kept, QuantizedLinear):
            return kept.dequantized()
        weight = kept if isinstance(kept, nn.Parameter) else kept.weight
        return weight.T if self.transposed else weight

    @torch.no_grad()
    def merge(self) -> None:
        """Put the update into the base weight, rounded once to its dtype; the old weight is kept for `unmerge`.

        A weight that the base shares with another module, as an embedding with a tied head, is parted from it. A
        quantized base is replaced by a dense layer: quantized again, the weight would lose most of a small update.
        """
        assert not self.merged
        weight = self.merged_weight()
        if isinstance(self.base, QuantizedLinear):
            self._unmerged, self.base = (self.base,), self.base.dense(weight)
            if self.bias is not None:
                # Not copied into the dense layer's bias, which is the quantized one's own.
                bias = self.bias.detach().to(self.base.weight.dtype)
                self.base.bias = nn.Parameter(bias, requires_grad=False)
            return
        self._unmerged = (cast(nn.Parameter, self.base.weight),)
        if self.bias is not None:
            self._unmerged_bias = self.base.bias.detach().clone()
            self.base.bias.copy_(self.bias)
        stored = (weight.T if self.transposed else weight).to(self.base.weight.dtype)
        self.base.weight = nn.Parameter(stored.contiguous(), requires_grad=False)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base weight bit for bit."""
        assert self._unmerged is not None
        (kept,) = self._unmerged
        if isinstance(kept, QuantizedLinear):
            self.base = kept
        else:
            self.base.weight = kept
            if self._unmerged_bias is not None and self.base.bias is not None:
                self.base.bias.copy_(self._unmerged_bias)
        self._unmerged, self._unmerged_bias = None, None
