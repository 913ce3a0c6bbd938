"""What every adapter method shares: the wrapped linear layer, merging, and what a method may do.

    before                      after
    q_proj: nn.Linear           q_proj: AdapterLinear
                                  .base: nn.Linear, frozen
                                  .lora_A, .lora_B, ...: float32, trained

Shapes: `in`, `out` are the layer's features; weights are (out, in) whatever the base stores (GPT-2's Conv1D stores
(in, out), a QuantizedLinear packed codes).
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters._targets import BASE_LINEARS, match_targets, short_names
from lora_cli.adapters._targets import BaseLinear as BaseLinear
from lora_cli.adapters._whole import TrainedModule
from lora_cli.models.nf4 import QuantizedLinear
from lora_cli.types import Progress


class AdapterLinear(nn.Module, ABC):
    """A frozen linear layer with an update beside it: (..., in) -> (..., out)."""

    base: BaseLinear

    def __init__(self, base: BaseLinear) -> None:
        super().__init__()
        self.base = base
        self.enabled = True
        """False: the layer computes exactly what the base does."""
        self.bias: nn.Parameter | None = None
        """Trained in place of the base's own where `train_bias` was called, (out,) float32."""
        self._unmerged: Tensor | tuple[QuantizedLinear] | None = None
        """While merged: the old weight, or the quantized base, in a tuple so that it is not registered."""
        self._unmerged_bias: Tensor | None = None
        self.device = next(itertools.chain(base.parameters(), base.buffers())).device
        """Where the base is, and what a method adds to it must be."""
        self.fan_in_fan_out = isinstance(base, Conv1D) or (isinstance(base, QuantizedLinear) and base.conv1d)
        """PEFT's name for a base whose weight is stored (in, out) on disk."""
        if isinstance(base, QuantizedLinear):
            self.in_features, self.out_features = base.in_features, base.out_features
        else:
            sizes = base.weight.shape if self.fan_in_fan_out else base.weight.shape[::-1]
            self.in_features, self.out_features = sizes

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
        if self.bias is None or self.base.bias is None:
            return y
        return y + (self.bias - self.base.bias.float()).to(y.dtype)

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

    def plain_factors(self) -> tuple[Tensor, Tensor] | None:
        """Return A (R, in) and B (out, R) float32 whose product B A is the whole update of the weight, its scale in B.

        None where the update is no product of known factors; then it is `merged_weight` less `base_weight`.
        """
        return None

    def bounded_factors(self) -> tuple[Tensor, Tensor] | None:
        """Return A (R, in) and B (out, R) float32 of the part of the update that the rank bounds: mostly all of it."""
        return self.plain_factors()

    def base_weight(self) -> Tensor:
        """Return the base's own weight as (out, in), in the base's dtype, without an update merged into it.

        Of a quantized base it is the dequantized weight, made anew at each call.
        """
        if isinstance(self._unmerged, tuple):
            return self._unmerged[0].dequantized()
        if isinstance(self.base, QuantizedLinear):
            return self.base.dequantized()
        weight = self.base.weight if self._unmerged is None else self._unmerged
        return weight.T if isinstance(self.base, Conv1D) else weight

    @torch.no_grad()
    def merge(self) -> None:
        """Put the update into the base weight, rounded once to its dtype; the old weight is kept for `unmerge`.

        A quantized base is replaced by a dense layer: quantized again, the weight would lose most of a small update.
        """
        assert not self.merged
        weight = self.merged_weight()
        if isinstance(self.base, QuantizedLinear):
            self._unmerged, self.base = (self.base,), self.base.dense(weight)
            if self.bias is not None:
                # Not copied into the dense layer's bias, which is the quantized one's own.
                self.base.bias = nn.Parameter(
                    self.bias.detach().to(self.base.weight.dtype), requires_grad=False
                )
            return
        self._unmerged = self.base.weight.detach().clone()
        if self.bias is not None:
            self._unmerged_bias = self.base.bias.detach().clone()
            self.base.bias.copy_(self.bias)
        self.base.weight.copy_(weight.T if isinstance(self.base, Conv1D) else weight)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base weight bit for bit."""
        assert self._unmerged is not None
        if isinstance(self._unmerged, tuple):
            (self.base,) = self._unmerged
        else:
            assert not isinstance(self.base, QuantizedLinear)
            self.base.weight.copy_(self._unmerged)
            if self._unmerged_bias is not None:
                self.base.bias.copy_(self._unmerged_bias)
        self._unmerged, self._unmerged_bias = None, None


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

    def make_layer(self, path: str, base: BaseLinear) -> AdapterLinear:
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

    def report(self) -> list[str]:
        """Return lines on what the method came to, to be logged after the last step."""
        return []

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run needs besides the trained parameters and the optimizer's state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        assert not state

    def disk_config(self) -> dict[str, Any]:
        """Return the method's part of PEFT's adapter_config.json."""
        return {}

    def as_peft(self) -> tuple[Method, dict[str, float]]:
        """Return a method that PEFT's format can hold, with layers around the same bases, and what that loses.

        The loss is the relative error in the Frobenius norm of each layer's update, by path; empty for a method that
        is written as it is.
        """
        return self, {}

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


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path` of the model."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
