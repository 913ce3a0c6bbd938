"""Objectives: the file's name is the objective's name in the recipe; a leading underscore marks a helper."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from lora_cli.objectives._base import Objective, Surroundings
from lora_cli.recipe.objective_blocks import Objective as ObjectiveBlock
from lora_cli.recipe.rollout_blocks import RolloutObjective

__all__ = ["Objective", "Surroundings", "build", "consumes", "names"]


def names() -> list[str]:
    """Return the name of every objective there is."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def build(settings: ObjectiveBlock, *, pad_id: int) -> Objective:
    """Return the objective that the recipe's `objective` block asks for."""
    if isinstance(settings, RolloutObjective):
        sampled: Objective = _module(settings).OBJECTIVE(settings, pad_id=pad_id)
        return sampled
    keys = settings.model_dump(exclude={"name", "train_on"})  # `train_on` is read where rows become tokens
    objective: Objective = _module(settings).OBJECTIVE(pad_id=pad_id, **keys)
    return objective


def consumes(settings: ObjectiveBlock) -> tuple[type, ...]:
    """Return the kinds of rows that the objective of a block can learn from."""
    kinds: tuple[type, ...] = _module(settings).OBJECTIVE.consumes
    return kinds


def _module(settings: ObjectiveBlock) -> Any:
    return importlib.import_module(f"{__name__}.{settings.name}")
