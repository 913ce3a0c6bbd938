"""A frozen product and a low-rank update as one autograd function: of LoRA and its kin, of DoRA, of VeRA.

    y = x W^T + bias + x A^T (s B)^T          (..., in) -> (..., out)

By plain operations the update is a second (..., out) that is then added, and its gradient a second (..., in) that is
added again; here both products add to what is there. Kept for the backward pass are x, which layers with the same input
share, and x A^T where that is small beside x. The backward pass asks for W once more, so that a quantized base is
dequantized again rather than kept.

A and B are float32. What they are multiplied as, `Cast`, is made once for each of their values, in the layout that the
products read fastest: on a CPU, A^T and B^T of 16 columns in rows take half the time of their transposes in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_KEPT = 0.125
"""x A^T is computed again in the backward pass where it would take more than this part of x."""


class Cast:
    """A^T (in, r) and s B^T (r, out) in the dtype of the products, made anew when A or B has changed."""

    def __init__(self) -> None:
        self._key: object = None
        self._made: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def of(self, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the two of A (r, in) and B (out, r)."""
        key = (id(a), a._version, id(b), b._version, scale, dtype, a.device)
        if self._made is None or key != self._key:
            self._key, self._made = key, cast(a, b * scale, dtype)
        return self._made


@torch.no_grad()
def cast(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return A^T (in, r) and B^T (r, out) of A (r, in) and B (out, r), in rows."""
    return laid_out(a.T, dtype), laid_out(b.T, dtype)


def laid_out(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a matrix in `dtype`, its rows one after another in memory."""
    return torch.empty(matrix.shape, dtype=dtype, device=matrix.device).copy_(matrix)


class LowRankProduct(torch.autograd.Function):
    """x W^T + bias + scale d A^T B^T + x P, with d = x, or x after dropout: (..., in) -> (..., out).

    `weight` returns W (out, in), which is frozen as the bias is. `factors` are what A (r, in) and B (out, r) are
    multiplied as, the scale in the second; where they are wider, what follows the r of A and B is frozen too. P are
    `frozen` updates, each a chain of matrices that leads from in to out.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        factors: tuple[Tensor, Tensor],
        weight: Callable[[], Tensor],
        bias: Tensor | None,
        frozen: Sequence[Sequence[Tensor]] = (),
    ) -> Tensor:
        down, up = factors
        y = F.linear(x, weight(), bias)
        rows = _rows(x if dropped is None else dropped)
        h = rows @ down  # (T, r)
        out = _rows(y).addmm_(h, up)
        for chain in frozen:
            out.addmm_(_through(_rows(x), chain[:-1]), chain[-1])
        ctx.save_for_backward(*_kept(rows, h, a), down, up)
        ctx.weight, ctx.scale, ctx.frozen, ctx.shape, ctx.rank = weight, scale, frozen, x.shape, a.shape[0]
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, h, down, up = ctx.saved_tensors
        flat = _rows(grad)
        of_h = flat @ up.T  # (T, r)
        of_x, of_dropped = _of_inputs(ctx, flat, of_h, down)
        if of_x is not None:
            for chain in ctx.frozen:
                back = [matrix.T for matrix in reversed(chain)]
                _rows(of_x).addmm_(_through(flat, back[:-1]), back[-1])
        of_h, down = of_h[:, : ctx.rank], down[:, : ctx.rank]
        h = None if h is None else h[:, : ctx.rank]
        of_a = (rows.T @ of_h).T.float() if ctx.needs_input_grad[2] else None
        of_b = _of_update(rows, h, down, flat).mul_(ctx.scale) if ctx.needs_input_grad[3] else None
        return of_x, of_dropped, of_a, of_b, *[None] * 5


class StretchedProduct(torch.autograd.Function):
    """q (x W^T + scale d A^T B^T) + bias with q = m / n, n constant: (..., in) -> (..., out).

    m, n and q are (out,); `factors` are what A and B are multiplied as, scale and q in the second, then q and q - 1 in
    the dtype of the products. Where m is n bit for bit, x W^T + bias comes back as it is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        a: Tensor,
        b: Tensor,
        m: Tensor,
        n: Tensor,
        scale: float,
        factors: tuple[Tensor, Tensor, Tensor, Tensor],
        weight: Callable[[], Tensor],
        bias: Tensor | None,
    ) -> Tensor:
        down, up, _, excess = factors
        y = F.linear(x, weight(), bias)
        rows = _rows(x if dropped is None else dropped)
        h = rows @ down  # (T, r)
        out = torch.addcmul(y, y if bias is None else y - bias, excess)
        _rows(out).addmm_(h, up)
        ctx.save_for_backward(*_kept(rows, h, a), y, b, n, *factors, bias)
        ctx.weight, ctx.scale, ctx.shape = weight, scale, x.shape
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, h, y, b, n, down, up, q, excess, bias = ctx.saved_tensors
        flat = _rows(grad)
        of_h = flat @ up.T  # (T, r)
        of_x, of_dropped = _of_inputs(ctx, flat, of_h, down, excess)
        of_a = (rows.T @ of_h).T.float() if ctx.needs_input_grad[2] else None
        of_update = _of_update(rows, h, down, flat).mul_(ctx.scale)
        # The sum is float32 inside, and is rounded once, as the products are. y is nobody else's, and needed no more.
        of_q = _rows(y).mul_(flat).sum(dim=0).float().add_(torch.linalg.vecdot(of_update, b))
        if bias is not None:
            of_q -= bias.float() * flat.sum(dim=0)
        return of_x, of_dropped, of_a, of_update.mul_(q[:, None]), of_q.div_(n), *[None] * 5


