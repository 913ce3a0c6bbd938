"""Whether a run is finished, can go on, or must start anew; and which keys of its recipe may change meanwhile.

A checkpoint says itself which recipe, data and base it belongs to. The run's recipe.yaml is for its reader: whoever
edits it changes nothing of what is compared here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lora_cli.errors import InputError
from lora_cli.manifest import verify
from lora_cli.recipe.schema import Recipe
from lora_cli.runtime.checkpoint import Checkpoints
from lora_cli.runtime.fingerprints import changed_contents, changed_tokens
from lora_cli.runtime.run_folder import EXPORTS, RunFolder

BY_CONTENT = {"data.train", "data.eval", "data.template", "model.base", "adapter.init_from"}
"""Keys whose content is compared, not their text; so is the path of each of data.sources."""

MAY_CHANGE = BY_CONTENT | {
    "train.epochs",
    "train.max_steps",
    "train.micro_batch_tokens",
    "train.activations",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.keep_checkpoints",
    "adapter.export_rank",
    "run.output",
    "run.device",
}
"""With more steps the schedule continues as f(step, new total). The other keys do not enter an update (micro-batches
do, through the draws of a dropout)."""

NOT_COMPARED = BY_CONTENT | {"run.output", "run.device", "train.log_every", "train.activations"}
"""Keys in which a finished run may differ from what is asked for."""

_OF_RUNS = ("objective.rewards", "evaluate.win_rate.rewards")
"""Lists whose entries may name a run."""

FIXED = {
    "adapter.method",
    "adapter.rank",
    "adapter.initial_rank",
    "adapter.rank_pattern",
    "adapter.targets",
    "adapter.layers",
    "adapter.bias",
    "adapter.train_also",
    "adapter.train_tokens",
    "adapter.add_tokens",
    "adapter.parameters",
    "adapter.masters",
    "adapter.freeze_a",
    "adapter.warm_start_steps",
    "train.optimizer",
}
"""Keys that decide which tensors a checkpoint has: it cannot be gone on with under others, so --allow is no way out."""

_MAY_CHANGE_SECTIONS = ("evaluate", "export", "constitution")


def find_finished(
    folder: RunFolder, recipe: Recipe, facts: Mapping[str, str], *, resume: bool
) -> dict[str, Any] | None:
    """Return the summary of a run that is finished as this recipe asks; None where there is something to do.

    Raises:
        InputError: a finished run stands there that differs, or is damaged, and `resume` is not set.
    """
    summary = folder.finished()
    if summary is None:
        return None
    changes = changed_keys(_recipe_of(summary, folder), recipe)
    differences = [
        f"{key}: {change}"
        for key, change in changes.items()
        if key not in NOT_COMPARED and not _is_source_path(key)
    ]
    contents = changed_contents(summary["fingerprints"], facts)
    if not contents and not any(map(changes_training, changes)):
        contents = changed_tokens(summary["fingerprints"], facts)
    differences += contents
    for form in recipe.export_formats():
        exported = folder.path / EXPORTS[form]
        if not exported.is_dir():
            differences.append(f"{EXPORTS[form]}/ is missing")
            continue
        try:
            verify(exported)
        except InputError as error:
            differences.append(str(error))
    if not differences:
        return summary
    if resume:
        return None
    other_run = contents or any(map(changes_training, changes))
    goes_on = "" if other_run else "--resume goes on from its last checkpoint, "
    raise InputError(
        f"{folder.path}: holds a finished run that differs: {'; '.join(differences)}"
        f" ({goes_on}--overwrite trains it again, or choose another run.output)"
    )


def find_step(
    folder: RunFolder,
    checkpoints: Checkpoints,
    recipe: Recipe,
    facts: Mapping[str, str],
    made_on: Mapping[str, str | int],
    total_steps: int,
    log: Callable[[str], None],
    *,
    allow: Sequence[str] = (),
) -> int | None:
    """Return the step of the checkpoint that the run goes on from; None where none was written yet.

    Keys in `allow`, and what stands below them, may differ from the checkpoint's. What differs from
    `made_on`, machine and versions, is told.

    Raises:
        InputError: the recipe, data or base of the checkpoint are others, it is beyond the last step, or none verifies.
    """
    damage: list[str] = []
    step = checkpoints.newest(damage.append)
    if step is None:
        if damage:
            damage = [line.removeprefix("warning: checkpoint passed over: ") for line in damage]
            raise InputError(
                f"{folder.path}: cannot be resumed: {'; '.join(damage)} (--overwrite starts again, or choose another"
                " run.output)"
            )
        log("resume: no checkpoint, starting anew")
        return None
    for line in damage:
        log(line)
    before = checkpoints.facts(step)
    changes = changed_keys(_recipe_of(before, folder), recipe)
    differences = [f"{key}: {change}" for key, change in changes.items() if changes_training(key)]
    differences += changed_contents(before, facts)
    # Told only where nothing else explains it.
    differences = differences or changed_tokens(before, facts)
    differences, allowed = _without(differences, allow)
    if step > total_steps:
        differences.append(f"train.max_steps: the run stands at step {step} of now {total_steps}")
    if differences:
        raise InputError(
            f"{folder.path}: cannot be resumed: {'; '.join(differences)}"
            f" ({_ways_out(differences)}--overwrite, or another run.output)"
        )
    for line in allowed:
        log(f"resume: allowed although changed: {line}")
    was = before.get("versions", {}) | before.get("machine", {})
    other = [
        f"{name} {was.get(name)} -> {value}" for name, value in made_on.items() if was.get(name) != value
    ]
    if other:
        log(f"resume: warning: not bit-identical to a run in one piece: {', '.join(other)}")
    log(f"resume: continuing after step {step}")
    return step


def changed_keys(before: Recipe, now: Recipe) -> dict[str, str]:
    """Return key -> `before -> now` for every key where two recipes differ; of two methods the names alone."""
    old, new = _flat(before.resolved()), _flat(now.resolved())
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if "adapter.method" in changed:
        changed = [key for key in changed if key == "adapter.method" or not key.startswith("adapter.")]
    changed = [
        key
        for key in changed
        if key not in _OF_RUNS or _beside(before, old.get(key)) != _beside(now, new.get(key))
    ]
    return {key: f"{old.get(key)!r} -> {new.get(key)!r}" for key in changed}


def _beside(recipe: Recipe, rewards: Any) -> Any:
    """Return rewards with runs beside this one by their names: stages that were moved together are the same."""
    folder = Path(recipe.run.output).parent
    return [
        one | {"run": Path(one["run"]).name} if one["run"] and Path(one["run"]).parent == folder else one
        for one in rewards or ()
    ]


def changes_training(key: str) -> bool:
    """Say whether a change of this key would make a continued run another run."""
    return not (key in MAY_CHANGE or key.partition(".")[0] in _MAY_CHANGE_SECTIONS or _is_source_path(key))


def _is_source_path(key: str) -> bool:
    return key.startswith("data.sources.") and key.endswith(".path")


def _recipe_of(facts: Mapping[str, Any], folder: RunFolder) -> Recipe:
    """Return the recipe that a checkpoint or summary was written under."""
    try:
        return Recipe.model_validate_json(json.dumps(facts["recipe"]))
    except (KeyError, ValidationError):
        raise InputError(
            f"{folder.path}: was written by another version of lora-cli, whose recipe is not readable (--overwrite, or"
            " choose another run.output)"
        ) from None


def _without(lines: Sequence[str], allow: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the lines whose key is not allowed, and those whose key is, by itself or as part of a block."""
    allowed = [line for line in lines if _is_below(_key(line), allow) and not _is_below(_key(line), FIXED)]
    return [line for line in lines if line not in allowed], allowed


def _ways_out(lines: Sequence[str]) -> str:
    fixed = sorted({_key(line) for line in lines if _is_below(_key(line), FIXED)})
    if fixed:
        return f"{', '.join(fixed)}: decides which tensors a checkpoint has, so use the old value; or "
    return "use the old values, --allow KEY, "


def _key(line: str) -> str:
    return line.partition(":")[0]


def _is_below(name: str, keys: Collection[str]) -> bool:
    return any(f"{name}.".startswith(f"{key}.") for key in keys)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
