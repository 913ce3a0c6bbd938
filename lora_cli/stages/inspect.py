"""Where the adaptation went: of each adapted module the size of its update, its spectrum, and whether its rank fits.

An update that is a product of known factors is never formed: its singular values come from (R, R). Of DoRA, whose
lengths act on the whole weight, and of weights that were trained themselves, the difference is formed for one layer at
a time. The rules of the verdicts stand in `_spectrum.py`, what follows for the recipe in `_inspection.py`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli.adapters import AdapterLinear, Method, method_class
from lora_cli.adapters._lora_init import FROM_BASE
from lora_cli.adapters._low_rank import LoraLinear
from lora_cli.adapters._targets import linear_layers
from lora_cli.adapters.adalora import AdaLora
from lora_cli.adapters.lora import Lora
from lora_cli.adapters.vera import Vera
from lora_cli.errors import InputError
from lora_cli.recipe.schema import Adapter, LoraAdapter, ReloraAdapter
from lora_cli.stages import _inspection, _spectrum
from lora_cli.stages._inspection import Module, Spectrum, Whole


def run(
    source: Method | PreTrainedModel, base: PreTrainedModel, settings: Adapter | None = None
) -> dict[str, Any]:
    """Return all that is known of an adaptation as plain values.

    `source` is a method that is injected into `base` and filled, or a model of the same architecture whose weights are
    compared with those of `base`. `settings` is the recipe's block where there is a recipe: the ranks are in its terms.

    Raises:
        InputError: the model is not a form of the base, or a weight is not finite.
    """
    if isinstance(source, Method):
        name = settings.method if settings else type(source).__module__.rpartition(".")[2]
        modules: list[Module] = [
            _adapted(path, layer, source, settings) for path, layer in source.layers.items()
        ]
        whole, unchanged = _trained_beside(source), 0
    else:
        name = settings.method if settings else "full"
        modules, whole, unchanged = _compared(source, base)
    kinds = _inspection.by_kind(modules)
    present: dict[str, Mapping[str, Any]] = (
        {"rank_pattern": settings.rank_pattern, "alpha_pattern": settings.alpha_pattern}
        if isinstance(settings, LoraAdapter)
        else {}
    )
    power = 0.5 if isinstance(source, Lora) and source.rslora else 1.0
    keys = inspect.signature(method_class(name)).parameters if isinstance(source, Method) else {}
    names = _inspection.kind_names(module.path for module in modules)
    return {
        "method": name,
        "parameters": sum(m.parameters for m in modules) + sum(t.parameters for t in whole),
        "modules": [_inspection.as_json(module) | {"kind": names[module.path]} for module in modules],
        "whole": [_inspection.as_json(tensor) for tensor in whole],
        "unchanged": unchanged,
        "kinds": kinds,
        "layers": _inspection.by_layer(modules),
        "suggestion": _inspection.suggest(kinds, modules, keys, present, power),
    }


@torch.no_grad()
def _adapted(path: str, layer: AdapterLinear, method: Method, settings: Adapter | None) -> Module:
    """Return what an adapter layer did to its weight."""
    weight = layer.base_weight()
    factors, low_rank = layer.plain_factors(), None
    bounded = layer.bounded_factors()
    assert bounded is not None, f"{type(layer).__name__} has no rank"
    if factors is not None:
        update = _of(_spectrum.of_product(*factors))
    else:
        update = _of(_spectrum.of_matrix(layer.merged_weight() - weight.float()))
        low_rank = _of(_spectrum.of_product(*bounded))
    narrow, stored = min(weight.shape), len(bounded[0])
    rank = _rank_in_recipe(stored, settings)
    capacity = min(stored, narrow)
    values = (low_rank or update).singular_values
    verdict, suggested = _spectrum.judge(values, stored, narrow)
    # VeRA's rank is one for the model and costs next to nothing; AdaLoRA has cut the small directions off already, so
    # that what is left is flat whatever the rank.
    if isinstance(method, Vera | AdaLora) and verdict != "zero":
        verdict, suggested = None, None
    size = sum(tensor.numel() for tensor in layer.disk_tensors().values())
    norms = _norms(weight, update)
    return Module(
        path, _inspection.layer_of(path), layer.out_features, layer.in_features,
        parameters=size * rank // stored if stored else size,
        rank=rank, alpha=_alpha_in_recipe(layer, rank, method, settings),
        initial_rank=method.initial_rank if isinstance(method, AdaLora) else None, update_rank=capacity,
        weight_norm=norms[0], update_norm=norms[1], relative_change=norms[2], update=update, low_rank=low_rank,
        verdict=verdict, suggested_rank=-(-suggested * rank // capacity) if suggested is not None else None,
    )  # fmt: skip


def _rank_in_recipe(stored: int, settings: Adapter | None) -> int:
    """Return the recipe's rank of a layer that stands on disk with rank `stored`."""
    if isinstance(settings, ReloraAdapter):
        return min(settings.rank, stored)
    if isinstance(settings, LoraAdapter) and settings.init in FROM_BASE and not settings.freeze_a:
        return stored // 2
    return stored


