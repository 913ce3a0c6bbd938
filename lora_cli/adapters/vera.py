"""VeRA: two trained vectors a layer, between random matrices that all layers share (arXiv 2310.11454).

    h = W x + Lambda_b B Lambda_d A x          section 3.1, eq. 2

A (r, in) and B (out, r) are frozen, drawn Kaiming-uniform from a seed and held once for the model, as large as its
largest target; a layer uses their first `in` columns and `out` rows (section 3.1 leaves the shapes to one common
size; the slices are PEFT's). Lambda_b starts at zero, so that the model is unchanged at injection, and Lambda_d at a
small constant (section 3.3). There is no alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli.adapters import _peft
from lora_cli.adapters._base import AdapterLinear, BaseLinear, Method
from lora_cli.adapters._fused import ScaledProduct, laid_out
from lora_cli.errors import InputError


class Projections(nn.Module):
    """The matrices that all layers share: A (r, largest in) and B (largest out, r), float32."""

    vera_A: Tensor
    vera_B: Tensor

    def draw(
        self, rank: int, in_features: int, out_features: int, *, seed: int, device: torch.device
    ) -> None:
        """Draw A, then B, from U(-sqrt(6 / columns), sqrt(6 / columns)) on the CPU, as PEFT does from its key."""
        generator = torch.Generator().manual_seed(seed)
        for name, shape in {"vera_A": (rank, in_features), "vera_B": (out_features, rank)}.items():
            matrix = nn.init.kaiming_uniform_(torch.empty(shape), generator=generator)
            self.register_buffer(name, matrix.to(device), persistent=False)
        self._cast: tuple[object, Tensor] = (None, self.vera_A)

    def cast_a(self, dtype: torch.dtype) -> Tensor:
        """Return A^T (largest in, r) in `dtype`; held once too, or the backward pass would keep it for each layer."""
        key = (dtype, self.vera_A.device, self.vera_A._version)
        if self._cast[0] != key:
            self._cast = key, laid_out(self.vera_A.T, dtype)
        return self._cast[1]


class VeraLinear(AdapterLinear):
    """A linear layer with trained vectors around shared matrices: (..., in) -> (..., out)."""

    def __init__(
        self,
        base: BaseLinear,
        projections: Projections,
        *,
        rank: int,
        d_initial: float = 0.1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(base)
        self.projections = projections
        self.dropout = dropout
        self.vera_lambda_b = nn.Parameter(torch.zeros(self.out_features, device=self.device))
        self.vera_lambda_d = nn.Parameter(torch.full((rank,), d_initial, device=self.device))

    def adapt(self, x: Tensor) -> Tensor:
        """Return W x, the update of x and the bias: (..., in) -> (..., out)."""
        down = self.projections.cast_a(x.dtype)[: self.in_features]
        b = self.projections.vera_B[: self.out_features]
        y: Tensor = ScaledProduct.apply(
            x,
            self.dropped(x),
            self.vera_lambda_d,
            self.vera_lambda_b,
            down,
            b,
            self.base_weight,
            self.base.bias,
        )
        return y

    def merged_weight(self) -> Tensor:
        """Return W + Lambda_b B Lambda_d A, (out, in) float32."""
        a, b = self.plain_factors()
        return self.base_weight().float() + b @ a

    def plain_factors(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) float32 with the vectors in them, whose product B A is the whole update."""
        a = self.vera_lambda_d.detach()[:, None] * self.projections.vera_A[:, : self.in_features]
        b = self.vera_lambda_b.detach()[:, None] * self.projections.vera_B[: self.out_features]
        return a, b

    def disk_tensors(self) -> dict[str, Tensor]:
        """Return the vectors, (out,) and (r,), by PEFT's names."""
        return {"vera_lambda_b": self.vera_lambda_b, "vera_lambda_d": self.vera_lambda_d}


