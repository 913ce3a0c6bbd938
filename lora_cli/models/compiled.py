"""Decoder layers compiled by torch.compile: one layer's forward pass, whose code serves all layers of its class.

A layer's weights are inputs of the code and lengths are symbols in it, so that neither the next layer nor the next
batch compiles anew. What torch cannot look into, or should not, is called from the code as it is: adapter layers, which
keep what they know between passes, packed weights, norms in one pass, and the attention of packed documents.

The first layer stays plain, as its input mostly needs no gradient, which would be code of its own. So does a pass
without gradients: it is evaluation, whose shapes are others.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from lora_cli.models import attention

_OPTIONS: dict[str, Any] = {"fallback_random": True}
"""Dropouts draw what they would draw in the plain layer."""


class CompiledLayers:
    """Layers that compute compiled from now on, until `remove`; `opaque` modules within them are called as they are.

    Nothing is compiled before the first pass with gradients.
    """

    def __init__(self, layers: Sequence[nn.Module], opaque: Iterable[nn.Module]) -> None:
        torch._logging.set_logs(dynamo=logging.ERROR, inductor=logging.ERROR)
        self._changed: list[tuple[nn.Module, Callable[..., Any] | None]] = []
        for module in opaque:
            self._change(module, torch.compiler.disable(module.forward))
        AttentionInterface.register(attention.NAME, torch.compiler.disable(attention.attend))
        kinds: set[Any] = set(map(type, layers[1:]))
        compiled = {kind: torch.compile(kind.forward, dynamic=True, options=_OPTIONS) for kind in kinds}
        for layer in layers[1:]:
            self._change(layer, _Forward(layer.forward, functools.partial(compiled[type(layer)], layer)))

    def remove(self) -> None:
        """Have every module compute as it did before."""
        AttentionInterface.register(attention.NAME, attention.attend)
        for module, former in reversed(self._changed):
            del module.forward
            if former is not None:
                module.forward = former
        self._changed.clear()

    def _change(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._changed.append((module, module.__dict__.get("forward")))
        module.forward = forward


class _Forward:
    """The forward method of a layer: compiled where gradients are recorded."""

    def __init__(self, plain: Callable[..., Any], compiled: Callable[..., Any]) -> None:
        functools.update_wrapper(self, plain)
        self._plain, self._compiled = plain, compiled

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return (self._compiled if torch.is_grad_enabled() else self._plain)(*arguments, **named)


def missing_compiler(device: torch.device) -> str | None:
    """Return what there is no compiler for; None where there is one."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    if device.type == "cuda":
        return None if has_triton() else "Triton, which compiles for this GPU, is not there"
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler (install g++, or name one in CXX)"
    return None
