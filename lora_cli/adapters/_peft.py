"""PEFT's disk format, written so that PEFT reads it, and read so that nothing is guessed.

    adapter_config.json            the method's settings
    adapter_model.safetensors      base_model.model.<module path>.<tensor name>

PEFT itself only warns about missing or unexpected tensors and then runs with a partly random adapter. Here every
tensor must belong to a layer of the model, every layer must have its tensors, and every setting that we do not
implement must be neutral; anything else is refused. `base_model_name_or_path` is written for PEFT and never followed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from lora_cli.adapters._base import AdapterLinear, Method, linear_layers, match_targets
from lora_cli.adapters.lora import Lora
from lora_cli.errors import InputError

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

_DESCRIPTIVE = {
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",  # follows from the model's own layers
    "inference_mode",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",  # means something only with use_qalora, which must be off
    "revision",
    "task_type",
}
_IMPLEMENTED = {"r", "lora_alpha", "lora_dropout", "target_modules", "bias", "init_lora_weights"}
_NEUTRAL: tuple[object, ...] = (None, False, "none", {}, [])


def write(folder: Path, method: Method, *, base_name: str, revision: str | None) -> None:
    """Write the injected method's config and tensors into an existing folder."""
    config = {
        **method.disk_config(),
        "base_model_name_or_path": base_name,
        "revision": revision,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "auto_mapping": None,
    }
    text = json.dumps(dict(sorted(config.items())), indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    tensors = {
        f"{PREFIX}{path}.{name}": tensor.detach().cpu().contiguous()
        for path, layer in method.layers.items()
        for name, tensor in layer.disk_tensors().items()
    }
    save_file(tensors, folder / TENSOR_FILE, metadata={"format": "pt"})


def read_config(folder: Path) -> dict[str, Any]:
    """Return the settings of an adapter folder.

    Raises:
        InputError: the file is missing or malformed, names another method, or holds a setting that is not supported.
    """
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file (is this a PEFT adapter folder?)") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise InputError(f"{path}: peft_type is {found!r} (only LORA can be read)")
    problems = [
        f"{path}: {key} is {value!r}, which is not supported"
        for key, value in config.items()
        if key not in _DESCRIPTIVE | _IMPLEMENTED and value not in _NEUTRAL
    ]
    problems += [
        f"{path}: {key} is {config.get(key)!r} ({rule})"
        for key, rule, valid in (
            ("r", "expected a positive integer", _is_integer(config.get("r")) and config["r"] > 0),
            ("lora_alpha", "expected a positive number", _is_number(config.get("lora_alpha"), above=0)),
            ("lora_dropout", "expected 0 to 1", _is_number(config.get("lora_dropout", 0.0), below=1)),
            ("bias", "only none is supported", config.get("bias", "none") == "none"),
            (
                "init_lora_weights",
                "this initialisation changes the base weights",
                config.get("init_lora_weights", True) in (True, False, "gaussian"),
            ),
            ("target_modules", "expected names or a pattern", _are_targets(config.get("target_modules"))),
        )
        if not valid
    ]
    if problems:
        raise InputError(problems)
    return config


def load(folder: Path, model: PreTrainedModel) -> Method:
    """Inject the adapter in `folder` into `model` and return its method.

    Raises:
        InputError: the folder is not a readable adapter, or does not fit this model exactly.
    """
    method = Lora.from_disk_config(read_config(folder))
    tensors = _read_tensors(folder)
    paths = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors}
    strangers = sorted(paths - linear_layers(model).keys())
    if strangers:
        raise InputError(
            f"{folder}: the adapter does not fit this base model, which has no layer {strangers[0]!r}"
            f" ({len(strangers)} of {len(paths)} are not there; was it trained on another base?)"
        )
    expected = set(match_targets(model, method.targets, where=f"{folder / CONFIG_FILE}: target_modules"))
    if paths != expected:
        some = sorted(paths ^ expected)
        lack = (
            "names a layer without tensors" if some[0] in expected else "does not name a layer with tensors"
        )
        raise InputError(
            f"{folder / CONFIG_FILE}: target_modules {lack}: {some[0]} ({len(some)} such layers)"
        )
    method.inject(model)
    fill(folder, method.layers, tensors)
    return method


def fill(
    folder: Path, layers: Mapping[str, AdapterLinear], tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Copy the tensors of an adapter folder into injected layers; names and shapes must agree exactly.

    Raises:
        InputError: a tensor is missing, unexpected, of another shape, or not finite.
    """
    tensors = _read_tensors(folder) if tensors is None else tensors
    places = {
        f"{PREFIX}{path}.{name}": place
        for path, layer in layers.items()
        for name, place in layer.disk_tensors().items()
    }
    problems = [f"{folder}: tensor {name} is missing" for name in sorted(places.keys() - tensors.keys())]
    problems += [f"{folder}: tensor {name} is unexpected" for name in sorted(tensors.keys() - places.keys())]
    for name in sorted(places.keys() & tensors.keys()):
        if tensors[name].shape != places[name].shape:
            found, wanted = tuple(tensors[name].shape), tuple(places[name].shape)
            problems.append(f"{folder}: tensor {name} has shape {found}, but the layer needs {wanted}")
        elif not bool(torch.isfinite(tensors[name]).all()):
            problems.append(f"{folder}: tensor {name} holds values that are not finite")
    if problems:
        raise InputError(
            problems[:5] + ([f"{folder}: and {len(problems) - 5} more"] if len(problems) > 5 else [])
        )
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(tensors[name])


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / TENSOR_FILE
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file (only safetensors adapters are read)") from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object, *, above: float = -1e-30, below: float = float("inf")) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and above < value < below


def _are_targets(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(name, str) for name in value)
    return isinstance(value, str)
