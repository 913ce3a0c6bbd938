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
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

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
        self._unmerged: Tensor | None = None
        transposed = isinstance(base, Conv1D)
        self.in_features, self.out_features = base.weight.shape if transposed else base.weight.shape[::-1]

    @property
    def merged(self) -> bool:
        """True while the update stands in the base weight."""
        return self._unmerged is not None

    def forward(self, x: Tensor) -> Tensor:
        """Apply base and update: (..., in) -> (..., out)."""
        y: Tensor = self.base(x)
        return self.adapt(x, y) if self.enabled and not self.merged else y

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
        self.base.weight.copy_(weight.T if isinstance(self.base, Conv1D) else weight)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base weight bit for bit."""
        assert self._unmerged is not None
        self.base.weight.copy_(self._unmerged)
        self._unmerged = None


class Method(ABC):
    """One way to adapt a model. Holds its settings and, after `inject`, the layers it made."""

    layers: dict[str, AdapterLinear]

    @abstractmethod
    def inject(self, model: PreTrainedModel) -> dict[str, AdapterLinear]:
        """Freeze the base, place the adapters and return them by module path."""

    @abstractmethod
    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters the optimizer updates, by name."""

    def penalty(self) -> Tensor | None:
        """Return a regularization term to add to the mean loss of a step, or None."""
        return None

    def after_step(self, progress: Progress) -> None:
        """Act after the optimizer's step and before its gradients are forgotten."""
        del progress

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run needs besides the trained parameters."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        assert not state

    @abstractmethod
    def disk_config(self) -> dict[str, Any]:
        """Return the method's part of PEFT's adapter_config.json; empty where PEFT has no such method."""


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
