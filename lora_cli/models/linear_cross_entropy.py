"""The cross-entropy of an output head without its logits: tokens in chunks, one small buffer of logits for all of them.

    z = h W^T + b        product, in the head's own dtype (N, V)
    u = f(z)             what some models do to their logits (`Scaling`), in float32
    loss = log sum exp(u) - u[target]
    d loss / d z = (softmax(u) - onehot(target)) f'(z)

All logits of N = 4,096 tokens over V = 128,256 words take 1 GB in bfloat16, twice that in the float32 of the softmax,
and as much again for their gradient; a chunk takes some MB and stays near the processor.

The loss of a token has one gradient with respect to its hidden state, up to the factor that comes in from above. It is
formed in the forward pass, while the chunk's logits are there, and kept as (N, H): two products with a frozen head in
all, as many as with all logits kept. The gradients of a head that trains are sums over tokens, taken in float32; where
every token has the same factor, as in a sum of losses, they are formed in the forward pass too. Other factors make
the backward pass compute each chunk's logits again.

Nothing is approximated: no logit is left out and no probability filtered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

ROWS = {"cpu": 256, "cuda": 2048}
"""Tokens of a chunk at most: fewer, and a product reads the head's weight more often than it computes with it."""
TRAINED_ROWS = {"cpu": 512, "cuda": 1024}
"""The same for a head that trains: each chunk adds a gradient as large as the weight."""
CHUNK_BYTES = 1 << 29
"""What the logits of a chunk may take, in their own type."""
_FEWEST_ROWS = 64
_BLOCK_BYTES = {"cpu": 1 << 21, "cuda": 1 << 28}
"""Float32 logits worked on at once: on a CPU what its cache holds, for the softmax goes over them several times."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """What a model does to the logits of its head: times `multiplier`, then softly capped at `cap`.

    u = cap tanh(multiplier z / cap)        arXiv 2408.00118, section 2
    """

    multiplier: float = 1.0
    cap: float | None = None

    def apply_(self, z: Tensor) -> Tensor:
        """Overwrite logits with scaled ones: (..., V) float32 -> (..., V)."""
        if self.cap is None:
            return z if self.multiplier == 1.0 else z.mul_(self.multiplier)
        return z.mul_(self.multiplier / self.cap).tanh_().mul_(self.cap)


PLAIN = Scaling()


def token_losses(
    hidden: Tensor, targets: Tensor, head: nn.Module, *, scaling: Scaling = PLAIN, best: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return each token's negative log-likelihood, and with `best` whether it was the most likely one.

    (N, H), (N,) int64 in [0, V) -> (N,) float32, (N,) bool or None. `head` maps (n, H) to logits (n, V), and each row
    for itself. Losses have gradients with respect to the hidden states and to what of the head is trained.
    """
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    if not (torch.is_grad_enabled() and (hidden.requires_grad or trained)):
        return _forward(hidden.detach(), targets, head, scaling, best, None)
    if is_frozen_linear(head):
        losses, correct = _FrozenHead.apply(hidden, targets, head, scaling, best)
    else:
        losses, correct = _AnyHead.apply(hidden, targets, head, scaling, best, *trained)
    return losses, correct


def is_frozen_linear(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Say whether a head is a linear layer and nothing else, of which nothing is trained."""
    return type(head) is nn.Linear and not any(parameter.requires_grad for parameter in head.parameters())


class _FrozenHead(torch.autograd.Function):
    """The losses of a frozen linear head; the hidden states' gradients are formed with them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: nn.Linear, scaling: Scaling, best: bool
    ) -> tuple[Tensor, Tensor | None]:
        slopes = torch.empty_like(hidden)
        losses, correct = _forward(hidden, targets, head, scaling, best, slopes)
        ctx.save_for_backward(slopes)
        if correct is not None:
            ctx.mark_non_differentiable(correct)
        return losses, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (slopes * grad[:, None]).to(slopes.dtype), None, None, None, None


