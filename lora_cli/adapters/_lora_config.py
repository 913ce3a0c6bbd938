"""LoRA's part of PEFT's adapter_config.json, from the file to the method's settings and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lora_cli.adapters import _lora_patterns, _peft
from lora_cli.adapters._base import AdapterLinear
from lora_cli.recipe.section import regex_fault

KEYS = frozenset(
    {
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "bias",
        "init_lora_weights",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "eva_config",  # how a start was computed that is in the tensors
        "trainable_token_indices",
    }
)
"""What `read` takes into account."""

START_KEYS: Mapping[str, str] = {
    **dict.fromkeys(("rank", "alpha", "scaling", "bias"), "value"),
    **dict.fromkeys(("targets", "layers", "rank_pattern", "alpha_pattern", "train_also"), "modules"),
}
"""What a recipe's keys have to do with an adapter that a run starts from; see `Method.start_keys`."""

BIASES = {"none": "none", "adapter": "lora_only", "all": "all"}
"""Our names of which biases are trained, and PEFT's."""


def read(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the arguments for the method; variants that are off are left out.

    Raises:
        InputError: a setting is missing, of the wrong type, or not supported.
    """
    _peft.require(
        where,
        config,
        r=("a positive integer", _peft.is_rank(config.get("r"))),
        lora_alpha=("a positive number", _peft.is_number(config.get("lora_alpha"), above=0.0)),
        lora_dropout=("0 to 1", _peft.is_number(config.get("lora_dropout", 0.0), below=1.0)),
        bias=("none, lora_only or all", config.get("bias", "none") in BIASES.values()),
        modules_to_save=(
            "names, and with bias all none",
            _are_names(config.get("modules_to_save"))
            and not (config.get("modules_to_save") and config.get("bias") == "all"),
        ),
        trainable_token_indices=(
            "different tokens, or a list of them for each of some modules",
            _are_tokens(config.get("trainable_token_indices")),
        ),
        init_lora_weights=(
            "a start that leaves the base as it is",
            config.get("init_lora_weights", True) in (True, False, "gaussian", "orthogonal", "eva"),
        ),
        use_rslora=("true or false", isinstance(config.get("use_rslora", False), bool)),
        rank_pattern=(
            "patterns and positive integers",
            _lora_patterns.is_pattern(config.get("rank_pattern"), _peft.is_rank),
        ),
        alpha_pattern=(
            "patterns and positive numbers",
            _lora_patterns.is_pattern(
                config.get("alpha_pattern"), lambda alpha: _peft.is_number(alpha, above=0.0)
            ),
        ),
        layers_to_transform=("a layer or a list of them, and target_modules as a list", _are_layers(config)),
    )
    indices = config.get("layers_to_transform")
    ours = {theirs: name for name, theirs in BIASES.items()}
    variants = {
        "layers": [indices] if isinstance(indices, int) else indices,
        "scaling": "rslora" if config.get("use_rslora") else None,
        "rank_pattern": config.get("rank_pattern"),
        "alpha_pattern": config.get("alpha_pattern"),
        "bias": ours[config["bias"]] if config.get("bias", "none") != "none" else None,
        "train_also": config.get("modules_to_save"),
    }
    return {
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "dropout": config.get("lora_dropout", 0.0),
        "targets": config["target_modules"],
        **{key: value for key, value in variants.items() if value},
    }


def written(
    ranks: tuple[int, Mapping[str, int]],
    alphas: tuple[float, Mapping[str, float]],
    layers: Mapping[str, AdapterLinear],
    times: int,
    rslora: bool,
) -> dict[str, Any]:
    """Return PEFT's keys for ranks and alphas, each with its pattern; a whole alpha is written as an integer.

    `times` is how many times the rank the layers have on disk; alpha is raised so that the scale stays.
    """
    raised = math.sqrt(times) if rslora else times
    by_layer = [_lora_patterns.lasting(pattern, list(layers)) for _, pattern in (ranks, alphas)]
    return {
        "r": ranks[0] * times,
        "lora_alpha": whole(alphas[0] * raised),
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in layers.values()),
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": rslora,
        "rank_pattern": {key: rank * times for key, rank in by_layer[0].items()},
        "alpha_pattern": {key: whole(alpha * raised) for key, alpha in by_layer[1].items()},
        "layers_to_transform": None,  # target_modules names exactly the adapted layers
        "layers_pattern": None,
    }


def layer_names(config: Mapping[str, Any]) -> list[str]:
    """Return the names that stand before the number of a decoder layer; none: any name may."""
    names = config.get("layers_pattern") or []
    return [names] if isinstance(names, str) else list(names)


def whole(alpha: float) -> float:
    """Return a whole number as an integer, as older readers of the format expect."""
    return int(alpha) if alpha == int(alpha) else alpha


def _are_names(value: object) -> bool:
    return value is None or (
        isinstance(value, list) and all(isinstance(name, str) and name for name in value)
    )


def _are_tokens(value: object) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(_are_tokens(ids) and ids for ids in value.values())
    return value is None or (
        isinstance(value, list) and all(map(_peft.is_integer, value)) and len({*value}) == len(value)
    )


def _are_layers(config: Mapping[str, Any]) -> bool:
    """Say whether the choice of layers is one that PEFT takes."""
    indices, names = config.get("layers_to_transform"), config.get("layers_pattern")
    if not indices and not _peft.is_integer(indices):
        return not names
    listed = indices if isinstance(indices, list) else [indices]
    known = names is None or (
        isinstance(names, str | list)
        and all(isinstance(name, str) and regex_fault(name) is None for name in layer_names(config))
    )
    return isinstance(config["target_modules"], list) and known and all(map(_peft.is_integer, listed))
