"""AdaLoRA's part of PEFT's adapter_config.json, from the file to the method's settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_cli.adapters import _peft

KEYS = frozenset(
    "r init_r target_r lora_alpha lora_dropout target_modules bias init_lora_weights total_step tinit tfinal"
    " deltaT beta1 beta2 orth_reg_weight rank_pattern".split()
)
"""What `read` and the method take into account."""

START_KEYS: Mapping[str, str] = {
    "initial_rank": "value",
    "target_rank": "free",  # part of the schedule, but a rank that was reached should not rise unasked
    "alpha": "value",
    "targets": "modules",
}
"""What a recipe's keys have to do with an adapter that a run starts from; see `Method.start_keys`."""


def read(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the arguments for the method; the schedule and the rank pattern are no arguments.

    Raises:
        InputError: a setting is missing, of the wrong type, or not supported.
    """
    pattern = config.get("rank_pattern")
    rules = {
        name: (f"an integer of at least {least}", _peft.is_integer(config.get(name), least=least))
        for name, least in (
            ("target_r", 0), ("total_step", 1), ("tinit", 0), ("tfinal", 0), ("deltaT", 1)
        )
    }  # fmt: skip
    for beta in ("beta1", "beta2"):
        rules[beta] = ("between 0 and 1", _peft.is_number(config.get(beta), above=0.0, below=1.0))
    _peft.require(
        where,
        config,
        lora_alpha=("a positive number", _peft.is_number(config.get("lora_alpha"), above=0.0)),
        lora_dropout=("0 to 1", _peft.is_number(config.get("lora_dropout", 0.0), below=1.0)),
        orth_reg_weight=("at least 0", _peft.is_number(config.get("orth_reg_weight"))),
        bias=("none", config.get("bias", "none") == "none"),
        init_lora_weights=("true or false", isinstance(config.get("init_lora_weights", True), bool)),
        rank_pattern=("lists of init_r true or false", _is_rank_pattern(pattern, config.get("init_r"))),
        init_r=("an integer from 1 to 65536", _peft.is_rank(config.get("init_r"))),
        **rules,
    )
    return {
        "initial_rank": config["init_r"],
        "target_rank": config["target_r"],
        "alpha": config["lora_alpha"],
        "dropout": config.get("lora_dropout", 0.0),
        "targets": config["target_modules"],
        "beta1": config["beta1"],
        "beta2": config["beta2"],
        "orthogonal_weight": config["orth_reg_weight"],
    }


def _is_rank_pattern(pattern: object, rank: object) -> bool:
    """Say whether a JSON value is a list of `rank` booleans for each of some `lora_E`, or null."""
    return pattern is None or (
        isinstance(pattern, dict)
        and all(name.endswith(".lora_E") and isinstance(rows, list) for name, rows in pattern.items())
        and all(len(rows) == rank for rows in pattern.values())
        and all(isinstance(row, bool) for rows in pattern.values() for row in rows)
    )