class Vera(Method):
    """VeRA on the layers that `targets` names; the shared matrices are a function of `projection_seed`."""

    peft_type = "VERA"
    disk_keys = frozenset(
        {"r", "vera_dropout", "d_initial", "projection_prng_key", "save_projection", "bias", "init_weights"}
    )
    start_keys: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("rank", "d_initial", "projection_seed", "save_projection"), "value"),
        "targets": "modules",
    }

    def __init__(
        self,
        *,
        rank: int,
        d_initial: float = 0.1,
        dropout: float = 0.0,
        targets: str | list[str] = "all-linear",
        projection_seed: int = 0,
        save_projection: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        del seed  # what is trained starts from constants
        self.rank, self.d_initial, self.dropout, self.targets = rank, d_initial, dropout, targets
        self.projection_seed, self.save_projection = projection_seed, save_projection
        self.projections = Projections()
        self.bounds_rank = True
        """False: an adapter that exists already is read at any rank."""

    def inject(self, model: PreTrainedModel) -> dict[str, AdapterLinear]:
        """Put a layer around each target, then draw the matrices at the size of the largest of them.

        Raises:
            InputError: a target matches no linear layer, or the rank exceeds what the largest layers have.
        """
        layers = super().inject(model)
        widest = max(layer.in_features for layer in layers.values())
        tallest = max(layer.out_features for layer in layers.values())
        if self.bounds_rank and self.rank > min(widest, tallest):
            raise InputError(
                f"adapter.rank: found {self.rank}, but the target layers have at most {widest} inputs and {tallest}"
                f" outputs, and an update's rank cannot exceed either (use at most {min(widest, tallest)})"
            )
        self.projections.draw(
            self.rank, widest, tallest, seed=self.projection_seed, device=next(model.parameters()).device
        )
        return layers

    def make_layer(self, path: str, base: BaseLinear) -> AdapterLinear:
        """Return a VeraLinear, which computes once the shared matrices are drawn."""
        del path
        return VeraLinear(
            base, self.projections, rank=self.rank, d_initial=self.d_initial, dropout=self.dropout
        )

    def decays(self, name: str, parameter: Tensor) -> bool:
        """Say yes: vectors though they are, they are the update itself, which decay draws to zero."""
        del name, parameter
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """Return the shared matrices where they are saved: another torch may draw others."""
        return self.shared_disk_tensors()

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        for name, matrix in self.shared_disk_tensors().items():
            matrix.copy_(state[name])

    def shared_disk_tensors(self) -> dict[str, Tensor]:
        """Return the shared matrices by PEFT's names, which do not start like a layer's; nothing if not saved."""
        if not self.save_projection:
            return {}
        return {"base_model.vera_A": self.projections.vera_A, "base_model.vera_B": self.projections.vera_B}

    def disk_config(self) -> dict[str, Any]:
        """Return PEFT's VeRA keys."""
        return {
            "r": self.rank,
            "vera_dropout": self.dropout,
            "d_initial": self.d_initial,
            "projection_prng_key": self.projection_seed,
            "save_projection": self.save_projection,
            "fan_in_fan_out": any(layer.fan_in_fan_out for layer in self.layers.values()),
            "bias": "none",
            "init_weights": True,
            "layers_to_transform": None,
            "layers_pattern": None,
            "modules_to_save": None,
        }

    @classmethod
    def disk_settings(cls, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return the constructor's arguments that an adapter_config.json holds."""
        key = config.get("projection_prng_key", 0)
        _peft.require(
            where,
            config,
            r=("a positive integer", _peft.is_rank(config.get("r"))),
            vera_dropout=("0 to 1", _peft.is_number(config.get("vera_dropout", 0.0), below=1.0)),
            d_initial=("a number", _peft.is_number(config.get("d_initial", 0.1), above=float("-inf"))),
            projection_prng_key=("an integer from 0 to 2^63 - 1", _peft.is_integer(key) and key < 2**63),
            save_projection=("true or false", isinstance(config.get("save_projection", True), bool)),
            bias=("none", config.get("bias", "none") == "none"),
            init_weights=("true or false", isinstance(config.get("init_weights", True), bool)),
        )
        return {
            "rank": config["r"],
            "d_initial": config.get("d_initial", 0.1),
            "dropout": config.get("vera_dropout", 0.0),
            "targets": config["target_modules"],
            "projection_seed": key,
            "save_projection": config.get("save_projection", True),
        }

    @classmethod
    def from_disk_config(cls, config: Mapping[str, Any], where: str, **changes: Any) -> Vera:
        """Return the method that an adapter_config.json describes, but for `changes`."""
        method = cls(**cls.disk_settings(config, where) | changes)
        method.bounds_rank = False
        return method


METHOD = Vera
