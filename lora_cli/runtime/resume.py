"""Which keys of a recipe may change between the start of a run and its continuation."""

from __future__ import annotations

from typing import Any

MAY_CHANGE = {
    "data.train",
    "data.eval",
    "model.base",
    "train.epochs",
    "train.max_steps",
    "train.micro_batch_tokens",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.keep_checkpoints",
    "run.output",
    "run.device",
}
"""With more steps the schedule continues as f(step, new total). Data and base are compared by content, not by name.
The other keys do not enter an update (micro-batches do, through the draws of a dropout)."""

NOT_COMPARED = {"data.train", "data.eval", "model.base", "run.output", "run.device", "train.log_every"}
"""Keys in which a finished run may differ from what is asked for; data and base are compared by content."""

_MAY_CHANGE_SECTIONS = ("evaluate", "export")


def changed_keys(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Return key -> `before -> now` for every key in which two resolved recipes differ."""
    old, new = _flat(before), _flat(now)
    return {
        key: f"{old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }


def changes_training(key: str) -> bool:
    """Say whether a change of this key would make a continued run another run."""
    return key not in MAY_CHANGE and key.partition(".")[0] not in _MAY_CHANGE_SECTIONS


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
