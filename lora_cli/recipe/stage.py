"""One stage of a recipe whose `objective` is a list, and the keys that an entry has besides; see `chain.py`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from lora_cli.recipe.schema import Data, Evaluate, Export, Recipe, Train
from lora_cli.recipe.section import Section

CONSTITUTION = "constitution"
"""Name of an entry that makes rows; its keys are those of the block of that name."""
BESIDE = frozenset({"reward"})
"""Objectives that train another model than the language model."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
OF_TRAINING = frozenset(
    ("method", "dropout", "plus_ratio", "freeze_a", "target_rank", "tinit", "tfinal", "delta_t", "beta1", "beta2",
     "orthogonal_weight")
)  # fmt: skip
"""Keys of an adapter that concern training alone; all others are settled by the stage that it is gone on from."""
BLOCKS = ("data", "train", "evaluate", "export")
"""Blocks of the recipe that an entry may have keys of."""


class StageKeys(Section):
    """What an entry of a list of objectives may have besides the keys of its objective."""

    stage: Annotated[str, Field(pattern=f"^{NAME.pattern}$")] | None = None
    """Name of the stage, for its folder and for `stage:NAME/FILE`. null: the objective's name."""
    data: Data = Data()
    """Rows of this stage; each key in place of the recipe's own."""
    train: Train = Train()
    """Its training loop, likewise."""
    evaluate: Evaluate = Evaluate()
    """Its scores, likewise."""
    export: Export = Export()
    """What it writes, likewise; what a later stage goes on from is written besides."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One run of a chain."""

    name: str
    number: int
    """Counted from 1."""
    recipe: Recipe
    """Its own, with the folder that it is kept in."""
    later: frozenset[str]
    """Keys of the recipe that name what an earlier stage has yet to make."""

    @property
    def objective(self) -> str:
        """Name of its objective, `constitution` where it makes rows."""
        return CONSTITUTION if self.recipe.constitution is not None else self.recipe.objective.name

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        return Path(self.recipe.run.output).expanduser()

    @property
    def trains(self) -> bool:
        """Whether it trains the language model, so that the next stage goes on from it."""
        return self.objective not in (CONSTITUTION, *BESIDE)


def exporting(stage: Stage, form: str) -> Stage:
    """Return a stage that writes a format that a later one needs besides those that it is asked for."""
    recipe, formats = stage.recipe, stage.recipe.export_formats()
    if form in formats:
        return stage
    export = recipe.export.model_copy(update={"formats": [*formats, form]})
    return Stage(stage.name, stage.number, recipe.model_copy(update={"export": export}), stage.later)