class ScaledProduct(torch.autograd.Function):
    """x W^T + bias + ((d A^T) u B^T) v, with A (r, in) and B (out, r) frozen: (..., in) -> (..., out).

    u (r,) and v (out,) are multiplied into B, which is smaller than what it is multiplied with, and that again in the
    backward pass: kept for every layer it would be as large as the base. `down` is A^T.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        u: Tensor,
        v: Tensor,
        down: Tensor,
        b: Tensor,
        weight: Callable[[], Tensor],
        bias: Tensor | None,
    ) -> Tensor:
        y = F.linear(x, weight(), bias)
        rows = _rows(x if dropped is None else dropped)
        h = rows @ down  # (T, r)
        _rows(y).addmm_(h, _scaled(b, u, v, x.dtype))
        smaller = (None, h) if h.shape[1] < rows.shape[1] else (rows, None)
        ctx.save_for_backward(*smaller, u, v, down, b)
        ctx.weight, ctx.shape = weight, x.shape
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, h, u, v, down, b = ctx.saved_tensors
        flat = _rows(grad)
        of_x = of_dropped = None
        if any(ctx.needs_input_grad[:2]):
            of_h = flat @ _scaled(b, u, v, grad.dtype).T  # (T, r)
            of_x, of_dropped = _of_inputs(ctx, flat, of_h, down)
        of_both = _of_update(rows, h, down, flat).mul_(b)  # (out, r)
        return of_x, of_dropped, v @ of_both, of_both @ u, *[None] * 4


def _scaled(b: Tensor, u: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (v B u)^T, (r, out)."""
    return laid_out((b * v[:, None]).mul_(u).T, dtype)


def _of_inputs(
    ctx: Any, flat: Tensor, of_h: Tensor, down: Tensor, excess: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of x and of what dropout made of it, from those of the output (T, out) and of h (T, r).

    The product's part of the output is x W^T, or (1 + excess) x W^T with `excess` (out,).
    """
    of_x = None
    if ctx.needs_input_grad[0]:
        weight = ctx.weight()
        if excess is not None and len(flat) > weight.shape[1]:  # the smaller of the two is scaled
            weight = torch.addcmul(weight, weight, excess[:, None])
        elif excess is not None:
            flat = torch.addcmul(flat, flat, excess)
        of_x = flat @ weight
    if ctx.needs_input_grad[1]:
        return None if of_x is None else of_x.view(ctx.shape), (of_h @ down.T).view(ctx.shape)
    return None if of_x is None else of_x.addmm_(of_h, down.T).view(ctx.shape), None


def _of_update(rows: Tensor | None, h: Tensor | None, down: Tensor, flat: Tensor) -> Tensor:
    """Return the gradient of a matrix that h (T, r) is multiplied with, (out, r) float32, from that of the output."""
    if h is None:
        assert rows is not None
        h = rows @ down
    return (h.T @ flat).T.float()


def _kept(rows: Tensor, h: Tensor, a: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return what of x (T, in) and h (T, r) is kept: for the gradient of A the first, for that of B one of both."""
    if not a.requires_grad:
        return None, h
    return rows, h if h.shape[1] <= _KEPT * rows.shape[1] else None


def _rows(x: Tensor) -> Tensor:
    """(..., features) -> (T, features)."""
    return x.reshape(-1, x.shape[-1])


def _through(rows: Tensor, chain: Sequence[Tensor]) -> Tensor:
    for matrix in chain:
        rows = rows @ matrix
    return rows
