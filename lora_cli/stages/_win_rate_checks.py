"""What can be known to be wrong with a recipe's win rate before torch is imported."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from lora_cli.errors import InputError
from lora_cli.paths import check_name, expanded, near_matches
from lora_cli.recipe.schema import Recipe
from lora_cli.runtime import reward_folder


def check_win_rate(recipe: Recipe, later: Collection[str] = ()) -> str | None:
    """Check the files of rewards, or the key and the folder of the judge, and say what decides; None where nothing is.

    `later` are keys that name what is not made yet.

    Raises:
        InputError: one of them is not there, or the folder cannot be used.
    """
    win_rate = recipe.evaluate.compares()
    if win_rate is None:
        return None
    key = "evaluate.win_rate.rewards"
    place = recipe.at(key)
    reward_folder.check_rewards(recipe, key, win_rate.rewards or (), later)
    for reward in win_rate.rewards or ():
        if reward.file is not None:
            check_name(place, reward.file)
            if not expanded(place, reward.file).is_file():
                raise InputError(f"{place}: {reward.file}: no such file{near_matches(Path(reward.file))}")
    if win_rate.judge is None:
        return f"evaluate.win_rate: {len(win_rate.rewards or ())} rewards"
    from lora_cli.stages._constitution_checks import check_voice  # needs the data readers

    check_voice(recipe, "evaluate.win_rate.judge", win_rate.judge)
    return f"evaluate.win_rate: a judge ({win_rate.judge.kind})"
