"""Which keys of a recipe may change between the start of a run and its continuation."""

from __future__ import annotations

from typing import Any

MAY_CHANGE = {
    "train.epochs",
    "train.max_steps",
    "train.micro_batch_tokens",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.early_stopping",
    "train.final_weights",
    "run.output",
    "run.device",
}
"""With more steps the schedule continues as f(step, new total); the other keys do not enter an update."""

_MAY_CHANGE_SECTIONS = ("evaluate", "export")


def changed_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return `key: before -> now` for every changed key of a resolved recipe that would change the training."""
    old, new = _flat(before), _flat(now)
    changes = []
    for key in sorted(old.keys() | new.keys()):
        if key in MAY_CHANGE or key.split(".")[0] in _MAY_CHANGE_SECTIONS:
            continue
        if old.get(key) != new.get(key):
            changes.append(f"{key}: {old.get(key)!r} -> {new.get(key)!r}")
    return changes


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
