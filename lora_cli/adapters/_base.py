"""What every adapter method may do, and what it states: one file is one method, and this is its interface.

The layers that it puts into the model are in `_layer.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli.adapters._layer import AdapterLinear as AdapterLinear
from lora_cli.adapters._targets import BaseLinear as BaseLinear
from lora_cli.adapters._targets import match_targets, short_names
from lora_cli.adapters._targets import replace_module as replace_module
from lora_cli.adapters._whole import TrainedModule
from lora_cli.types import Batch, Progress


class OptimizerState(Protocol):
    """The optimizer, as far as a method may reach into it."""

    masters: dict[str, Tensor]
    """The float32 weights that are updated, by the names of `Method.trainable`; `.grad` is the step's gradient."""

    def moments(self, name: str) -> dict[str, Tensor]:
        """Return AdamW's `exp_avg` and `exp_avg_sq` of a weight, for `set_moments`; empty before its first step."""

    def set_moments(self, name: str, moments: Mapping[str, Tensor]) -> None:
        """Store what `moments` returned and was then changed in place."""


class StartSource(Protocol):
    """What a method may ask for before it is placed in the model, where its start depends on more than a seed."""

    def batches(self) -> Iterator[Batch]:
        """Yield batches of the training rows in the order of training, without end; the same in every process."""

    def full_weight(self, path: str) -> Tensor:
        """Return the weight (out, in) of the linear layer at `path` as the base's files hold it, read at each call."""

    def agree(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite each tensor with the main process's, so that all processes start alike."""

    def resumed(self) -> Mapping[str, Tensor] | None:
        """Return the method's own state in the checkpoint that the run goes on from; None where it begins."""


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

    def disk_bytes(self) -> int:
        """Return about how many bytes the tensors of PEFT's format take at the end of training."""
        tensors = [tensor for placed in self.placed().values() for tensor in placed.disk_tensors().values()]
        tensors += self.shared_disk_tensors().values()
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

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
