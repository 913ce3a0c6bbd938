"""Modules that are trained whole, or in their bias, beside the adapters: norms, the head, the embedding.

    norm: RMSNorm               norm: TrainedModule
                                  .base: RMSNorm, frozen
                                  .weight: float32, trained

The frozen module stays, so that the reference model and the base remain what they were. PEFT calls such modules
`modules_to_save`, and stores their tensors under the names of the base.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_cli.errors import InputError
from lora_cli.models.nf4 import QuantizedLinear, quantized_layers


class TrainedModule(nn.Module):
    """A frozen module that computes with trained values in place of the parameters called `names`."""

    def __init__(
        self, base: nn.Module, names: Sequence[str], tied: Mapping[str, nn.Parameter] | None = None
    ) -> None:
        super().__init__()
        for name in names:
            own = (tied or {}).get(name)
            if own is None:
                own = nn.Parameter(base.get_parameter(name).detach().float().clone())
            self.register_parameter(name, own)
        self.base = base
        self.enabled = True
        """False: the module computes exactly what the base does."""
        self._unmerged: dict[str, nn.Parameter] | None = None

    def __getattr__(self, name: str) -> Any:
        """Look up in the base what is not trained: model code may ask a layer for its weight or its size."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    @property
    def merged(self) -> bool:
        """True while the base holds the trained values."""
        return self._unmerged is not None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the module with the trained values, cast to the base's dtype: bf16 steps would round updates away."""
        if not self.enabled or self.merged:
            return self.base(*args, **kwargs)
        return functional_call(self.base, self._cast(), args, kwargs)

    def base_tensor(self, name: str) -> Tensor:
        """Return what of the base a trained parameter stands in for."""
        return self.base.get_parameter(name)

    def disk_tensors(self) -> dict[str, Tensor]:
        """Return the trained values by the names of the base's parameters."""
        return dict(self.named_parameters(recurse=False))

    @torch.no_grad()
    def merge(self) -> None:
        """Give the base the trained values; a parameter that it shares with another module is parted from it."""
        assert not self.merged
        cast = self._cast()
        self._unmerged = {name: self.base.get_parameter(name) for name in cast}
        for name, value in cast.items():
            setattr(self.base, name, nn.Parameter(value.detach().clone(), requires_grad=False))

    def unmerge(self) -> None:
        """Give the base its own parameters back."""
        assert self._unmerged is not None
        for name, parameter in self._unmerged.items():
            setattr(self.base, name, parameter)
        self._unmerged = None

    def _cast(self) -> dict[str, Tensor]:
        return {
            name: own.to(self.base.get_parameter(name).dtype)
            for name, own in self.named_parameters(recurse=False)
        }


def choose(model: nn.Module, names: Sequence[str], adapted: Collection[str], where: str) -> list[str]:
    """Return the paths of the modules that `names` name at the end of their paths, and of those tied to them.

    Raises:
        InputError: a name matches nothing, a module that holds others, or one that has an adapter.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    chosen: list[str] = []
    for name in names:
        found = [path for path in modules if f".{path}".endswith(f".{name}")]
        if not found:
            ends = sorted({path.rpartition(".")[2] for path in modules} - {"base"})
            near = difflib.get_close_matches(name, ends, n=1)
            hint = f"did you mean {near[0]}?" if near else f"its modules are named {', '.join(ends)}"
            raise InputError(f"{where}: {name!r} matches no module of the model ({hint})")
        chosen += found
    shared = {id(parameter) for path in chosen for parameter in modules[path].parameters(recurse=False)}
    chosen += [
        path
        for path, module in modules.items()
        if shared & {id(parameter) for parameter in module.parameters(recurse=False)}
    ]
    for path in chosen:
        if path.removesuffix(".base") in adapted:
            raise InputError(
                f"{where}: {path.removesuffix('.base')} has an adapter already, or shares its weight with what has"
                " (take it out of adapter.targets)"
            )
        _require_leaf(path, modules[path], where)
    return [path for path in modules if path in set(chosen)]


def choose_as_peft(model: nn.Module, names: Sequence[str], where: str) -> list[str]:
    """Return the paths that end in one of `names`, even within a word; names that match nothing are passed over.

    Raises:
        InputError: one is a module that holds others.
    """
    modules = {path: module for path, module in model.named_modules() if path.endswith(tuple(names)) and path}
    for path, module in modules.items():
        _require_leaf(path, module, where)
    return list(modules)


def biased(model: nn.Module, adapted: Collection[str], where: str) -> list[str]:
    """Return the paths of the modules that have a bias, without those that have an adapter.

    Raises:
        InputError: one is a quantized layer, whose bias is trained only beside an adapter.
    """
    for path, layer in quantized_layers(model).items():
        if layer.bias is not None and path.removesuffix(".base") not in adapted:
            raise InputError(
                f"{where}: {path} is quantized and has a bias but no adapter (train the biases of adapted layers only,"
                " name it among the targets, or do not quantize the base)"
            )
    return [
        path
        for path, module in model.named_modules()
        if module._parameters.get("bias") is not None and path.removesuffix(".base") not in adapted
    ]


def wrap(
    model: nn.Module, paths: Sequence[str], only: str | None = None, *, tie: bool = True
) -> dict[str, TrainedModule]:
    """Put a TrainedModule around each of `paths`, for all its parameters or the one called `only`.

    With `tie`, parameters that the base shares between modules are trained as one.
    """
    made: dict[int, nn.Parameter] = {}
    whole = {}
    for path in paths:
        base = model.get_submodule(path)
        originals = {only: base.get_parameter(only)} if only else dict(base.named_parameters(recurse=False))
        tied = {
            name: made[id(original)] for name, original in originals.items() if tie and id(original) in made
        }
        whole[path] = TrainedModule(base, list(originals), tied)
        made |= {id(original): whole[path].get_parameter(name) for name, original in originals.items()}
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, whole[path])
    return whole


def tie_equal(whole: Mapping[str, TrainedModule]) -> None:
    """Train as one from here on what has one parameter in the base and equal values."""
    made: dict[int, nn.Parameter] = {}
    for module in whole.values():
        for name, own in list(module.named_parameters(recurse=False)):
            first = made.setdefault(id(module.base.get_parameter(name)), own)
            if torch.equal(first, own):
                module.register_parameter(name, first)


def _require_leaf(path: str, module: nn.Module, where: str) -> None:
    if isinstance(module, QuantizedLinear):
        raise InputError(f"{where}: {path} is quantized, so it cannot be trained whole (give it an adapter)")
    inner = [name for name, _ in module.named_children()]
    if inner or not list(module.parameters(recurse=False)):
        found = f"holds other modules ({', '.join(inner[:4])})" if inner else "has no parameters"
        raise InputError(f"{where}: {path} {found} (name modules such as norm, lm_head or embed_tokens)")
