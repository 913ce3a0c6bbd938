"""Whether a run is finished, can go on, or must start anew; and which keys of its recipe may change meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lora_cli.errors import InputError
from lora_cli.recipe.dump import dump_recipe
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.schema import Recipe
from lora_cli.runtime.checkpoint import Checkpoints
from lora_cli.runtime.dist import Runtime
from lora_cli.runtime.run_folder import CHECKPOINTS, EXPORTS, RECIPE_FILE, RunFolder

MAY_CHANGE = {
    "data.train",
    "data.eval",
    "model.base",
    "adapter.init_from",
    "train.epochs",
    "train.max_steps",
    "train.micro_batch_tokens",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.keep_checkpoints",
    "adapter.export_rank",
    "run.output",
    "run.device",
}
"""With more steps the schedule continues as f(step, new total). Data, base and the adapter it started from are compared
by content, not by name. The other keys do not enter an update (micro-batches do, through the draws of a dropout)."""

NOT_COMPARED = {
    "data.train",
    "data.eval",
    "model.base",
    "adapter.init_from",
    "run.output",
    "run.device",
    "train.log_every",
}
"""Keys in which a finished run may differ from what is asked for; what a name leads to is compared by content."""

_MAY_CHANGE_SECTIONS = ("evaluate", "export")


def find_finished(
    folder: RunFolder, recipe: Recipe, facts: Mapping[str, str], *, resume: bool
) -> dict[str, Any] | None:
    """Return the summary of a run that is finished as this recipe asks; None where there is something to do.

    Raises:
        InputError: a finished run stands there that differs, and `resume` is not set.
    """
    summary = folder.finished()
    if summary is None:
        return None
    before = load_recipe(folder.path / RECIPE_FILE)
    changes = changed_keys(before.resolved(), recipe.resolved())
    differences = [f"{key}: {change}" for key, change in changes.items() if key not in NOT_COMPARED]
    differences += _other_contents(summary["fingerprints"], facts)
    missing = [EXPORTS[form] for form in recipe.export_formats() if not folder.holds(EXPORTS[form])]
    differences += [f"{name}/ is missing or damaged" for name in missing]
    if not differences:
        return summary
    if resume:
        return None
    other_run = any(map(changes_training, changes)) or any(line.endswith("content") for line in differences)
    goes_on = "" if other_run else "--resume goes on from its last checkpoint, "
    raise InputError(
        f"{folder.path}: holds a finished run that differs: {'; '.join(differences)}"
        f" ({goes_on}--overwrite trains it again, or choose another run.output)"
    )


def method_state(folder: RunFolder, recipe: Recipe) -> dict[str, Tensor] | None:
    """Return the adapter method's tensors of the checkpoint that `begin` will name; None where there is none."""
    checkpoints = Checkpoints(folder.path / CHECKPOINTS, keep=recipe.train.keep_checkpoints)
    step = checkpoints.newest(lambda line: None)  # `begin` tells of damaged ones
    return None if step is None else checkpoints.method_state(step)


def begin(
    folder: RunFolder,
    recipe: Recipe,
    facts: Mapping[str, str],
    total_steps: int,
    rt: Runtime,
    log: Callable[[str], None],
    *,
    resume: bool,
    allow: Sequence[str] = (),
) -> int | None:
    """Make the run folder and lock it; return the step to continue from, or None to start at the beginning.

    Keys in `allow`, and what stands below them, may differ from the checkpoint's.

    Raises:
        InputError: the recipe, data or base of the checkpoint are others, or it is beyond the last step; or another
            process runs in the folder.
    """
    step = None
    if resume:
        checkpoints = Checkpoints(folder.path / CHECKPOINTS, keep=recipe.train.keep_checkpoints)
        step = checkpoints.newest(log)
        if step is not None:
            before = load_recipe(folder.path / RECIPE_FILE)
            changes = changed_keys(before.resolved(), recipe.resolved())
            differences = [f"{key}: {change}" for key, change in changes.items() if changes_training(key)]
            differences += _other_contents(checkpoints.facts(step), facts)
            differences, allowed = _without(differences, allow)
            for line in allowed:
                log(f"resume: allowed although changed: {line}")
            if step > total_steps:
                differences.append(f"train.max_steps: the run stands at step {step} of now {total_steps}")
            if differences:
                raise InputError(
                    f"{folder.path}: cannot be resumed: {'; '.join(differences)}"
                    " (use the old values, --allow KEY, --overwrite, or another run.output)"
                )
        log(f"resume: continuing after step {step}" if step else "resume: no checkpoint, starting anew")
    rt.barrier()  # no process may look for a checkpoint after the main one has begun to write
    rt.in_main(lambda: folder.begin(dump_recipe(recipe), fresh=step is None))
    return step


def changed_keys(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Return key -> `before -> now` for every key where two resolved recipes differ; of two methods the names alone."""
    old, new = _flat(before), _flat(now)
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if "adapter.method" in changed:
        changed = [key for key in changed if key == "adapter.method" or not key.startswith("adapter.")]
    return {key: f"{old.get(key)!r} -> {new.get(key)!r}" for key in changed}


def changes_training(key: str) -> bool:
    """Say whether a change of this key would make a continued run another run."""
    return key not in MAY_CHANGE and key.partition(".")[0] not in _MAY_CHANGE_SECTIONS


def _other_contents(before: Mapping[str, Any], facts: Mapping[str, str]) -> list[str]:
    """Return what is there now with another content, or had one that started the run and has none now."""
    gone = [key for key in ("adapter.init_from",) if key in before and key not in facts]
    changed = [key for key in facts if before.get(key) != facts[key]]
    return [f"{key}: another content" for key in changed + gone]


def _without(lines: Sequence[str], allow: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the lines whose key is not allowed, and those whose key is, by itself or as part of a block."""
    allowed = [
        line for line in lines if any(f"{line.partition(':')[0]}.".startswith(f"{key}.") for key in allow)
    ]
    return [line for line in lines if line not in allowed], allowed


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
