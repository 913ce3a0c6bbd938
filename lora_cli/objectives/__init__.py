"""Objectives: the file's name is the objective's name in the recipe; a leading underscore marks a helper."""

from __future__ import annotations

import importlib
import pkgutil

from lora_cli.objectives._base import Objective, Surroundings
from lora_cli.recipe.rollout_blocks import RolloutObjective
from lora_cli.recipe.schema import Objective as Settings

__all__ = ["Objective", "Surroundings", "build", "names"]


def names() -> list[str]:
    """Return the name of every objective there is."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def build(settings: Settings, *, pad_id: int) -> Objective:
    """Return the objective that the recipe's `objective` block asks for."""
    module = importlib.import_module(f"{__name__}.{settings.name}")
    own = (settings,) if isinstance(settings, RolloutObjective) else ()
    objective: Objective = module.OBJECTIVE(*own, pad_id=pad_id)
    return objective
