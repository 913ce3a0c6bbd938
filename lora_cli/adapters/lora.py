"""LoRA: a low-rank update beside a frozen linear layer (arXiv 2106.09685).

    h = W x + (alpha / r) B A x          section 4.1, eq. 3

A (r, in) starts Kaiming-uniform as in the authors' code (the paper says Gaussian) and B (out, r) at zero, so that
the model is unchanged at injection. The layers are in `_low_rank.py`.

Variants, each a key of the recipe's block: rsLoRA's scale (2312.03732), ranks and alphas by module, a choice of decoder
layers, LoRA+'s rate of B (2402.12354), LoRA-FA's frozen A (2308.03303), other starts (`_lora_init.py`), embeddings
(`_lora_embedding.py`). Trained besides: biases and whole modules (`_whole.py`), rows of tokens (`_lora_rows.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli.adapters import _lora_config, _lora_init, _lora_patterns, _lora_rows, _whole
from lora_cli.adapters._base import AdapterLinear, BaseLinear, Method
from lora_cli.adapters._lora_embedding import LoraEmbedding
from lora_cli.adapters._low_rank import LoraLinear, ShiftedLoraLinear
from lora_cli.errors import InputError
from lora_cli.seeding import stream_seed


class Lora(Method):
    """LoRA on the layers that `targets` names, in the decoder layers that `layers` names."""

    peft_type = "LORA"
    disk_keys = _lora_config.KEYS
    adapts_embeddings = True

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
        init: str = "default",
        bias: str = "none",
        train_also: Sequence[str] = (),
        train_tokens: Sequence[str] = (),
        add_tokens: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.targets, self.chosen_layers, self.init, self.seed = targets, layers, init, seed
        self.rslora, self.plus_ratio, self.freeze_a = scaling == "rslora", plus_ratio, freeze_a
        self.rank_pattern, self.alpha_pattern = rank_pattern or {}, alpha_pattern or {}
        self.bias, self.train_also = bias, list(train_also)
        self.train_tokens, self.add_tokens = list(train_tokens), list(add_tokens)
        self.rows: dict[str, _lora_rows.TrainedRows] = {}
        """Where rows of single tokens are trained, by path."""
        self.row_ids: list[int] | dict[str, list[int]] = []
        """Tokens to train; as read from a file, where a list for each module is possible."""
        self.new_ids: list[int] = []
        """Those of them that the base does not know."""
        self.layer_names: list[str] = []
        """Names before the number of a decoder layer; empty: any."""
        self.strict = True
        """False: patterns and layer indices that name nothing are passed over, as PEFT does with its own files."""

    def learn_tokens(self, ids_of: Callable[[Sequence[str]], list[int]]) -> None:
        """Learn the ids of the tokens that the settings name, before `inject`."""
        self.row_ids = sorted(ids_of([*self.train_tokens, *self.add_tokens]))
        self.new_ids = ids_of(self.add_tokens)

    def target_paths(self, model: PreTrainedModel) -> list[str]:
        """Return the paths of the targets in the chosen layers.

        Raises:
            InputError: a target, layer or pattern names nothing.
        """
        paths = super().target_paths(model)
        if self.chosen_layers != "all":
            indices = self.chosen_layers
            if self.strict:
                count = model.config.get_text_config().num_hidden_layers
                indices = _lora_patterns.layer_indices(indices, count, "adapter.layers")
            paths = _lora_patterns.in_layers(paths, indices, self.layer_names)
            _lora_patterns.require_targets(paths, self.targets, self.targets_key)
        if self.strict:
            _lora_patterns.require_used(self.rank_pattern, paths, "adapter.rank_pattern")
            _lora_patterns.require_used(self.alpha_pattern, paths, "adapter.alpha_pattern")
        return paths

    def inject(self, model: PreTrainedModel) -> dict[str, AdapterLinear]:
        """Place the adapters, and train biases and whole modules besides where the settings say so.

        Raises:
            InputError: a target, or a module of `train_also`, names nothing, or there is no bias, or rows of tokens
                are to be trained in a module that is trained otherwise.
        """
        assert self.row_ids or not (self.train_tokens or self.add_tokens), "learn_tokens comes first"
        super().inject(model)
        if self.bias != "none":
            trained = [layer for layer in self.layers.values() if layer.train_bias()]
            if self.bias == "all":
                self.whole = _whole.wrap(
                    model, _whole.biased(model, self.layers, "adapter.bias"), only="bias"
                )
            if self.strict and not (trained or self.whole):
                raise InputError(
                    f"adapter.bias: found {self.bias}, but no such bias is in the model (use none)"
                )
        if self.train_also:
            paths = (
                _whole.choose(model, self.train_also, self.layers, "adapter.train_also")
                if self.strict
                else _whole.choose_as_peft(model, self.train_also, f"{self.targets_key}, modules_to_save")
            )
            self.whole |= _whole.wrap(model, paths, tie=self.strict)
        if self.row_ids:
            where = "adapter.train_tokens" if self.strict else f"{self.targets_key}, trainable_token_indices"
            self.rows = _lora_rows.place(
                model, self.row_ids, self.new_ids, where, taken=self.placed(), both=self.strict
            )
            self.whole |= self.rows
        return self.layers

    def make_layer(self, path: str, base: BaseLinear) -> AdapterLinear:
        """Return a LoraLinear whose start is a function of seed and path, or of the base weight."""
        rank = _lora_patterns.value_at(self.rank_pattern, path, self.rank)
        alpha = _lora_patterns.value_at(self.alpha_pattern, path, self.alpha)
        seed = stream_seed(self.seed, "adapter", path)
        layer = (ShiftedLoraLinear if self.init in _lora_init.FROM_BASE else LoraLinear)(
            base, rank=rank, alpha=alpha, dropout=self.dropout, rslora=self.rslora
        )
        if self.init == "default":
            layer.reset(seed)
        else:
            layer.start_from(
                *_lora_init.factors(self.init, layer.base_weight(), rank, layer.scale, seed, path)
            )
        layer.lora_A.requires_grad_(not self.freeze_a)
        return layer

    def make_embedding(self, path: str, base: nn.Embedding) -> AdapterLinear:
        """Return a LoraEmbedding whose start is a function of seed and path.

        Raises:
            InputError: it is to start at a part of the base weight, or its A, which is zero, is to stay so.
        """
        remedy = f"(take {path} out of adapter.targets, or out with the key)"
        if self.init in _lora_init.FROM_BASE:
            raise InputError(f"adapter.init: {self.init} is not there for an embedding {remedy}")
        if self.freeze_a:
            raise InputError(f"adapter.freeze_a: an embedding's A starts at zero, and so would stay {remedy}")
        rank = _lora_patterns.value_at(self.rank_pattern, path, self.rank)
        alpha = _lora_patterns.value_at(self.alpha_pattern, path, self.alpha)
        layer = LoraEmbedding(base, rank=rank, alpha=alpha, rslora=self.rslora)
        layer.reset(stream_seed(self.seed, "adapter", path))
        return layer

    def rate_factor(self, name: str) -> float:
        """Return LoRA+'s ratio of B's rate to A's (arXiv 2402.12354); an embedding's factors have one rate."""
        return self.plus_ratio if name.endswith(".lora_B") else 1.0

    def state_dict(self) -> dict[str, Tensor]:
        """Return what is neither trained nor in the base: A where it is frozen, and a start other than zero."""
        state: dict[str, Tensor] = {}
        for path, layer in self.layers.items():
            if self.freeze_a and isinstance(layer, LoraLinear):
                state[f"{path}.lora_A"] = layer.lora_A
            if isinstance(layer, ShiftedLoraLinear):
                state |= {f"{path}.{name}": buffer for name, buffer in layer.named_buffers(recurse=False)}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])

    def disk_config(self) -> dict[str, Any]:
        """Return PEFT's LoRA keys; a whole alpha is written as an integer, as older readers expect."""
        # A start other than zero stands on disk with twice the rank, and with alpha raised to keep the scale.
        times = 2 if self.init in _lora_init.FROM_BASE else 1
        raised = math.sqrt(times) if self.rslora else times
        ranks = _lora_patterns.lasting(self.rank_pattern, list(self.layers))
        alphas = _lora_patterns.lasting(self.alpha_pattern, list(self.layers))
        return {
            "r": self.rank * times,
            "lora_alpha": _lora_config.whole(self.alpha * raised),
            "lora_dropout": self.dropout,
            "fan_in_fan_out": any(layer.fan_in_fan_out for layer in self.layers.values()),
            "bias": _lora_config.BIASES[self.bias],
            "init_lora_weights": True,
            "use_dora": False,
            "use_rslora": self.rslora,
            "rank_pattern": {key: rank * times for key, rank in ranks.items()},
            "alpha_pattern": {key: _lora_config.whole(alpha * raised) for key, alpha in alphas.items()},
            "layers_to_transform": None,  # target_modules names exactly the adapted layers
            "layers_pattern": None,
            "modules_to_save": [path for path in self.whole if path not in self.rows]
            if self.train_also
            else None,
            **({"trainable_token_indices": _lora_rows.on_disk(self.rows)} if self.rows else {}),
        }

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Say whether an adapter_config.json is LoRA's and not DoRA's, which PEFT gives the same type."""
        return super().reads(config) and config.get("use_dora") is not True

    @classmethod
    def from_disk_config(cls, config: Mapping[str, Any], where: str) -> Lora:
        """Return the method that an adapter_config.json describes."""
        method = cls(**_lora_config.read(config, where))
        method.layer_names = _lora_config.layer_names(config)
        method.row_ids = config.get("trainable_token_indices") or []
        method.strict = False
        return method


METHOD = Lora
