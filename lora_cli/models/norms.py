"""Root-mean-square norms in one pass forward and one backward, while training (arXiv 1910.07467, eq. 4).

    y = x / sqrt(mean(x^2) + eps) * w          or * (1 + w), as Gemma has it

As models write it, a norm of bfloat16 rows keeps float32 copies of them for its backward pass and goes over them some
fifteen times, which on a CPU takes five times as long. Here x and one number a row are kept, and the result is rounded
once. In evaluation, generation and export the model's own code computes.

Which of a model's modules are such norms is tried, not looked up: on random rows, and with weights that differ from
one, the module must give what the equation gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from transformers import PreTrainedModel

_EPSILONS = ("variance_epsilon", "eps", "epsilon")
_ROWS = 7
_TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Largest difference as a part of a value; a module may round twice where the equation is rounded once."""


_as_while_training: ContextVar[bool] = ContextVar("as_while_training", default=False)


@contextmanager
def as_while_training() -> Iterator[None]:
    """Within it norms round as they do in training, in evaluation too: what is compared must be rounded alike."""
    token = _as_while_training.set(True)
    try:
        yield
    finally:
        _as_while_training.reset(token)


class RmsNorm(torch.autograd.Function):
    """x / rms(x) * (offset + w): (..., D), (D,) -> (..., D) in the type of x; computed in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        exact = x.float() if x.dtype != torch.float32 else x.clone()
        inverse = torch.linalg.vecdot(exact, exact).mul_(1 / x.shape[-1]).add_(eps).rsqrt_()[..., None]
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = offset
        return exact.mul_(inverse).mul_(_factor(weight, offset)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        normed = x.float().mul(inverse)
        of_x = of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (grad.float() * normed).flatten(0, -2).sum(dim=0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            inner = grad.float().mul(_factor(weight, ctx.offset))
            along = torch.linalg.vecdot(inner, normed).mul_(1 / x.shape[-1])[..., None]
            of_x = inner.addcmul_(normed, along, value=-1).mul_(inverse).to(x.dtype)
        return of_x, of_weight, None, None


def _factor(weight: Tensor, offset: float) -> Tensor:
    return weight.float() + offset if offset else weight


def speed_up(model: PreTrainedModel) -> int:
    """Have the model's norms computed by `RmsNorm` while they train; return how many there are."""
    found = [module for module in model.modules() if _settle(module)]
    return len(found)


def is_fast(module: nn.Module) -> bool:
    """Say whether a module is a norm that `speed_up` has changed."""
    return isinstance(module.__dict__.get("forward"), _Forward)


def _settle(module: nn.Module) -> bool:
    form = _form(module)
    if form is None:
        return False
    module.forward = _Forward(module, *form)
    return True


class _Forward:
    """The forward method of a norm: in one pass while gradients are recorded in training, else its own."""

    def __init__(self, module: nn.Module, eps: float, offset: float) -> None:
        self._module, self._eps, self._offset = module, eps, offset
        self._plain: Callable[..., Tensor] = module.forward

    def __call__(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        weight = cast(Tensor, self._module.weight)  # no parameter where another value stands in for it
        trains = _as_while_training.get() or (self._module.training and torch.is_grad_enabled())
        if others or named or not trains or x.dtype != weight.dtype:
            return self._plain(x, *others, **named)
        y: Tensor = RmsNorm.apply(x, weight, self._eps, self._offset)
        return y


@torch.no_grad()
def _form(module: nn.Module) -> tuple[float, float] | None:
    """Return eps and offset of a module that is such a norm; None of any other."""
    own = dict(module.named_parameters())
    eps = next((value for name in _EPSILONS if isinstance(value := getattr(module, name, None), float)), None)
    if eps is None or list(own) != ["weight"] or own["weight"].dim() != 1 or "forward" in module.__dict__:
        return None
    weight = own["weight"]
    generator = torch.Generator().manual_seed(0)
    x, drawn = torch.randn(_ROWS + 1, len(weight), generator=generator).to(weight).split([_ROWS, 1])
    x[0] *= eps**0.5  # a row whose size eps decides
    try:
        computed = functional_call(module, {"weight": drawn[0]}, (x,))
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return None
    for offset in (0.0, 1.0):
        expected = RmsNorm.apply(x, drawn[0], eps, offset)
        if isinstance(computed, Tensor) and _equal(computed, expected):
            return eps, offset
    return None


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    apart = (one.float() - other.float()).abs()
    return bool((apart <= 2 * _TOLERANCES[other.dtype] * other.float().abs() + 1e-30).all())
