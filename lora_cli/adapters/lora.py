"""LoRA: a low-rank update beside a frozen linear layer (arXiv 2106.09685).

    h = W x + (alpha / r) B A x          section 4.1, eq. 3

A (r, in) starts Kaiming-uniform as in the authors' code (the paper says Gaussian) and B (out, r) at zero, so that
the model is unchanged at injection. A and B are float32 and are cast to the input's dtype in the forward pass: bf16
steps would round small updates away, bf16 products lose nothing that the base's own do not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_cli.adapters import _peft
from lora_cli.adapters._base import AdapterLinear, BaseLinear, Method
from lora_cli.seeding import stream_seed


class LoraLinear(AdapterLinear):
    """A linear layer with a rank-r update: (..., in) -> (..., out)."""

    def __init__(self, base: BaseLinear, *, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__(base)
        self.scale = alpha / rank
        self.dropout = dropout
        self.lora_A = nn.Parameter(torch.zeros(rank, self.in_features, device=self.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=self.device))

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

    def plain_factors(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) float32 whose product B A is the whole update, the scale in B."""
        return self.lora_A.detach(), self.lora_B.detach() * self.scale


class Lora(Method):
    """LoRA on the layers that `targets` names; `alpha / rank` scales the update."""

    peft_type = "LORA"
    disk_keys = frozenset({"r", "lora_alpha", "lora_dropout", "target_modules", "bias", "init_lora_weights"})

    def __init__(
        self,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        targets: str | list[str] = "all-linear",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.targets, self.seed = targets, seed

    def make_layer(self, path: str, base: BaseLinear) -> AdapterLinear:
        """Return a LoraLinear whose A is a function of seed and path."""
        layer = LoraLinear(base, rank=self.rank, alpha=self.alpha, dropout=self.dropout)
        layer.reset(stream_seed(self.seed, "adapter", path))
        return layer

    def disk_config(self) -> dict[str, Any]:
        """Return PEFT's LoRA keys; a whole alpha is written as an integer, as older readers expect."""
        return {
            "r": self.rank,
            "lora_alpha": int(self.alpha) if self.alpha == int(self.alpha) else self.alpha,
            "lora_dropout": self.dropout,
            "fan_in_fan_out": any(layer.fan_in_fan_out for layer in self.layers.values()),
            "bias": "none",
            "init_lora_weights": True,
            "use_dora": False,
            "use_rslora": False,
            "rank_pattern": {},
            "alpha_pattern": {},
            "layers_to_transform": None,
            "layers_pattern": None,
            "modules_to_save": None,
        }

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Say whether an adapter_config.json is LoRA's and not DoRA's, which PEFT gives the same type."""
        return super().reads(config) and config.get("use_dora") is not True

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
                config.get("init_lora_weights", True) in (True, False, "gaussian"),
            ),
        )
        return cls(
            rank=config["r"],
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout", 0.0),
            targets=config["target_modules"],
        )


METHOD = Lora