class _AnyHead(torch.autograd.Function):
    """The losses of a head that trains, or is more than a linear layer."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: nn.Module,
        scaling: Scaling,
        best: bool,
        *trained: nn.Parameter,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(hidden, targets, *trained)
        ctx.head, ctx.scaling, ctx.draws = head, scaling, _draws(hidden.device)
        losses, correct, ctx.gradients = _forward_and_backward(
            hidden, targets, head, scaling, trained, into_hidden=ctx.needs_input_grad[0], best=best
        )
        if correct is not None:
            ctx.mark_non_differentiable(correct)
        return losses, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, targets, *trained = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is not None and len(grad) > 0 and grad.stride(0) == 0:
            # A sum hands one factor down, as one number in memory: no need to look, which would wait for a GPU.
            gradients = [None if one is None else one.mul_(grad[0]) for one in gradients]
        else:
            with _drawn_again(hidden.device, ctx.draws):
                _, _, gradients = _forward_and_backward(
                    hidden, targets, ctx.head, ctx.scaling, trained,
                    into_hidden=ctx.needs_input_grad[0], factors=grad,
                )  # fmt: skip
        of_hidden, *sums = (
            one if one is None else one.to(wanted.dtype)
            for one, wanted in zip(gradients, [hidden, *trained], strict=True)
        )
        return of_hidden, None, None, None, None, *sums


def _forward_and_backward(
    hidden: Tensor,
    targets: Tensor,
    head: nn.Module,
    scaling: Scaling,
    trained: Sequence[nn.Parameter],
    *,
    into_hidden: bool,
    factors: Tensor | None = None,
    best: bool = False,
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """Return losses, `best`, and the gradients of their sum, each times its one of `factors` (N,).

    First the hidden states', (N, H) in their own type, then those of what is `trained`, float32.
    """
    losses = hidden.new_empty(len(hidden), dtype=torch.float32)
    correct = torch.empty_like(losses, dtype=torch.bool) if best else None
    slopes = torch.empty_like(hidden) if into_hidden else None
    sums: list[Tensor | None] = [None] * len(trained)
    for rows in _chunks(hidden, head):
        part = hidden[rows].detach().requires_grad_(into_hidden)
        # What is saved here lives as long as this chunk: it is not for hooks that count or move what a pass keeps.
        with torch.enable_grad(), saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            z = head(part)
        gradient = torch.empty_like(z)
        losses[rows], found = _score(
            z.detach(), targets[rows], scaling,
            slopes=gradient, factors=None if factors is None else factors[rows], best=best,
        )  # fmt: skip
        if correct is not None and found is not None:
            correct[rows] = found
        inputs = [part, *trained] if into_hidden else trained
        gradients = list(torch.autograd.grad(z, inputs, gradient, allow_unused=True))
        if slopes is not None:
            slopes[rows] = gradients.pop(0)
        sums = [_add(total, one) for total, one in zip(sums, gradients, strict=True)]
    return losses, correct, [slopes, *sums]


@torch.no_grad()
def _forward(
    hidden: Tensor, targets: Tensor, head: nn.Module, scaling: Scaling, best: bool, slopes: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return losses and `best` of all tokens, chunk by chunk; `slopes` (N, H) of a frozen linear head are filled."""
    losses = hidden.new_empty(len(hidden), dtype=torch.float32)
    correct = torch.empty_like(losses, dtype=torch.bool) if best else None
    buffer: Tensor | None = None
    for rows in _chunks(hidden, head):
        part = hidden[rows]
        if type(head) is nn.Linear:
            if buffer is None:
                buffer = hidden.new_empty(len(part), head.out_features)
            z = _product(part, head, buffer[: len(part)])
        else:
            z = head(part)
        losses[rows], found = _score(
            z, targets[rows], scaling, slopes=None if slopes is None else z, best=best
        )
        if correct is not None and found is not None:
            correct[rows] = found
        if slopes is not None:
            torch.mm(z, head.get_parameter("weight"), out=slopes[rows])
    return losses, correct


def _product(hidden: Tensor, head: nn.Linear, out: Tensor) -> Tensor:
    if head.bias is None:
        return torch.mm(hidden, head.weight.T, out=out)
    return torch.addmm(head.bias, hidden, head.weight.T, out=out)


def _score(
    z: Tensor,
    targets: Tensor,
    scaling: Scaling,
    *,
    slopes: Tensor | None = None,
    factors: Tensor | None = None,
    best: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the losses of logits (n, V), (n,) float32, and with `best` whether the target is the first of the largest.

    `slopes`, (n, V) or `z` itself, is overwritten with the losses' gradients with respect to `z`, each row times its
    one of `factors` (n,) float32. Float32 logits that are also `slopes` are worked on in place.
    """
    step = max(1, _BLOCK_BYTES[_kind(z)] // (4 * z.shape[1]))
    losses = z.new_empty(len(z), dtype=torch.float32)
    correct = torch.empty_like(losses, dtype=torch.bool) if best else None
    in_place = z.dtype == torch.float32 and slopes is z
    buffer = None if in_place else z.new_empty(min(step, len(z)), z.shape[1], dtype=torch.float32)
    for first in range(0, len(z), step):
        rows = slice(first, first + step)
        block, target = z[rows], targets[rows, None]  # (m, V), (m, 1)
        logits = block if buffer is None else buffer[: len(block)].copy_(block)
        scaling.apply_(logits)
        if correct is not None:
            correct[rows] = logits.argmax(-1) == targets[rows]
        # The cap's slope is 1 - (u / cap)^2, of logits that the exponentials are about to overwrite.
        bend = None if slopes is None or scaling.cap is None else 1 - (logits / scaling.cap).square_()
        highest, wanted = logits.amax(-1, keepdim=True), logits.gather(-1, target)
        total = logits.sub_(highest).exp_().sum(-1, keepdim=True)
        losses[rows] = (total.log() + (highest - wanted))[:, 0]
        if slopes is None:
            continue
        weight = torch.full_like(total, scaling.multiplier)
        if factors is not None:
            weight *= factors[rows, None]
        logits.mul_(weight / total).scatter_add_(-1, target, -weight)
        if bend is not None:
            logits.mul_(bend)
        if not in_place:
            slopes[rows] = logits
    return losses, correct


def _chunks(hidden: Tensor, head: nn.Module) -> Iterator[slice]:
    """Yield the rows of each chunk; how many is a function of the shapes alone, so that a step repeats its bits."""
    if is_frozen_linear(head):
        fitting = CHUNK_BYTES // (head.out_features * hidden.element_size())
        size = max(_FEWEST_ROWS, min(ROWS[_kind(hidden)], fitting))
    else:
        size = TRAINED_ROWS[_kind(hidden)]
    for first in range(0, len(hidden), size):
        yield slice(first, min(first + size, len(hidden)))


def _kind(tensor: Tensor) -> str:
    return "cuda" if tensor.is_cuda else "cpu"


def _add(total: Tensor | None, one: Tensor | None) -> Tensor | None:
    if one is None:
        return total
    return one.float() if total is None else total.add_(one)


def _draws(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return where the random streams of the CPU and of the device are."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _drawn_again(device: torch.device, draws: tuple[Tensor, Tensor | None]) -> Iterator[None]:
    """Within it random numbers are those that followed `draws`; after it the streams are where they were before."""
    own, others = draws
    with torch.random.fork_rng([device] if others is not None else []):
        torch.set_rng_state(own)
        if others is not None:
            torch.cuda.set_rng_state(others, device)
        yield
