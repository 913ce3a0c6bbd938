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

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_cli.adapters._base import AdapterLinear, BaseLinear
from lora_cli.adapters._fused import StretchedProduct, cast
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
        self._factors: tuple[object, tuple[Tensor, Tensor, Tensor, Tensor]] | None = None
        self.siblings: list[DoraLinear] = [self]
        """Layers whose norms are computed together: on a GPU each would wait for the device by itself."""
        self.lora_magnitude_vector = nn.Parameter(torch.zeros(self.out_features, device=self.device))

    def reset(self, seed: int) -> None:
        """Draw A, set B to zero, and take the lengths from the base: W' is W."""
        super().reset(seed)
        with torch.no_grad():
            self.lora_magnitude_vector.copy_(self.row_norm())

    def row_norm(self) -> Tensor:
        """Return ||W + s B A|| of each row, (out,) float32 without a gradient; computed once for each A and B."""
        if not self.norm_is_known():
            _compute_row_norms([layer for layer in self.siblings if not layer.norm_is_known()])
        assert self._norm is not None
        return self._norm[1]

    def norm_is_known(self) -> bool:
        """Say whether neither A, B nor the base has changed since the norm was computed."""
        if self._known[0] is not self.base:  # an export may put the layer around another base
            self.row_squares, self._known, self._norm = self._square_rows(), (self.base,), None
        return self._norm is not None and self._norm[0] == self._state()

    def set_norm(self, norm: Tensor) -> None:
        """Keep the norm of what A and B are now, (out,)."""
        self._norm = self._state(), norm

    def _state(self) -> object:
        a, b = self.lora_A, self.lora_B
        return id(a), a._version, id(b), b._version, a.device

    def adapt(self, x: Tensor) -> Tensor:
        """Return m / ||W + s B A|| (W x + s B A x) + bias: (..., in) -> (..., out)."""
        a, b, m, n = self.lora_A, self.lora_B, self.lora_magnitude_vector, self.row_norm()
        key = (self._state(), m._version, x.dtype)
        if self._factors is None or self._factors[0] != key:
            with torch.no_grad():
                q = m / n
                excess = (q - 1.0).to(x.dtype)
                self._factors = key, (*cast(a, b * (q * self.scale)[:, None], x.dtype), q, excess)
        y: Tensor = StretchedProduct.apply(
            x, self.dropped(x), a, b, m, n, self.scale, self._factors[1], self.base_weight, self.base.bias
        )
        return y

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

    def row_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield W in blocks of whole rows, float32."""
        weight = self.base_weight().detach()
        rows = max(1, _BLOCK // self.in_features)
        for first in range(0, self.out_features, rows):
            yield slice(first, first + rows), weight[first : first + rows].float()

    @torch.no_grad()
    def _square_rows(self) -> Tensor:
        return torch.cat([block.square().sum(dim=1) for _, block in self.row_blocks()])

    def compute_outright(self, squared: Tensor, chosen: Tensor) -> None:
        """Overwrite the squared norms (out,) of the `chosen` rows by those of the rows themselves."""
        if bool(chosen.any()):
            a, b = self.lora_A.float(), self.lora_B.float()
            for rows, block in self.row_blocks():
                here = chosen[rows]
                exact = block[here] + self.scale * (b[rows][here] @ a)
                squared[rows][here] = exact.square().sum(dim=1)


@torch.no_grad()
def _compute_row_norms(layers: Sequence[DoraLinear]) -> None:
    """Compute the norms of layers, those of one shape together."""
    groups = defaultdict(list)
    for layer in layers:
        groups[(*layer.lora_A.shape, layer.out_features, layer.scale, layer.lora_A.device)].append(layer)
    squares, doubtful = [], []
    for (*_, s, _), group in groups.items():
        a = torch.stack([layer.lora_A.float() for layer in group])  # (L, r, in)
        b = torch.stack([layer.lora_B.float() for layer in group])  # (L, out, r)
        terms = torch.stack(
            [
                torch.cat([block @ layer.lora_A.float().T for _, block in layer.row_blocks()])
                for layer in group
            ]
        )  # (L, out, r)
        terms.baddbmm_(b, a @ a.mT, beta=2 * s, alpha=s**2)
        base = torch.stack([layer.row_squares for layer in group])
        squares.append(torch.linalg.vecdot(terms, b).add_(base))  # (L, out)
        doubtful.append(squares[-1] < base * _CANCELLED)
    any_doubtful = bool(torch.stack([one.any().to(doubtful[0].device) for one in doubtful]).any())
    for group, squared, cancelled in zip(groups.values(), squares, doubtful, strict=True):
        if any_doubtful:
            for layer, own, rows in zip(group, squared, cancelled, strict=True):
                layer.compute_outright(own, rows)
        for layer, norm in zip(group, squared.clamp_(min=_SMALLEST**2).sqrt_(), strict=True):
            layer.set_norm(norm)


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
        self.siblings: list[DoraLinear] = []

    def make_layer(self, path: str, base: BaseLinear) -> AdapterLinear:
        """Return a DoraLinear whose A is a function of seed and path, and LoRA's."""
        layer = DoraLinear(base, rank=self.rank, alpha=self.alpha, dropout=self.dropout)
        self.siblings.append(layer)
        layer.siblings = self.siblings
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
