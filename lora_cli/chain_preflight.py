"""What can be known of all stages of a recipe before the first is begun; see `preflight.py`, which checks one."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lora_cli import preflight
from lora_cli.errors import InputError
from lora_cli.paths import check_name, expanded
from lora_cli.recipe.chain import Chain
from lora_cli.recipe.stage import Stage
from lora_cli.runtime.chain_folder import ChainFolder
from lora_cli.runtime.output_folder import check_outside_base
from lora_cli.stages import _constitution_checks


def check(
    chain: Chain, *, resume: bool | None = None, overwrite: bool = False, allow: Sequence[str] = ()
) -> list[str]:
    """Check every stage, but for what an earlier one has yet to make; return what was checked, a line each.

    Raises:
        InputError: with every problem found; one without a place in the recipe's file names its stage.
    """
    done, problems = list[str](), list[str]()
    try:
        _check_output(chain, overwrite=overwrite)
    except InputError as error:
        problems += error.lines
    else:
        for stage in chain.stages:
            try:
                lines = _check_stage(stage, resume=resume, overwrite=overwrite, allow=allow)
            except InputError as error:
                problems += [_named(stage, line) for line in error.lines]
            else:
                done += [f"stage {stage.name}: {line}" for line in lines]
    if problems:
        raise InputError(dict.fromkeys(problems))
    return done


def _check_stage(stage: Stage, *, resume: bool | None, overwrite: bool, allow: Sequence[str]) -> list[str]:
    if stage.recipe.constitution is not None:
        _constitution_checks.check(stage.recipe, later=stage.later)
        return [f"constitution.file: {stage.recipe.constitution.file}"]
    return preflight.check(stage.recipe, resume=resume, overwrite=overwrite, allow=allow, later=stage.later)


def _check_output(chain: Chain, *, overwrite: bool) -> None:
    name, place = chain.run.output, chain.place
    check_name(place, name)
    if os.environ.get("RANK", "0") != "0":  # beside the first process, which may be writing
        return
    folder = expanded(place, name)
    check_outside_base(place, folder, chain.stages[0].recipe)
    ChainFolder(folder).check(place, [stage.folder.name for stage in chain.stages], overwrite=overwrite)


def _named(stage: Stage, line: str) -> str:
    """Return a problem as it is where it begins with its place, else with the stage's name."""
    is_key = line.partition(":")[0].partition(".")[0] in type(stage.recipe).model_fields
    return f"stage {stage.name}: {line}" if is_key else line
