"""Adapter methods: the file's name is the method's name in the recipe; a leading underscore marks a helper."""

from __future__ import annotations

import importlib
import pkgutil

from lora_cli.adapters._base import AdapterLinear, Method
from lora_cli.recipe.schema import Section

__all__ = ["AdapterLinear", "Method", "build", "names"]


def names() -> list[str]:
    """Return the name of every method there is."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def build(settings: Section, seed: int) -> Method:
    """Return the method that the recipe's `adapter` block asks for; `seed` names its initialisation."""
    values = {name: getattr(settings, name) for name in type(settings).model_fields}
    module = importlib.import_module(f"{__name__}.{values.pop('method')}")
    method: Method = module.METHOD(**values, seed=seed)
    return method
