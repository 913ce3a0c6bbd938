"""LoRA: a low-rank update beside a frozen linear layer (arXiv 2106.09685).

    h = W x + (alpha / r) B A x          section 4.1, eq. 3

A (r, in) starts Kaiming-uniform as in the authors' code (the paper says Gaussian) and B (out, r) at zero, so that
the model is unchanged at injection. A and B are float32 and are cast to the input's dtype in the forward pass: bf16
steps would round small updates away, bf16 products lose nothing that the base's own do not.

Variants, each a key of the recipe's block: rsLoRA's scale (2312.03732), ranks and alphas by module, a choice of decoder
layers, LoRA+'s rate of B (2402.12354), LoRA-FA's frozen A (2308.03303).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters import _patterns, _peft
from lora_cli.adapters._base import AdapterLinear, Method
from lora_cli.errors import InputError
from lora_cli.seeding import stream_seed


class LoraLinear(AdapterLinear):
    """A linear layer with a rank-r update: (..., in) -> (..., out)."""

    def __init__(
        self, base: nn.Linear | Conv1D, *, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False
    ) -> None:
        super().__init__(base)
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)  # rslora: arXiv 2312.03732, theorem 3.2
        self.dropout = dropout
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.zeros(rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))

    def reset(self, seed: int) -> None:
        """Draw A from U(-1/sqrt(in), 1/sqrt(in)) and set B to zero; equal on every device for equal `seed`."""
        generator = torch.Generator().manual_seed(seed)
        initial = torch.empty(self.lora_A.shape)
        nn.init.kaiming_uniform_(initial, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            self.lora_A.copy_(initial)
            self.lora_B.zero_()

    def adapt(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the scaled update to the base's output: (..., in), (..., out) -> (..., out)."""
        x = F.dropout(x, self.dropout, self.training)
        h = F.linear(x, self.lora_A.to(x.dtype))  # (..., r)
        return y + F.linear(h * self.scale, self.lora_B.to(x.dtype))

    def merged_weight(self) -> Tensor:
        """Return W + scale B A, (out, in) float32."""
        return self.base_weight().float() + self.scale * (self.lora_B.float() @ self.lora_A.float())

    def disk_tensors(self) -> dict[str, Tensor]:
        """Return A (r, in) and B (out, r) by PEFT's names."""
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}


