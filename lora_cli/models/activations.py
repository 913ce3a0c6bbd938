"""Activations of the decoder layers: kept for the backward pass, or computed again in it from the layer's input.

A recomputed layer keeps its input alone (arXiv 1604.06174) and draws the same dropout again, so that a gradient has the
same bits either way. What one costs is counted, not guessed: a forward pass in which each tensor that autograd wants to
keep is measured and let go.

Layers are found by what they do, not by the name of their class: the longest list of modules that a forward pass calls
one after the other with hidden states.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


class Recomputation:
    """The decoder layers of a model, of which the first `count` are computed again in the backward pass."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = list(layers)
        self.count = 0
        self._forwards = [_Forward(layer.forward) for layer in self.layers]
        for layer, forward in zip(self.layers, self._forwards, strict=True):
            layer.forward = forward

    def set(self, count: int, *, offload: bool = False) -> None:
        """Recompute the first `count` layers; with `offload` their inputs wait in the memory of the CPU."""
        self.count = count
        for index, forward in enumerate(self._forwards):
            forward.recomputed, forward.offloaded = index < count, offload

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within it nothing is recomputed."""
        before = [forward.recomputed for forward in self._forwards]
        for forward in self._forwards:
            forward.recomputed = False
        try:
            yield
        finally:
            for forward, recomputed in zip(self._forwards, before, strict=True):
                forward.recomputed = recomputed


class _Forward:
    """The forward method of one layer, with or without recomputation; without gradients it is the method itself."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward)
        self._forward = forward
        self.recomputed = self.offloaded = False

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if not (self.recomputed and torch.is_grad_enabled()):
            return self._forward(*arguments, **named)
        # The hooks see the layer's input alone: what it computes within is not kept at all.
        with saved_tensors_hooks(_to_cpu, _back) if self.offloaded else nullcontext():
            return checkpoint(self._forward, *arguments, use_reentrant=False, **named)


def _to_cpu(tensor: Tensor) -> tuple[torch.device, Tensor]:
    if not tensor.is_cuda:
        return tensor.device, tensor
    # Pinned, both copies are queued in the stream's order, and neither waits for the other side.
    waiting = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return tensor.device, waiting.copy_(tensor.detach(), non_blocking=True)


def _back(packed: tuple[torch.device, Tensor]) -> Tensor:
    device, tensor = packed
    return tensor.to(device, non_blocking=True)


@torch.no_grad()
def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the longest list of modules that a forward pass calls once each, in order, with hidden states (B, T, H).

    Empty where the model has none.
    """
    called: list[nn.Module] = []

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        hidden = arguments[0] if arguments else None
        if isinstance(hidden, Tensor) and hidden.is_floating_point() and hidden.dim() == 3:
            called.append(module)

    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    members = {id(member): member for modules in lists for member in modules}
    hooks = [member.register_forward_pre_hook(note) for member in members.values()]
    training = {module for module in model.modules() if module.training}
    model.eval()
    try:
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    in_order = [
        modules for modules in lists if modules and [one for one in called if one in set(modules)] == modules
    ]
    return max(in_order, key=len, default=[])


@dataclass(frozen=True, slots=True)
class Saved:
    """Bytes that a pass keeps for its backward pass where nothing is recomputed."""

    layers: npt.NDArray[np.float64]  # (L,)
    """In each layer, its input counted where the layer keeps it."""
    inputs: npt.NDArray[np.float64]  # (L,)
    """The input of each layer, which it keeps if it is recomputed."""
    rest: float
    """Before and behind the layers: above all what the head and the loss keep."""

    def peak(self, count: int, *, offload: bool = False) -> float:
        """Return the bytes that a pass needs at the most where the first `count` layers are recomputed.

        The backward pass of a layer is taken to need half as much again as what the layer kept, that of the head as
        much as it kept.
        """
        largest = float(self.layers.max(initial=0.0))
        at_once = (2.5 if count else 1.5) * largest
        waiting = 0.0 if offload else float(self.inputs[:count].sum())
        return self.rest + float(self.layers[count:].sum()) + waiting + max(self.rest, at_once)

    def to_recompute(self, room: float) -> int:
        """Return how many layers have to be recomputed for a pass to fit into `room` bytes: all, if it never does."""
        fitting = (count for count in range(len(self.layers)) if self.peak(count) <= room)
        return next(fitting, len(self.layers))


def saved_bytes(model: nn.Module, layers: Sequence[nn.Module], compute: Callable[[], object]) -> Saved:
    """Return what `compute`, one forward pass with gradients, would keep; nothing is kept, so it has no backward.

    Storages are counted once, and parameters and buffers not at all.
    """
    outside = len(layers)
    sizes, inputs = np.zeros(outside + 1), np.zeros(outside)
    place = outside
    # A weak reference keeps the address of a storage that was let go from being given to another one.
    seen = {
        StorageWeakRef(tensor.untyped_storage())
        for tensors in (model.parameters(), model.buffers())
        for tensor in tensors
    }

    def count(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference not in seen:
            seen.add(reference)
            sizes[place] += storage.nbytes()

    def enter(index: int, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal place
        place = index
        inputs[index] = arguments[0].untyped_storage().nbytes()

    def leave(*_: Any) -> None:
        nonlocal place
        place = outside

    hooks = [
        layer.register_forward_pre_hook(functools.partial(enter, index)) for index, layer in enumerate(layers)
    ]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    try:
        with torch.enable_grad(), saved_tensors_hooks(count, _gone):
            compute()
    finally:
        for hook in hooks:
            hook.remove()
    return Saved(sizes[:outside], inputs, float(sizes[outside]))


def _gone(_: object) -> Tensor:
    raise AssertionError("a pass that was only counted has no backward pass")


def extrapolate(lengths: Sequence[int], counted: Sequence[Saved], wanted: Sequence[int]) -> Saved:
    """Return what a pass of rows of the `wanted` lengths keeps, from passes of one row at three other lengths.

    Of a row of T tokens that is c0 + c1 T + c2 T^2, as attention without a fused kernel keeps its weights; c0 is what a
    pass keeps once. A kernel that is chosen for long rows keeps less.
    """
    assert len(lengths) == len(counted) == 3
    table = np.stack([np.concatenate([one.layers, one.inputs, [one.rest]]) for one in counted])
    # Rounding, and the tokens that go to an expert, may make a coefficient negative.
    coefficients = np.maximum(np.linalg.solve(np.vander(np.array(lengths, dtype=np.float64), 3), table), 0.0)
    powers = np.array([sum(length**2 for length in wanted), sum(wanted), 1.0])
    found = powers @ coefficients
    layers = len(counted[0].layers)
    return Saved(found[:layers], found[layers:-1], float(found[-1]))
