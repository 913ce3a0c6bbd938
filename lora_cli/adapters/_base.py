"""What every adapter method shares: the wrapped linear layer, merging, and the choice of layers.

    before                      after
    q_proj: nn.Linear           q_proj: AdapterLinear
                                  .base: nn.Linear, frozen
                                  .lora_A, .lora_B, ...: float32, trained

Shapes: `in`, `out` are the layer's features; weights are (out, in) whatever the base stores (GPT-2's Conv1D stores
(in, out)).
"""

from __future__ import annotations

import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters._whole import TrainedModule
from lora_cli.errors import InputError
from lora_cli.types import Progress

BASE_LINEARS = (nn.Linear, Conv1D)

# Path components that name a block of each kind, in the transformers model code of the decoder families.
GROUPS = {
    "attention": {"self_attn", "attn", "attention", "self_attention"},
    "mlp": {"mlp", "feed_forward", "ffn", "block_sparse_moe", "fc1", "fc2"},
}


class AdapterLinear(nn.Module, ABC):
    """A frozen linear layer with an update beside it: (..., in) -> (..., out)."""

    base: nn.Linear | Conv1D

    def __init__(self, base: nn.Linear | Conv1D) -> None:
        super().__init__()
        self.base = base
        self.enabled = True
        """False: the layer computes exactly what the base does."""
        self.bias: nn.Parameter | None = None
        """Trained in place of the base's own where `train_bias` was called, (out,) float32."""
        self._unmerged: Tensor | None = None
        self._unmerged_bias: Tensor | None = None
        transposed = isinstance(base, Conv1D)
        self.in_features, self.out_features = base.weight.shape if transposed else base.weight.shape[::-1]

    @property
    def merged(self) -> bool:
        """True while the update stands in the base weight."""
        return self._unmerged is not None

    def forward(self, x: Tensor) -> Tensor:
        """Apply base and update: (..., in) -> (..., out)."""
        y: Tensor = self.base(x)
        if not self.enabled or self.merged:
            return y
        y = self.adapt(x, y)
        return y if self.bias is None else y + (self.bias - self.base.bias.float()).to(y.dtype)

    def train_bias(self) -> bool:
        """Train a copy of the base's bias, and return whether it has one."""
        if self.base.bias is not None:
            self.bias = nn.Parameter(self.base.bias.detach().float().clone())
        return self.bias is not None

    @abstractmethod
    def adapt(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the adapted output from the input (..., in) and the base's output (..., out)."""

    @abstractmethod
    def merged_weight(self) -> Tensor:
        """Return base weight and update as one matrix, (out, in) float32; stated apart from `adapt` on purpose."""

    @abstractmethod
    def disk_tensors(self) -> dict[str, Tensor]:
        """Return the trained tensors by their PEFT names, relative to the layer."""

    def base_weight(self) -> Tensor:
        """Return the base's own weight as (out, in), in the base's dtype, without an update merged into it."""
        weight = self.base.weight if self._unmerged is None else self._unmerged
        return weight.T if isinstance(self.base, Conv1D) else weight

    @torch.no_grad()
    def merge(self) -> None:
        """Put the update into the base weight, rounded once to its dtype; the old weight is kept for `unmerge`."""
        assert not self.merged
        weight = self.merged_weight()
        self._unmerged = self.base.weight.detach().clone()
        if self.bias is not None:
            self._unmerged_bias = self.base.bias.detach().clone()
            self.base.bias.copy_(self.bias)
        self.base.weight.copy_(weight.T if isinstance(self.base, Conv1D) else weight)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base weight bit for bit."""
        assert self._unmerged is not None
        self.base.weight.copy_(self._unmerged)
        self._unmerged = None
        if self._unmerged_bias is not None:
            self.base.bias.copy_(self._unmerged_bias)
            self._unmerged_bias = None


class OptimizerState(Protocol):
    """The optimizer, as far as a method may reach into it."""

    masters: dict[str, Tensor]
    """The float32 weights that are updated, by the names of `Method.trainable`; `.grad` is the step's gradient."""

    def moments(self, name: str) -> dict[str, Tensor]:
        """Return AdamW's `exp_avg` and `exp_avg_sq` of a weight, to change in place; empty before its first step."""


class Method:
    """One way to adapt a model. Holds its settings and, after `inject`, the layers it made.

    A method of layers states `make_layer` and its part of the disk format; what it does not need has a default here.
    """

    targets: str | list[str] = "all-linear"
    targets_key: str = "adapter.targets"
    """Where the targets were written, for messages."""
    layers: dict[str, AdapterLinear]

    peft_type: ClassVar[str] = ""
    """PEFT's name of the method in adapter_config.json; empty where PEFT has none."""
    disk_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys of adapter_config.json that `from_disk_config` takes into account; all others must be neutral."""

    def __init__(self) -> None:
        self.layers = {}
        self.whole: dict[str, TrainedModule] = {}
        """Modules trained in place of the base's, by path."""
        self.disk_targets: list[str] = []
        """The shortest `target_modules` that names exactly the injected layers."""

    def plan(self, total_steps: int) -> None:
        """Learn how many steps the run has, before anything is written.

        Raises:
            InputError: a schedule of the method's own does not fit into them.
        """

    def inject(self, model: PreTrainedModel) -> dict[str, AdapterLinear]:
        """Freeze the base, put a layer around each target, and return the layers by module path.

        Raises:
            InputError: a target matches no linear layer.
        """
        model.requires_grad_(False)
        paths = self.target_paths(model)
        self.disk_targets = short_names(model, paths)
        for path in paths:
            base = model.get_submodule(path)
            assert isinstance(base, BASE_LINEARS)
            self.layers[path] = self.make_layer(path, base)
            replace_module(model, path, self.layers[path])
        return self.layers

    def target_paths(self, model: PreTrainedModel) -> list[str]:
        """Return the paths of the linear layers that get an adapter, in the model's order.

        Raises:
            InputError: a target matches no linear layer.
        """
        return match_targets(model, self.targets, where=self.targets_key)

    def make_layer(self, path: str, base: nn.Linear | Conv1D) -> AdapterLinear:
        """Return the initialised layer for the base at `path`."""
        raise AssertionError(f"{type(self).__name__} makes no layers")

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters the optimizer updates, `<module>.<tensor>`."""
        found = {
            id(parameter): (f"{path}.{name}", parameter)
            for path, placed in reversed(self.placed().items())
            for name, parameter in placed.named_parameters(recurse=False)
            if parameter.requires_grad
        }
        return dict(reversed(found.values()))  # what tied modules share is there once, under its first name

    def placed(self) -> dict[str, AdapterLinear | TrainedModule]:
        """Return all that `inject` put into the model, by path."""
        return {**self.layers, **self.whole}

    def rate_factor(self, name: str) -> float:
        """Return the factor of the learning rate for one parameter of `trainable`."""
        del name
        return 1.0

    def schedule_factor(self, step: int) -> float:
        """Return a factor of the learning rate of all parameters at a step, counted from 0."""
        del step
        return 1.0

    def penalty(self) -> Tensor | None:
        """Return a regularization term to add to the mean loss of a step, 0-d float32, or None."""
        return None

    def after_step(self, optimizer: OptimizerState, progress: Progress) -> None:
        """Act after the optimizer's step and before its gradients are forgotten; `progress.step` counts from 0."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run needs besides the trained parameters and the optimizer's state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        assert not state

    def disk_config(self) -> dict[str, Any]:
        """Return the method's part of PEFT's adapter_config.json."""
        return {}

    def shared_disk_tensors(self) -> dict[str, Tensor]:
        """Return tensors that belong to no single layer, by their whole PEFT names."""
        return {}

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Say whether an adapter_config.json is of this method."""
        return bool(cls.peft_type) and config.get("peft_type") == cls.peft_type

    @classmethod
    def from_disk_config(cls, config: Mapping[str, Any], where: str) -> Method:
        """Return the method that an adapter_config.json describes, ready to inject; `where` heads a message.

        Raises:
            InputError: a setting is missing, of the wrong type, or not supported.
        """
        raise AssertionError(f"{cls.__name__} has no disk format")


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return every linear layer of the model by its path, in the model's order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, BASE_LINEARS)}


def match_targets(
    model: PreTrainedModel, targets: str | list[str], *, where: str = "adapter.targets"
) -> list[str]:
    """Return the paths of the linear layers that `targets` names, in the model's order; `where` heads a message.

    `all-linear` is every linear layer but the output head; `attention` and `mlp` are those inside such blocks; a list
    holds module names matched at the end of the path; any other string is a regular expression for the whole path.

    Raises:
        InputError: a target matches no linear layer, or the regular expression is not valid.
    """
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    linears = linear_layers(model)
    inner = [path for path, module in linears.items() if module is not head]
    if targets == "all-linear":
        return _non_empty(inner, "all-linear", linears, where)
    if isinstance(targets, list):
        chosen: set[str] = set()
        for target in targets:
            found = [path for path in linears if path == target or path.endswith(f".{target}")]
            chosen.update(_non_empty(found, target, linears, where))
        return [path for path in linears if path in chosen]
    if targets in GROUPS:
        found = [path for path in inner if GROUPS[targets] & set(path.split("."))]
        return _non_empty(found, targets, linears, where)
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise InputError(f"{where}: {targets!r} is not a regular expression ({error})") from error
    return _non_empty([path for path in linears if pattern.fullmatch(path)], targets, linears, where)


def short_names(model: PreTrainedModel, paths: list[str]) -> list[str]:
    """Return the shortest target list that names exactly `paths`: module names where they do, else the paths."""
    names = sorted({path.rpartition(".")[2] for path in paths})
    return names if match_targets(model, names) == paths else sorted(paths)


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path` of the model."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _non_empty(paths: list[str], target: str, linears: Mapping[str, nn.Module], where: str) -> list[str]:
    if paths:
        return paths
    names = sorted({path.rpartition(".")[2] for path in linears})
    near = difflib.get_close_matches(target, names, n=1)
    hint = (
        f"did you mean {near[0]}?" if near else f"its linear layers are named {', '.join(names) or 'nothing'}"
    )
    raise InputError(f"{where}: {target!r} matches no linear layer of the model ({hint})")
