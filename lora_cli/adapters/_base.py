"""What every adapter method shares: the wrapped linear layer, merging, and what a method may do.

    before                      after
    q_proj: nn.Linear           q_proj: AdapterLinear
                                  .base: nn.Linear, frozen
                                  .lora_A, .lora_B, ...: float32, trained

Shapes: `in`, `out` are the layer's features; weights are (out, in) whatever the base stores (GPT-2's Conv1D and an
embedding store (in, out), a QuantizedLinear packed codes).
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters._targets import BaseLinear as BaseLinear
from lora_cli.adapters._targets import match_targets, short_names
from lora_cli.adapters._targets import replace_module as replace_module
from lora_cli.adapters._whole import TrainedModule
from lora_cli.models.nf4 import QuantizedLinear
from lora_cli.types import Progress, StartSource


class AdapterLinear(nn.Module, ABC):
    """A frozen linear layer with an update beside it: (..., in) -> (..., out)."""

    def __init__(self, base: BaseLinear | nn.Embedding) -> None:
        super().__init__()
        self.base: BaseLinear = cast(BaseLinear, base)  # an embedding is a linear layer of unit vectors
        self.enabled = True
        """False: the layer computes exactly what the base does."""
        self.bias: nn.Parameter | None = None
        """Trained in place of the base's own where `train_bias` was called, (out,) float32."""
        self._unmerged: tuple[nn.Parameter | QuantizedLinear] | None = None
        """While merged: the old weight, or the quantized base, in a tuple so that it is not registered."""
        self._unmerged_bias: Tensor | None = None
        self.device = next(itertools.chain(base.parameters(), base.buffers())).device
        """Where the base is, and what a method adds to it must be."""
        self.fan_in_fan_out = isinstance(base, Conv1D) or (isinstance(base, QuantizedLinear) and base.conv1d)
        """PEFT's name for a linear base whose weight is stored (in, out) on disk."""
        if isinstance(base, QuantizedLinear):
            self.in_features, self.out_features = base.in_features, base.out_features
        else:
            sizes = base.weight.shape if self.transposed else base.weight.shape[::-1]
            self.in_features, self.out_features = sizes

    @property
    def transposed(self) -> bool:
        """True: the base's `weight` is (in, out). A layer may be moved from a quantized base to a dense one."""
        return isinstance(self.base, Conv1D | nn.Embedding)

    @property
    def merged(self) -> bool:
        """True while the update stands in the base weight."""
        return self._unmerged is not None

    def forward(self, x: Tensor) -> Tensor:
        """Apply base and update: (..., in) -> (..., out)."""
        y: Tensor = self.base(x)
        if self.enabled and not self.merged:
            y = self.adapt(x, y)
            if self.bias is not None and self.base.bias is not None:
                y = y + (self.bias - self.base.bias.float()).to(y.dtype)
        return y

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
        (kept,) = self._unmerged or (self.base,)
        if isinstance(kept, QuantizedLinear):
            return kept.dequantized()
        weight = kept if isinstance(kept, nn.Parameter) else kept.weight
        return weight.T if self.transposed else weight

    @torch.no_grad()
    def merge(self) -> None:
        """Put the update into the base weight, rounded once to its dtype; the old weight is kept for `unmerge`.

        A weight that the base shares with another module, as an embedding with a tied head, is parted from it. A
        quantized base is replaced by a dense layer: quantized again, the weight would lose most of a small update.
        """
        assert not self.merged
        weight = self.merged_weight()
        if isinstance(self.base, QuantizedLinear):
            self._unmerged, self.base = (self.base,), self.base.dense(weight)
            if self.bias is not None:
                # Not copied into the dense layer's bias, which is the quantized one's own.
                bias = self.bias.detach().to(self.base.weight.dtype)
                self.base.bias = nn.Parameter(bias, requires_grad=False)
            return
        self._unmerged = (cast(nn.Parameter, self.base.weight),)
        if self.bias is not None:
            self._unmerged_bias = self.base.bias.detach().clone()
            self.base.bias.copy_(self.bias)
        stored = (weight.T if self.transposed else weight).to(self.base.weight.dtype)
        self.base.weight = nn.Parameter(stored.contiguous(), requires_grad=False)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base weight bit for bit."""
        assert self._unmerged is not None
        (kept,) = self._unmerged
        if isinstance(kept, QuantizedLinear):
            self.base = kept
        else:
            self.base.weight = kept
            if self._unmerged_bias is not None and self.base.bias is not None:
                self.base.bias.copy_(self._unmerged_bias)
        self._unmerged, self._unmerged_bias = None, None


class OptimizerState(Protocol):
    """The optimizer, as far as a method may reach into it."""

    masters: dict[str, Tensor]
    """The float32 weights that are updated, by the names of `Method.trainable`; `.grad` is the step's gradient."""

    def moments(self, name: str) -> dict[str, Tensor]:
        """Return AdamW's `exp_avg` and `exp_avg_sq` of a weight, for `set_moments`; empty before its first step."""

    def set_moments(self, name: str, moments: Mapping[str, Tensor]) -> None:
        """Store what `moments` returned and was then changed in place."""


