"""What can be known to be wrong with a recipe of a constitution before torch is imported; all of it is told at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from lora_cli.constitution.endpoint import require_key
from lora_cli.constitution.principles import read_principles
from lora_cli.data.head import HEAD_ROWS
from lora_cli.data.prompts import read_prompts
from lora_cli.errors import InputError
from lora_cli.models.safety import TINY, check_model_folder
from lora_cli.paths import check_name, expanded, is_path, near_matches
from lora_cli.recipe.schema import Constitution, Critic, Judge, Recipe
from lora_cli.runtime.constitution_folder import ConstitutionFolder
from lora_cli.runtime.output_folder import check_outside_base


def check(
    recipe: Recipe, environment: Mapping[str, str] = os.environ, *, later: Collection[str] = ()
) -> None:
    """Check principles, prompts, models, the keys of endpoints, and the folder that is written to.

    `later` are keys of the recipe that name what is not made yet.

    Raises:
        InputError: with every problem found.
    """
    settings = recipe.constitution
    assert settings is not None
    problems: list[str] = []
    for one in _checks(recipe, settings, environment, later):
        try:
            one()
        except InputError as error:
            problems += error.lines
    if problems:
        raise InputError(dict.fromkeys(problems))


def _checks(
    recipe: Recipe, settings: Constitution, environment: Mapping[str, str], later: Collection[str]
) -> list[Callable[[], object]]:
    used: dict[str, Critic | Judge] = {}
    if settings.rounds:
        used["critic"] = settings.critic
    if settings.samples:
        used["judge"] = settings.judge
    prompts = "constitution.prompts" if settings.prompts is not None else "data."
    there = {
        prompts: lambda: _check_prompts(recipe, settings),
        "model.base": lambda: _check_model(recipe),
        "adapter.init_from": lambda: _check_start(recipe),
    }
    return [
        lambda: _check_principles(recipe, settings),
        *(one for key, one in there.items() if not any(name.startswith(key) for name in later)),
        *(
            lambda name=name, voice=voice: check_voice(recipe, f"constitution.{name}", voice, environment)
            for name, voice in used.items()
        ),
        lambda: _check_output(recipe),
    ]


def _check_principles(recipe: Recipe, settings: Constitution) -> None:
    place = recipe.at("constitution.file")
    check_name(place, settings.file)
    path = expanded(place, settings.file)
    if not os.path.lexists(path):
        raise InputError(f"{place}: {settings.file}: no such file{near_matches(Path(settings.file))}")
    read_principles(path)


def _check_prompts(recipe: Recipe, settings: Constitution) -> None:
    key = "data.train" if settings.prompts is None else "constitution.prompts"
    if settings.prompts is None and not recipe.data.trains():
        place = recipe.at("constitution.prompts")
        raise InputError(f"{place}: there are none (name a file with prompts, or set data.train)")
    try:
        read_prompts(settings, recipe.data, HEAD_ROWS)
    except InputError as error:
        lines = [
            recipe.at(key) + line.removeprefix(key) if line.startswith(f"{key}:") else line
            for line in error.lines
        ]
        raise InputError(lines) from None


def _check_model(recipe: Recipe) -> None:
    name, place = recipe.model.base, recipe.at("model.base")
    check_name(place, name)
    folder = TINY if name == "tiny" else expanded(place, name)
    if os.path.lexists(folder):
        _check_folder(place, folder, runs_code=recipe.model.trust_remote_code)
    elif is_path(name):
        raise InputError(f"{place}: {name}: no such folder{near_matches(Path(name))}")


def _check_start(recipe: Recipe) -> None:
    name, place = recipe.init_from(), recipe.at("adapter.init_from")
    if name is not None:
        check_name(place, name)
        if not expanded(place, name).is_dir():
            raise InputError(f"{place}: {name}: no such folder{near_matches(Path(name))}")


def check_voice(
    recipe: Recipe, block: str, settings: Critic, environment: Mapping[str, str] = os.environ
) -> None:
    """Check the key of an endpoint and the folder of a local model that the recipe's `block` names.

    Raises:
        InputError: it is not there, or the folder cannot be used.
    """
    if settings.kind == "endpoint":
        require_key(settings.key_from, environment, recipe.at(block))
    if settings.folder is not None:
        place = recipe.at(f"{block}.folder")
        check_name(place, settings.folder)
        folder = expanded(place, settings.folder)
        if not folder.is_dir():
            raise InputError(f"{place}: {settings.folder}: no such folder{near_matches(folder)}")
        _check_folder(place, folder, runs_code=False)


def _check_folder(place: str, folder: Path, *, runs_code: bool) -> None:
    try:
        check_model_folder(folder, runs_code=runs_code)
    except InputError as error:
        raise InputError([f"{place}: {line}" for line in error.lines]) from None


def _check_output(recipe: Recipe) -> None:
    place = recipe.at("run.output")
    check_name(place, recipe.run.output)
    folder = expanded(place, recipe.run.output)
    check_outside_base(place, folder, recipe)
    ConstitutionFolder(folder).check(place)