def _alpha_in_recipe(
    layer: AdapterLinear, rank: int, method: Method, settings: Adapter | None
) -> float | None:
    if isinstance(settings, ReloraAdapter):
        return settings.alpha
    if not (isinstance(layer, LoraLinear) and isinstance(method, Lora)):
        return None
    return layer.scale * (math.sqrt(rank) if method.rslora else rank)


@torch.no_grad()
def _trained_beside(method: Method) -> list[Whole]:
    """Return the biases and whole modules that were trained; what tied modules share is there once."""
    found: dict[int, Whole] = {}
    for path, layer in method.layers.items():
        if layer.bias is not None and layer.base.bias is not None:
            found[id(layer.bias)] = _whole(f"{path}.bias", layer.bias, layer.base.bias)
    for path, module in method.whole.items():
        for name, own in module.named_parameters(recurse=False):
            if id(own) not in found:
                found[id(own)] = _whole(f"{path}.{name}", own, module.base_tensor(name))
    return list(found.values())


@torch.no_grad()
def _compared(tuned: PreTrainedModel, base: PreTrainedModel) -> tuple[list[Module], list[Whole], int]:
    """Return the linear layers and the other tensors that differ from the base, and how many tensors do not.

    Raises:
        InputError: the tensors' names or shapes differ, or a value is not finite.
    """
    before, after = dict(base.named_parameters()), dict(tuned.named_parameters())
    strange = sorted(before.keys() ^ after.keys())
    strange += [name for name in after if name in before and before[name].shape != after[name].shape]
    if strange:
        raise InputError(
            f"model.base: is not what this model was trained from: {strange[0]} is in one alone or has another shape"
        )
    linears = {f"{path}.weight": (path, module) for path, module in linear_layers(tuned).items()}
    modules, whole = [], []
    for name, parameter in after.items():
        if not bool(torch.isfinite(parameter).all()):
            raise InputError(f"{name}: holds values that are not finite")
        if torch.equal(parameter, before[name]):
            continue
        if name not in linears:
            whole.append(_whole(name, parameter, before[name]))
            continue
        path, module = linears[name]
        modules.append(_trained(path, module, parameter, before[name]))
    return modules, whole, len(after) - len(modules) - len(whole)


def _trained(path: str, module: nn.Module, after: Tensor, before: Tensor) -> Module:
    """Return what training did to the weight of a linear layer itself."""
    update = _of(_spectrum.of_matrix(after.float() - before.float()))
    outer, inner = after.shape if isinstance(module, nn.Linear) else after.shape[::-1]
    weight_norm, update_norm, change = _norms(before, update)
    return Module(
        path, _inspection.layer_of(path), outer, inner, parameters=after.numel(), rank=None, alpha=None,
        initial_rank=None, update_rank=min(outer, inner), weight_norm=weight_norm, update_norm=update_norm,
        relative_change=change, update=update, low_rank=None, verdict=None, suggested_rank=None,
    )  # fmt: skip


def _whole(name: str, after: Tensor, before: Tensor) -> Whole:
    weight = float(torch.linalg.vector_norm(before.float()))
    update = float(torch.linalg.vector_norm(after.float() - before.float()))
    return Whole(name, after.numel(), weight, update, update / weight if weight else None)


def _norms(weight: Tensor, update: Spectrum) -> tuple[float, float, float | None]:
    """Return the norms of weight and update, and what part the second is of the first."""
    base = float(torch.linalg.vector_norm(weight.float()))
    own = sum(value * value for value in update.singular_values) ** 0.5
    return base, own, own / base if base else None


def _of(values: Tensor) -> Spectrum:
    return Spectrum.of(values.tolist())
