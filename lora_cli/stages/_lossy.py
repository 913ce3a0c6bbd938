"""What an adapter that is written in another form than it was trained in loses: refused, told and kept as figures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from lora_cli.adapters import Method, _portable
from lora_cli.errors import GateError

ROUNDING = 1e-5
"""Relative error of an update up to which it is called exact: what float32 factors of a wide update have."""


def require_near(errors: Mapping[str, float], rank: int, limit: float | None, merge_with: str) -> None:
    """Refuse a portable adapter that misses more than `limit` of a layer's update; None: any is good enough.

    Raises:
        GateError: with the layer, and with `merge_with`, the command that loses nothing.
    """
    worst, error = _worst(errors)
    if limit is not None and not error <= limit:
        raise GateError(
            f"export.max_portable_error: at rank {rank} the portable adapter misses {error:.2g} of the update of"
            f" {worst}, above {limit:g} (nothing was published; merge it instead: {merge_with}; or raise"
            " export.portable_rank)"
        )


def figures(rank: int, errors: Mapping[str, float], from_live: float) -> dict[str, Any]:
    """Return what summary.json keeps of a portable adapter; errors are relative, in the Frobenius norm."""
    worst, error = _worst(errors)
    return {
        "rank": rank,
        "mean_error": sum(errors.values()) / len(errors),
        "worst_error": error,
        "worst_layer": worst,
        "max_logit_difference_from_live": from_live,
        "errors": dict(errors),
    }


def describe(
    form: str, written: Method, errors: Mapping[str, float], from_live: float, dtype: torch.dtype
) -> list[str]:
    """Say in lines what an adapter stands for and how far it is from it; logits differ by rounding as well."""
    worst, error = _worst(errors)
    rank: int = written.disk_config()["r"]
    exact = form == "portable" and error <= ROUNDING
    told = f"exact up to float32 rounding (relative error at most {error:.1e})"
    if not exact:
        mean = sum(errors.values()) / len(errors)
        told = f"relative error {mean:.1e} in the mean, {error:.1e} at worst ({worst})"
    kind = str(dtype).removeprefix("torch.")
    lines = [
        f"The update is written as {written.peft_type} of rank {rank}: {told}; logits, in {kind}, differ from the"
        f" trained model's by at most {from_live:.1e}"
    ]
    if not exact and error > 0:
        lines += _by_kind(errors)
    if form == "portable":
        flag = next((allowed for allowed in _portable.RANKS if allowed >= rank), None)
        lines.append(
            f"vLLM reads it with --max-lora-rank {flag}" if flag else f"vLLM reads no rank of {rank}"
        )
        if any(layer.fan_in_fan_out for layer in written.layers.values()):
            lines.append("Not for llama.cpp: its converter transposes what adapts a Conv1D layer")
    return lines


def _by_kind(errors: Mapping[str, float]) -> list[str]:
    """Return each layer's error, a line for each kind of layer, in the model's order."""
    kinds: dict[str, list[str]] = {}
    for path, error in errors.items():
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", path), []).append(f"{error:.1e}")
    return [f"Relative error of {kind}: {' '.join(values)}" for kind, values in kinds.items()]


def _worst(errors: Mapping[str, float]) -> tuple[str, float]:
    return max(errors.items(), key=lambda item: item[1])
