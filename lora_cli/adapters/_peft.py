"""PEFT's disk format, written so that PEFT reads it, and read so that nothing is guessed.

    adapter_config.json            the method's settings
    adapter_model.safetensors      base_model.model.<module path>.<tensor name>

PEFT itself only warns about missing or unexpected tensors and then runs with a partly random adapter. Here every
tensor must belong to a layer of the model, every layer must have its tensors, and every setting that we do not
implement must be neutral; anything else is refused. `base_model_name_or_path` is written for PEFT and never followed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from lora_cli.adapters._base import Method
from lora_cli.errors import InputError
from lora_cli.models import score_head
from lora_cli.models.nf4 import QuantizedLinear
from lora_cli.models.tensor_files import save_tensors
from lora_cli.models.weight_files import read_json
from lora_cli.redaction import redacted

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
CLASSIFIER = "SEQ_CLS"
"""PEFT's task of a reward model, of which it adds both names to what is trained whole."""
_HEADS = ("classifier", "score")

_DESCRIPTIVE = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "fan_in_fan_out",  # follows from the model's own layers
        "inference_mode",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",  # means something only with use_qalora, which must be off
        "revision",
        "target_modules",
        "task_type",
    }
)
_RANKED = re.compile(r"\.(lora_A|lora_embedding_A|lora_E|vera_lambda_d)\b")
"""Tensors whose first dimension is the rank."""
_NEUTRAL: tuple[object, ...] = (None, False, "none", {}, [])


