"""The layer of ReLoRA: a live low-rank update, what was merged before it, and the full-rank update of a warm start."""

from __future__ import annotations

from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_cli.adapters._base import BaseLinear
from lora_cli.adapters._fused import cast, laid_out
from lora_cli.adapters._low_rank import LoraLinear


class ReloraLinear(LoraLinear):
    """A linear layer with a live rank-r update and the sum of those merged before: (..., in) -> (..., out)."""

    past_A: Tensor  # (R, in) float32, R = 0 before the first restart
    past_B: Tensor  # (out, R) float32, with the scale in it
    past_delta: (
        Tensor | None
    )  # (out, in) float32: the past as one matrix, in place of factors that would be wider
    delta: nn.Parameter | None  # (out, in) float32: trained in the warm start, in place of A and B

    def __init__(self, base: BaseLinear, *, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__(base, rank=rank, alpha=alpha, dropout=dropout)
        self.register_parameter("delta", None)
        self.register_buffer("past_delta", None, persistent=False)
        self._forget_factors()
        self._merged: list[object] = []  # what `_chains` was made of
        self._chains: list[tuple[Tensor, ...]] = []
        self._live: tuple[Tensor, Tensor] | None = None
        """What `_wide` has before the past."""
        self._wide: tuple[Tensor, Tensor] | None = None

    def adapt(self, x: Tensor) -> Tensor:
        """Return W x, what was merged, without dropout, the live update and the bias: (..., in) -> (..., out)."""
        if self.delta is not None:
            y: Tensor = self.base(x)
            return y + F.linear(x, self.delta.to(x.dtype))
        factors = self._cast.of(self.lora_A, self.lora_B, self.scale, x.dtype)
        chains = self._past_chains(x.dtype)
        if len(self.past_A) and not (self.dropout and self.training):
            # A product of twice the rank takes hardly longer than one; what was merged has no dropout, though.
            *chains, past = chains
            factors = self._beside(factors, past)
        return self.product(x, self.lora_A, self.lora_B, self.scale, factors, chains)

    def merged_weight(self) -> Tensor:
        """Return W + P + scale B A, (out, in) float32; in the warm start W and the update that is trained."""
        weight = super().merged_weight() + self.past_B @ self.past_A
        for dense in (self.past_delta, self.delta):
            weight = weight if dense is None else weight + dense
        return weight

    def disk_tensors(self) -> dict[str, Tensor]:
        """Fail: A and B without what was merged before are not the update; see `Relora.as_peft`."""
        raise AssertionError("ReLoRA has no disk format of its own")

    def warm_start(self) -> None:
        """Train a full-rank update from zero, in place of A and B."""
        if self.delta is None:
            self.delta = nn.Parameter(torch.zeros(self.out_features, self.in_features, device=self.device))
        self._train_factors(False)

    def end_warm_start(self) -> None:
        """Make the full-rank update the past, and train A and B; what the layer computes stays the same."""
        if self.delta is not None:
            self.past_delta, self.delta = self.delta.detach(), None
        self._train_factors(True)

    @torch.no_grad()
    def restart(self, seed: int) -> None:
        """Merge the live update into the past one and draw a new A; what the layer computes stays the same."""
        a, b = self._all_factors()
        if self.past_delta is not None:
            self.past_delta = torch.addmm(self.past_delta, b, a)
        elif len(a) > min(self.in_features, self.out_features):
            self.past_delta = b @ a
        else:
            self.past_A, self.past_B = a, b
        if self.past_delta is not None:
            self._forget_factors()
        self.reset(seed)

    @torch.no_grad()
    def plain_factors(self) -> tuple[Tensor, Tensor]:
        """Return the whole update, past and live, as A (R, in) and B (out, R); a live one of zero is left out.

        A matrix is one factor, beside the identity of its narrower side: R is up to that and the live rank.
        """
        dense = self.past_delta if self.delta is None else self.delta.detach()
        live = bool(self.lora_B.any())
        if dense is None:
            return self._all_factors() if live or not len(self.past_A) else (self.past_A, self.past_B)
        unit = torch.eye(min(dense.shape), device=dense.device)
        a, b = (unit, dense) if self.out_features > self.in_features else (dense, unit)
        if not live:
            return a, b
        return torch.cat([a, self.lora_A]), torch.cat([b, self.scale * self.lora_B], dim=1)

    def past(self) -> dict[str, Tensor]:
        """Return what was merged, by name: a matrix or factors, whichever there is."""
        if self.past_delta is not None:
            return {"past_delta": self.past_delta}
        return {"past_A": self.past_A, "past_B": self.past_B} if len(self.past_A) else {}

    def set_past(self, past: dict[str, Tensor]) -> None:
        """Take what `past` returned as what was merged."""
        self._forget_factors()
        self.past_delta = None
        for name, value in past.items():
            # A copy: a checkpoint's tensors are pages of its file, which lives shorter than the run.
            setattr(self, name, value.to(self.device, copy=True))

    def _past_chains(self, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
        """Return what was merged as `LowRankProduct` takes it; a restart makes new tensors, and so a new cast."""
        merged: list[object] = [self.past_delta, self.past_A, self.past_B, dtype]
        if any(was is not now for was, now in zip_longest(self._merged, merged)):
            self._merged, self._chains, self._live = merged, [], None
            if self.past_delta is not None:
                self._chains.append((laid_out(self.past_delta.T, dtype),))
            if len(self.past_A):
                self._chains.append(cast(self.past_A, self.past_B, dtype))
        return self._chains

    @torch.no_grad()
    def _beside(self, live: tuple[Tensor, Tensor], past: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return the live factors with those of the past behind them: (in, r + R), (r + R, out)."""
        if self._wide is None or self._live is not live:
            self._live = live
            self._wide = torch.cat([live[0], past[0]], dim=1), torch.cat([live[1], past[1]])
        return self._wide

    def _all_factors(self) -> tuple[Tensor, Tensor]:
        return (
            torch.cat([self.past_A, self.lora_A.detach()]),
            torch.cat([self.past_B, self.scale * self.lora_B.detach()], dim=1),
        )

    def _forget_factors(self) -> None:
        self.register_buffer("past_A", self.lora_A.new_empty(0, self.in_features), persistent=False)
        self.register_buffer("past_B", self.lora_B.new_empty(self.out_features, 0), persistent=False)

    def _train_factors(self, trained: bool) -> None:
        self.lora_A.requires_grad_(trained)
        self.lora_B.requires_grad_(trained)
