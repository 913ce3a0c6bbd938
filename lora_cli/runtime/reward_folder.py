"""The folders of reward models that a recipe names: what can be known to be wrong with one before torch is imported."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from lora_cli.errors import InputError
from lora_cli.paths import check_name, expanded, near_matches
from lora_cli.recipe.rollout_blocks import Reward
from lora_cli.recipe.schema import Recipe, RolloutObjective
from lora_cli.runtime.run_folder import RunFolder


def check(recipe: Recipe, later: Collection[str] = ()) -> list[str]:
    """Check every one of the objective's, and return a line for each; see `check_rewards`."""
    objective = recipe.objective
    rewards = objective.rewards if isinstance(objective, RolloutObjective) else ()
    return check_rewards(recipe, "objective.rewards", rewards, later)


def check_rewards(
    recipe: Recipe, key: str, rewards: Iterable[Reward], later: Collection[str] = ()
) -> list[str]:
    """Check those that the list at `key` names, and return a line for each.

    Where `later` has the key, an earlier stage, whose folder is beside this run's, may be yet to make its own.

    Raises:
        InputError: one is no folder, is what the run writes, or holds neither a run's export, an adapter nor a model.
    """
    place = recipe.at(key)
    found = []
    for reward in rewards:
        if reward.run is None:
            continue
        check_name(place, reward.run)
        folder = expanded(place, reward.run)
        output = expanded("run.output", recipe.run.output)
        if key in later and folder.parent == output.parent:
            continue
        if not folder.is_dir():
            raise InputError(f"{place}: {reward.run}: no such folder{near_matches(Path(reward.run))}")
        if folder.resolve().is_relative_to(output.resolve()):
            raise InputError(
                f"{place}: {reward.run} is in run.output, which this run writes (choose another run.output)"
            )
        run = RunFolder(folder)
        holds = run.exported() if run.is_run() else folder
        if not any((holds / name).is_file() for name in ("adapter_config.json", "config.json")):
            raise InputError(
                f"{place}: {reward.run}: is neither a run, an adapter nor a model (give a run of the objective reward)"
            )
        found.append(f"{key}: {reward.run}: a reward model")
    return found