class Lora(Method):
    """LoRA on the layers that `targets` names, in the decoder layers that `layers` names."""

    peft_type = "LORA"
    disk_keys = frozenset(
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
        }
    )

    def __init__(
        self,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        targets: str | list[str] = "all-linear",
        layers: str | list[int] = "all",
        scaling: str = "standard",
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        plus_ratio: float = 1.0,
        freeze_a: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.targets, self.chosen_layers, self.seed = targets, layers, seed
        self.rslora, self.plus_ratio, self.freeze_a = scaling == "rslora", plus_ratio, freeze_a
        self.rank_pattern, self.alpha_pattern = rank_pattern or {}, alpha_pattern or {}
        self.layers_pattern: list[str] = []
        """Names before the number of a decoder layer; empty: any."""
        self.strict = True
        """False: patterns and layer indices that name nothing are passed over, as PEFT does with its own files."""

    def target_paths(self, model: PreTrainedModel) -> list[str]:
        """Return the paths of the targets in the chosen layers.

        Raises:
            InputError: a target, layer or pattern names nothing.
        """
        paths = super().target_paths(model)
        if self.chosen_layers != "all":
            paths = self._in_chosen_layers(model, paths, self.chosen_layers)
        if self.strict:
            _patterns.require_used(self.rank_pattern, paths, "adapter.rank_pattern")
            _patterns.require_used(self.alpha_pattern, paths, "adapter.alpha_pattern")
        return paths

    def _in_chosen_layers(
        self, model: PreTrainedModel, paths: list[str], layers: str | list[int]
    ) -> list[str]:
        if self.strict:
            count = model.config.get_text_config().num_hidden_layers
            layers = _patterns.layer_indices(layers, count, "adapter.layers")
        assert isinstance(layers, list)
        chosen = _patterns.in_layers(paths, layers, self.layers_pattern)
        for target in self.targets if isinstance(self.targets, list) else [""]:
            if not any(f".{path}".endswith(target and f".{target}") for path in chosen):
                raise InputError(
                    f"{self.targets_key}: {target or self.targets!r} matches no linear layer in the chosen"
                    f" decoder layers (adapter.layers is {self.chosen_layers})"
                )
        return chosen

    def make_layer(self, path: str, base: nn.Linear | Conv1D) -> AdapterLinear:
        """Return a LoraLinear whose A is a function of seed and path."""
        layer = LoraLinear(
            base,
            rank=_patterns.value_at(self.rank_pattern, path, self.rank),
            alpha=_patterns.value_at(self.alpha_pattern, path, self.alpha),
            dropout=self.dropout,
            rslora=self.rslora,
        )
        layer.reset(stream_seed(self.seed, "adapter", path))
        layer.lora_A.requires_grad_(not self.freeze_a)
        return layer

    def rate_factor(self, name: str) -> float:
        """Return LoRA+'s ratio of B's rate to A's (arXiv 2402.12354, section 4.2)."""
        return self.plus_ratio if name.endswith(".lora_B") else 1.0

    def state_dict(self) -> dict[str, Tensor]:
        """Return what is neither trained nor in the base: A where it is frozen."""
        frozen = self.layers if self.freeze_a else {}
        return {
            f"{path}.lora_A": layer.lora_A for path, layer in frozen.items() if isinstance(layer, LoraLinear)
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])

    def disk_config(self) -> dict[str, Any]:
        """Return PEFT's LoRA keys; a whole alpha is written as an integer, as older readers expect."""
        alphas = _patterns.lasting(self.alpha_pattern, list(self.layers))
        return {
            "r": self.rank,
            "lora_alpha": _whole(self.alpha),
            "lora_dropout": self.dropout,
            "fan_in_fan_out": any(isinstance(layer.base, Conv1D) for layer in self.layers.values()),
            "bias": "none",
            "init_lora_weights": True,
            "use_dora": False,
            "use_rslora": self.rslora,
            "rank_pattern": _patterns.lasting(self.rank_pattern, list(self.layers)),
            "alpha_pattern": {key: _whole(value) for key, value in alphas.items()},
            "layers_to_transform": None,  # target_modules names exactly the adapted layers
            "layers_pattern": None,
            "modules_to_save": None,
        }

    @classmethod
    def from_disk_config(cls, config: Mapping[str, Any], where: str) -> Lora:
        """Return the method that an adapter_config.json describes."""
        _peft.require(
            where,
            config,
            r=("a positive integer", _peft.is_integer(config.get("r"), least=1)),
            lora_alpha=("a positive number", _peft.is_number(config.get("lora_alpha"), above=0.0)),
            lora_dropout=("0 to 1", _peft.is_number(config.get("lora_dropout", 0.0), below=1.0)),
            bias=("none", config.get("bias", "none") == "none"),
            init_lora_weights=(
                "a start that leaves the base as it is",
                config.get("init_lora_weights", True) in (True, False, "gaussian", "orthogonal"),
            ),
            use_rslora=("true or false", isinstance(config.get("use_rslora", False), bool)),
            rank_pattern=(
                "patterns and positive integers",
                _patterns.is_pattern(
                    config.get("rank_pattern"), lambda rank: _peft.is_integer(rank, least=1)
                ),
            ),
            alpha_pattern=(
                "patterns and positive numbers",
                _patterns.is_pattern(
                    config.get("alpha_pattern"), lambda alpha: _peft.is_number(alpha, above=0.0)
                ),
            ),
            layers_to_transform=(
                "a layer or a list of them, and target_modules as a list",
                _are_layers(config),
            ),
        )
        indices, names = config.get("layers_to_transform"), config.get("layers_pattern") or []
        method = cls(
            rank=config["r"],
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout", 0.0),
            targets=config["target_modules"],
            layers=[indices] if isinstance(indices, int) else indices or "all",
            scaling="rslora" if config.get("use_rslora") else "standard",
            rank_pattern=config.get("rank_pattern"),
            alpha_pattern=config.get("alpha_pattern"),
        )
        method.layers_pattern = [names] if isinstance(names, str) else names
        method.strict = False
        return method


def _whole(alpha: float) -> float:
    """Return a whole number as an integer, as older readers of PEFT's format expect."""
    return int(alpha) if alpha == int(alpha) else alpha


def _are_layers(config: Mapping[str, Any]) -> bool:
    """Say whether the choice of layers in an adapter_config.json is one that PEFT takes."""
    indices, names = config.get("layers_to_transform"), config.get("layers_pattern")
    if not indices and not _peft.is_integer(indices):
        return not names
    listed = indices if isinstance(indices, list) else [indices]
    known = names is None or isinstance(names, str | list)
    return isinstance(config["target_modules"], list) and known and all(map(_peft.is_integer, listed))


METHOD = Lora
