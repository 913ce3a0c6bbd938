"""Adapter methods: the file's name is the method's name in the recipe; a leading underscore marks a helper."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from lora_cli.adapters import _peft
from lora_cli.adapters._base import AdapterLinear, Method
from lora_cli.errors import InputError
from lora_cli.recipe.schema import Section

__all__ = ["AdapterLinear", "Method", "build", "load", "method_class", "names"]


def names() -> list[str]:
    """Return the name of every method there is."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def method_class(name: str) -> type[Method]:
    """Return the class of the method called `name` in the recipe."""
    chosen: type[Method] = importlib.import_module(f"{__name__}.{name}").METHOD
    return chosen


def build(settings: Section, seed: int) -> Method:
    """Return the method that the recipe's `adapter` block asks for; `seed` names its initialisation."""
    values = {name: getattr(settings, name) for name in type(settings).model_fields}
    make: Callable[..., Method] = method_class(values.pop("method"))
    return make(**values, seed=seed)


def load(folder: Path, model: PreTrainedModel) -> Method:
    """Inject the PEFT adapter in `folder` into `model` and return its method.

    Raises:
        InputError: the folder is not a readable adapter of a method we have, or does not fit this model exactly.
    """
    config, where = _peft.read_config(folder), str(folder / _peft.CONFIG_FILE)
    readers = [kind for kind in map(method_class, names()) if kind.reads(config)]
    if not readers:
        known = sorted({kind.peft_type for kind in map(method_class, names()) if kind.peft_type})
        raise InputError(
            f"{where}: peft_type is {config.get('peft_type')!r} (only {', '.join(known)} can be read)"
        )
    (reader,) = set(readers)
    _peft.require_neutral(where, config, reader.disk_keys)
    method = reader.from_disk_config(config, where)
    method.targets_key = f"{where}: target_modules"
    method.inject(model)
    _peft.fill(folder, method)
    return method