class Method:
    """One way to adapt a model. Holds its settings and, after `inject`, the layers it made.

    A method of layers states `make_layer` and its part of the disk format; what it does not need has a default here.
    """

    targets: str | list[str] = "all-linear"
    targets_key: str = "adapter.targets"
    """Where the targets were written, for messages."""
    layers: dict[str, AdapterLinear]

    keep_masters: bool = True
    """False: a trained bfloat16 weight has no float32 master and is rounded stochastically."""

    peft_type: ClassVar[str] = ""
    """PEFT's name of the method in adapter_config.json; empty where PEFT has none."""
    adapts_embeddings: ClassVar[bool] = False
    """True: a target may be an embedding that is a plain lookup."""
    disk_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys of adapter_config.json that `from_disk_config` takes into account; all others must be neutral."""
    start_keys: ClassVar[Mapping[str, str]] = {}
    """Keys of the recipe that an adapter settles from which a run starts, and how the two are compared: by `value`, by
    what they come to on the model's `modules`, or not at all (`free`: the recipe may say otherwise)."""

    def __init__(self) -> None:
        self.layers = {}
        self.whole: dict[str, TrainedModule] = {}
        """Modules trained in place of the base's, by path."""
        self.disk_targets: list[str] = []
        """The shortest `target_modules` that names exactly the injected layers."""

    def learn_tokens(self, ids_of: Callable[[Sequence[str]], list[int]]) -> None:
        """Learn the ids of tokens that the settings name, before `inject`."""

    def plan(self, total_steps: int) -> None:
        """Learn how many steps the run has, before anything is written.

        Raises:
            InputError: a schedule of the method's own does not fit into them.
        """

    def prepare(self, model: PreTrainedModel, source: StartSource) -> list[str]:
        """Learn from the base, the rows or a checkpoint how to start, before `inject`; return lines for the log."""
        del model, source
        return []

    def inject(self, model: PreTrainedModel) -> dict[str, AdapterLinear]:
        """Freeze the base, put a layer around each target, and return the layers by module path.

        Raises:
            InputError: a target matches no linear layer.
        """
        model.requires_grad_(False)
        paths = self.target_paths(model)
        self.disk_targets = short_names(model, paths, embeddings=self.adapts_embeddings)
        for path in paths:
            base = model.get_submodule(path)
            make = self.make_embedding if isinstance(base, nn.Embedding) else self.make_layer
            self.layers[path] = make(path, base)  # type: ignore[arg-type]
            replace_module(model, path, self.layers[path])
        return self.layers

    def target_paths(self, model: PreTrainedModel) -> list[str]:
        """Return the paths of the layers that get an adapter, in the model's order.

        Raises:
            InputError: a target matches no layer that the method adapts.
        """
        return match_targets(model, self.targets, where=self.targets_key, embeddings=self.adapts_embeddings)

    def layout(self, model: PreTrainedModel) -> dict[str, dict[str, object]]:
        """Return what keys come to on a model without adapters, by key and module path: spellings compare equal."""
        return {"targets": dict.fromkeys(self.target_paths(model), "an adapter")}

    def make_layer(self, path: str, base: BaseLinear) -> AdapterLinear:
        """Return the initialised layer for the base at `path`."""
        raise AssertionError(f"{type(self).__name__} makes no layers")

    def continue_training(self) -> None:
        """Make an adapter that was read one that can be trained on; what it computes stays the same."""

    def make_embedding(self, path: str, base: nn.Embedding) -> AdapterLinear:
        """Return the initialised layer for the embedding at `path`; only asked of a method that adapts them."""
        raise AssertionError(path)

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters the optimizer updates, `<module>.<tensor>`; they may be others after `after_step`."""
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

    def decays(self, name: str, parameter: Tensor) -> bool:
        """Say whether weight decay acts on a parameter of `trainable`: not on those that begin as the base's own."""
        del name
        return parameter.dim() > 1  # biases, norms and row lengths are vectors

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

    def note(self) -> str:
        """Return what a user of the exported adapter must know, for the log and the model card; empty: nothing."""
        return ""

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
    def disk_settings(cls, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return the constructor's arguments that an adapter_config.json holds; `where` heads a message.

        Raises:
            InputError: a setting is missing, of the wrong type, or not supported.
        """
        raise AssertionError(f"{cls.__name__} has no disk format")

    @classmethod
    def from_disk_config(cls, config: Mapping[str, Any], where: str, **changes: Any) -> Method:
        """Return the method that an adapter_config.json describes, but for `changes`, ready to inject."""
        raise AssertionError(f"{cls.__name__} has no disk format")
