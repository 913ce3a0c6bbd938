"""A base loaded tensor by tensor, its linear layers quantized as they come: it never stands whole in full precision.

The model is built with its parameters on the meta device and its buffers real, so that what is computed at
construction and not stored (rotary frequencies, float32) is right. Then each stored tensor is read by itself, through
a mapping of its own: pages of a mapped file count as the process's memory until the mapping is closed.

A stored tensor must be one of the model's, under its name, with or without the prefix of the inner model, or under an
older name of it. Where transformers would have to join or change stored tensors (the experts of a mixture, say), the
base is refused rather than guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, WeightTransform
from transformers.pytorch_utils import Conv1D

from lora_cli.errors import InputError
from lora_cli.models import remote_code
from lora_cli.models.library_faults import reading
from lora_cli.models.nf4 import Quantization, QuantizedLinear, quantizable
from lora_cli.models.weight_files import stored_names


def load_quantized(
    folder: Path,
    quantization: Quantization,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: str | None,
) -> PreTrainedModel:
    """Return the folder's model with quantized linear layers, all else in `dtype`, on `device`.

    Raises:
        InputError: its tensors cannot be placed name for name, one is missing, misshapen or not finite, or the files
            are quantized already.
    """
    model = _skeleton(folder, dtype, attention)
    places = _places(folder, model)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    aliases = _aliases(model)
    linears = quantizable(model)
    if not linears:
        kind = model.config.model_type
        raise InputError(
            f"{folder}: none of its linear layers can be quantized: {kind} has its own kind of them"
        )
    for path, linear in linears.items():
        layer = QuantizedLinear.shaped_like(linear, quantization, dtype=dtype, device=device)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    placed: set[str] = set()
    for name, (file, stored) in places.items():
        tensor = _read(file, stored)
        if tensor.shape != shapes[name]:
            raise InputError(
                f"{file}: tensor {stored} has shape {tuple(tensor.shape)}, the model needs {tuple(shapes[name])}"
            )
        first = next(iter(aliases[name] & placed), None)
        if first is not None and not torch.equal(_get(model, first), tensor.to(device, dtype)):
            raise InputError(
                f"{file}: {stored} differs from {first}, but config.json ties them (untie it there)"
            )
        if first is None:
            _place(
                model, aliases[name], tensor.to(device), _dtype_of(model, name, dtype), f"{file}: {stored}"
            )
        placed.add(name)
    return model.to(device).eval()  # type: ignore[arg-type]


class FullWeights:
    """The weights of a base's linear layers as its files hold them, one at a time: for what a quantized base lacks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = _skeleton(folder, torch.float32, None)
        self._places, self._aliases = _places(folder, self.model), _aliases(self.model)

    def read(self, path: str) -> Tensor:
        """Return the weight (out, in) of the layer at `path`, in the type of the file.

        Raises:
            InputError: it cannot be read.
        """
        names = self._aliases[f"{path}.weight"] & self._places.keys()
        tensor = _read(*self._places[names.pop()])
        return tensor.T if isinstance(self.model.get_submodule(path), Conv1D) else tensor


def _skeleton(folder: Path, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    runs_code = remote_code.may_run(folder)
    with reading(folder, "the model cannot be loaded"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=runs_code)
        if getattr(config, "quantization_config", None) is not None:
            raise InputError(
                f"{folder}: is quantized already (give the full-precision base, or model.quantize: none)"
            )
        with _parameters_on_meta():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=runs_code
            )
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    model.config.name_or_path = str(folder)
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within it each parameter loses its memory when it is given to a module; memory not yet touched costs nothing."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.data.to("meta"), requires_grad=param.requires_grad)
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _places(folder: Path, model: PreTrainedModel) -> dict[str, tuple[Path, str]]:
    """Return for each stored tensor of the model its name there, its file, and its name in the file, in file order.

    Raises:
        InputError: a tensor of the model is not stored under its own name.
    """
    stored = stored_names(folder)
    transforms = get_model_conversion_mapping(model, add_legacy=False)
    own_names = {name: _renamed(name, transforms, folder) for name in stored}
    own, prefix = model.state_dict().keys(), f"{model.base_model_prefix}."
    places: dict[str, tuple[Path, str]] = {}
    for name, file in stored.items():
        renamed = own_names[name]
        candidates = (renamed, prefix + renamed, renamed.removeprefix(prefix))
        found = next((candidate for candidate in candidates if candidate in own), None)
        if found is not None:
            places[found] = (folder / file, name)
    # A tied head is stored once, under either name.
    missing = sorted(name for name, alike in _aliases(model).items() if not alike & places.keys())
    if missing:
        raise InputError(f"{folder}: {len(missing)} weights are missing, first {missing[0]}")
    return places


def _renamed(name: str, transforms: list[WeightTransform], folder: Path) -> str:
    """Return a stored name as transformers renames it one to one.

    Raises:
        InputError: it would do more to the tensor than rename it.
    """
    for transform in transforms:
        if type(transform) is WeightRenaming:
            name, _ = transform.rename_source_key(name)
        elif transform.compiled_sources.search(name):
            raise InputError(
                f"{folder}: {name} must be joined with others or changed to fit the model, which"
                " quantizing tensor by tensor cannot do (use model.quantize: none)"
            )
    return name


def _aliases(model: PreTrainedModel) -> dict[str, set[str]]:
    """Return for each stored name of the model all names of the same tensor, its own among them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    groups: dict[int, set[str]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(id(parameter), set()).add(name)
    return {
        name: groups[id(parameters[name])] if name in parameters else {name} for name in model.state_dict()
    }


def _read(file: Path, name: str) -> Tensor:
    try:
        with safe_open(file, framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: tensor {name} cannot be read ({error})") from error
    return tensor


def _dtype_of(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the type of one tensor: `dtype`, but float32 for modules that the model keeps so."""
    kept = model._keep_in_fp32_modules_strict or ()
    return torch.float32 if any(re.search(rf"(^|\.){part}(\.|$)", name) for part in kept) else dtype


def _get(model: PreTrainedModel, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), leaf)
    return tensor


def _place(model: PreTrainedModel, names: set[str], tensor: Tensor, dtype: torch.dtype, where: str) -> None:
    """Put a tensor at each of its names: quantized, as a buffer, or as one frozen-to-be parameter."""
    parameter: nn.Parameter | None = None
    for name in sorted(names):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, QuantizedLinear) and leaf == "weight":
            module.store(tensor.T if module.conv1d else tensor)
            scales = module.scales if module.scales_mean is None else module.scales_mean
            if not bool(torch.isfinite(scales).all()):
                raise InputError(f"{where}: holds values that are not finite")
        elif isinstance(module, QuantizedLinear):
            module.bias = tensor.to(dtype, copy=True)
        elif leaf in module._buffers:
            buffer = module._buffers[leaf]
            module._buffers[leaf] = tensor.to(buffer.dtype if buffer is not None else dtype, copy=True)
        else:
            # A copy, since the tensor read is a view of the mapped file.
            parameter = nn.Parameter(tensor.to(dtype, copy=True)) if parameter is None else parameter
            module._parameters[leaf] = parameter
