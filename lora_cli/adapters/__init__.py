"""Adapter methods: the file's name is the method's name in the recipe; a leading underscore marks a helper."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lora_cli.adapters import _peft
from lora_cli.adapters._base import AdapterLinear, Method
from lora_cli.adapters._start import Start
from lora_cli.errors import InputError
from lora_cli.recipe.schema import Section

__all__ = ["AdapterLinear", "Method", "Start", "build", "load", "method_class", "names", "open_start"]


def names() -> list[str]:
    """Return the name of every method there is."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def method_class(name: str) -> type[Method]:
    """Return the class of the method called `name` in the recipe."""
    chosen: type[Method] = importlib.import_module(f"{__name__}.{name}").METHOD
    return chosen


def build(settings: Section, seed: int) -> Method:
    """Return the method that the recipe's `adapter` block asks for; `seed` names its initialisation.

    Where the run starts from an adapter that exists, it is `Start.build` that returns the method.
    """
    values = {name: getattr(settings, name) for name in type(settings).model_fields}
    make: Callable[..., Method] = method_class(values.pop("method"))
    assert values.pop("init_from", None) is None
    return make(**values, seed=seed)


def open_start(folder: Path, method: str) -> Start:
    """Return the PEFT adapter in `folder` as what a run of `method` starts from.

    Raises:
        InputError: the folder is not a readable adapter of this method, or has settings that are not supported.
    """
    config = _peft.read_config(folder)
    kind = _kind(config, folder)
    if kind is not method_class(method):
        own = next(name for name in names() if method_class(name) is kind)
        raise InputError(
            f"adapter.method: the adapter in {folder} is {own}, the recipe {method} (write method: {own} with its own"
            " keys, or choose another init_from)"
        )
    _peft.require_neutral(str(folder / _peft.CONFIG_FILE), config, kind.disk_keys)
    if config.get("trainable_token_indices"):
        raise InputError(
            f"adapter.init_from: {folder} trains rows of single tokens, from which no run can start (merge it with"
            " lora-merge, and train on the result)"
        )
    return Start(folder, kind, config)


def load(folder: Path, model: PreTrainedModel) -> Method:
    """Inject the PEFT adapter in `folder` into `model` and return its method.

    Raises:
        InputError: the folder is not a readable adapter of a method we have, or does not fit this model exactly.
    """
    config = _peft.read_config(folder)
    method = _peft.method_of(_kind(config, folder), config, folder)
    method.inject(model)
    _peft.fill(folder, method)
    return method


def _kind(config: Mapping[str, Any], folder: Path) -> type[Method]:
    """Return the class of the method that an adapter is of.

    Raises:
        InputError: it is of none that we have.
    """
    kinds = {method_class(name) for name in names()}
    readers = [kind for kind in kinds if kind.reads(config)]
    if not readers:
        known = sorted({kind.peft_type for kind in kinds if kind.peft_type})
        where, found = folder / _peft.CONFIG_FILE, config.get("peft_type")
        raise InputError(f"{where}: peft_type is {found!r} (only {', '.join(known)} can be read)")
    (reader,) = readers
    return reader