def write(
    folder: Path, method: Method, *, base_name: str, revision: str | None, score: Tensor | None = None
) -> None:
    """Write the injected method's config and tensors into an existing folder, and a reward model's head (1, H).

    Raises:
        DivergedError: a tensor is not finite.
        OSError: the disk refuses it.
    """
    config = {
        **method.disk_config(),
        "peft_type": method.peft_type,
        "target_modules": method.disk_targets,
        "base_model_name_or_path": redacted(base_name),
        "revision": revision,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "auto_mapping": None,
    }
    tensors = places(method)
    if score is not None:
        config |= {
            "task_type": CLASSIFIER,
            "modules_to_save": [*(config.get("modules_to_save") or []), "score"],
        }
        tensors[PREFIX + score_head.NAME] = score
    text = json.dumps(dict(sorted(config.items())), indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    save_tensors(tensors, folder / TENSOR_FILE, metadata={"format": "pt"})


def places(method: Method) -> dict[str, Tensor]:
    """Return every tensor of the injected method by its whole name on disk."""
    own = {
        f"{PREFIX}{path}.{name}": tensor
        for path, placed in method.placed().items()
        for name, tensor in placed.disk_tensors().items()
    }
    for path, layer in method.layers.items():
        if layer.bias is not None:
            own[f"{PREFIX}{path}.base_layer.bias"] = layer.bias
    return own | method.shared_disk_tensors()


def read_config(folder: Path) -> dict[str, Any]:
    """Return the settings of an adapter folder, whatever its method; without the head of a reward model.

    Raises:
        InputError: the file is missing or malformed, or does not say which layers it adapts.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        raise InputError(f"{path}: no such file (is this a PEFT adapter folder?)")
    config = read_json(path)
    targets = config.get("target_modules")
    if not (isinstance(targets, str) or _are_names(targets)):
        raise InputError(f"{path}: target_modules is {_shown(targets)} (expected names or a pattern)")
    saved = config.get("modules_to_save")
    if config.get("task_type") == CLASSIFIER and isinstance(saved, list):
        config["modules_to_save"] = [name for name in saved if name not in _HEADS] or None
    return config


def require_neutral(where: str, config: Mapping[str, Any], known: frozenset[str]) -> None:
    """Refuse every setting outside `known` that changes anything.

    Raises:
        InputError: with one line per such setting.
    """
    problems = [
        f"{where}: {key} is {_shown(value)}, which is not supported"
        for key, value in config.items()
        if key not in _DESCRIPTIVE | known and value not in _NEUTRAL
    ]
    if problems:
        raise InputError(problems)


def require(where: str, config: Mapping[str, Any], **rules: tuple[str, bool]) -> None:
    """Refuse settings that break their rule; a rule is what is expected, and whether it is so.

    Raises:
        InputError: with one line per broken rule.
    """
    problems = [
        f"{where}: {key} is {_shown(config.get(key))} (expected {expected})"
        for key, (expected, holds) in rules.items()
        if not holds
    ]
    if problems:
        raise InputError(problems)


def is_integer(value: object, *, least: int = 0, most: int = 2**63 - 1) -> bool:
    """Say whether a JSON value is an integer from `least` to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_rank(value: object) -> bool:
    """Say whether a JSON value is a rank, from 1 to 65,536: a larger one would fill the memory before it is refused."""
    return is_integer(value, least=1, most=65_536)


def is_number(value: object, *, above: float = -1e-30, below: float = float("inf")) -> bool:
    """Say whether a JSON value is a number between the bounds, which are not part of it."""
    return isinstance(value, int | float) and not isinstance(value, bool) and above < value < below


def method_of(kind: type[Method], config: Mapping[str, Any], folder: Path, **changes: Any) -> Method:
    """Return the method that the settings of `folder` describe, but for `changes`, ready to inject.

    Raises:
        InputError: a setting is missing, of the wrong type, or not supported.
    """
    where = str(folder / CONFIG_FILE)
    _require_stored_rank(folder, config)
    require_neutral(where, config, kind.disk_keys)
    method = kind.from_disk_config(config, where, **changes)
    method.targets_key = f"{where}: target_modules"
    return method


def _require_stored_rank(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse ranks far beyond those of the stored tensors, before memory is taken for them.

    Raises:
        InputError: a rank is more than 8 times (AdaLoRA's start may be larger than what is left of it) what is stored.
    """
    pattern = config.get("rank_pattern")
    ranks = [config.get(key) for key in ("r", "init_r", "target_r")]
    ranks += pattern.values() if isinstance(pattern, dict) else []
    highest = max((rank for rank in ranks if isinstance(rank, int)), default=0)
    path = folder / TENSOR_FILE
    try:
        with safe_open(path, framework="pt") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys() if _RANKED.search(name)]  # noqa: SIM118
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file (only safetensors adapters are read)") from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error
    stored = max((shape[0] for shape in shapes if shape), default=0)
    if highest > 8 * stored:
        raise InputError(
            f"{folder / CONFIG_FILE}: rank {highest}, but the tensors of {TENSOR_FILE} have {stored} (are the two files"
            " of one adapter?)"
        )


def fill(folder: Path, method: Method) -> None:
    """Copy the tensors of an adapter folder into the injected method; names and shapes must agree exactly.

    Raises:
        InputError: a tensor is missing, unexpected, of another shape, or not finite.
    """
    tensors, wanted = _read_tensors(folder), places(method)
    if read_json(folder / CONFIG_FILE).get("task_type") == CLASSIFIER:
        tensors.pop(PREFIX + score_head.NAME, None)  # no part of the method: `score_head.read_weight`
    _drop_base_weights(folder, method, tensors)
    missing, unexpected = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or unexpected:
        parts = [f"missing tensors: {len(missing)}, first {missing[0]}"] if missing else []
        parts += [f"unexpected tensors: {len(unexpected)}, first {unexpected[0]}"] if unexpected else []
        raise InputError(
            f"{folder}: the adapter does not fit this base model: {'; '.join(parts)} (was it trained on another one?)"
        )
    problems = []
    for name, place in wanted.items():
        if tensors[name].shape != place.shape:
            found, needed = tuple(tensors[name].shape), tuple(place.shape)
            problems.append(f"{folder}: tensor {name} has shape {found}, but the layer needs {needed}")
        elif not tensors[name].is_floating_point():
            problems.append(
                f"{folder}: tensor {name} holds {tensors[name].dtype}, not floating-point numbers"
            )
        elif not bool(torch.isfinite(tensors[name]).all()):
            problems.append(f"{folder}: tensor {name} holds values that are not finite")
    if problems:
        raise InputError(
            problems[:5] + ([f"{folder}: and {len(problems) - 5} more"] if len(problems) > 5 else [])
        )
    with torch.no_grad():
        for name, place in wanted.items():
            place.copy_(tensors[name])


def _drop_base_weights(folder: Path, method: Method, tensors: dict[str, Tensor]) -> None:
    """Drop the base weights that PEFT stores with the adapter of an embedding or a head.

    Raises:
        InputError: one is not the base's, to the precision of the coarser of both types.
    """
    for path, layer in method.layers.items():
        name = f"{PREFIX}{path}.base_layer.weight"
        if name not in tensors or isinstance(layer.base, QuantizedLinear):
            continue
        stored, own = tensors.pop(name), layer.base.weight.detach().cpu()
        if stored.shape != own.shape or not (
            torch.equal(stored.to(own.dtype), own) or torch.equal(own.to(stored.dtype), stored)
        ):
            raise InputError(
                f"{folder}: holds a weight of {path} that is not the base's (was it trained on another one, or on one"
                " whose vocabulary was resized?)"
            )


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / TENSOR_FILE
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file (only safetensors adapters are read)") from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error
    return tensors


def _shown(value: object) -> str:
    """Return a value of a file that somebody else wrote, short enough for one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _are_names(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)
