"""LoRA: a low-rank update beside a frozen linear layer (arXiv 2106.09685).

    h = W x + (alpha / r) B A x          section 4.1, eq. 3

A (r, in) starts Kaiming-uniform as in the authors' code (the paper says Gaussian) and B (out, r) at zero, so that
the model is unchanged at injection. The layers are in `_low_rank.py`.

Variants, each a key of the recipe's block: rsLoRA's scale (2312.03732), ranks and alphas by module, a choice of decoder
layers, LoRA+'s rate of B (2402.12354), LoRA-FA's frozen A (2308.03303), other starts (`_lora_init.py`, and EVA's from
the data, `_lora_eva.py`), embeddings (`_lora_embedding.py`). Trained besides: biases and whole modules (`_whole.py`),
rows of tokens (`_lora_rows.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli.adapters import (
    _lora_config,
    _lora_init,
    _lora_patterns,
    _lora_rows,
    _lora_starts,
    _low_rank,
    _whole,
)
from lora_cli.adapters._base import AdapterLinear, BaseLinear, Method, StartSource
from lora_cli.adapters._lora_embedding import LoraEmbedding
from lora_cli.adapters._low_rank import LoraLinear, ShiftedLoraLinear
from lora_cli.errors import InputError
from lora_cli.seeding import stream_seed


class Lora(Method):
    """LoRA on the layers that `targets` names, in the decoder layers that `layers` names."""

    peft_type = "LORA"
    disk_keys = _lora_config.KEYS
    start_keys = _lora_config.START_KEYS
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
        eva_rho: float = 2.0,
        eva_tokens: int = 65_536,
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
        self.eva_rho, self.eva_tokens = eva_rho, eva_tokens
        self.starts: dict[str, tuple[Tensor, Tensor]] | None = None
        """A and B of layers that are yet to be made; None before `prepare`, which the starts in `PREPARED` need."""
        self.eva_ranks: dict[str, int] = {}
        """Rank of every target, 0 included, where EVA has shared them out."""
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
        return [path for path in paths if self.eva_ranks.get(path) != 0]

    def prepare(self, model: PreTrainedModel, source: StartSource) -> list[str]:
        """Compute the starts that depend on the run's rows or on the base's files, and EVA's ranks.

        Raises:
            InputError: a rank is more than a layer can have, or there is nothing to start from.
        """
        if self.init not in _lora_init.PREPARED:
            return []
        ranks = {path: self._rank_of(path) for path in self.target_paths(model)}
        scales = {
            path: _low_rank.scale_of(self._alpha_of(path), rank, self.rslora) for path, rank in ranks.items()
        }
        made = _lora_starts.prepare(
            self.init, model, ranks, scales, source, rho=self.eva_rho, tokens=self.eva_tokens
        )
        self.starts, self.eva_ranks = made.factors, made.ranks
        if made.ranks:
            self.rank_pattern, self.alpha_pattern = _lora_patterns.shared_out(
                made.ranks, ranks, self.rank, self.alpha, self._alpha_of, self.rslora
            )
        return made.lines

    def _rank_of(self, path: str) -> int:
        return _lora_patterns.value_at(self.rank_pattern, path, self.rank)

    def _alpha_of(self, path: str) -> float:
        return _lora_patterns.value_at(self.alpha_pattern, path, self.alpha)

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
            self.whole |= _whole.wrap(model, self._whole_paths(model, self.layers), tie=self.strict)
        if self.row_ids:
            where = "adapter.train_tokens" if self.strict else f"{self.targets_key}, trainable_token_indices"
            self.rows = _lora_rows.place(
                model, self.row_ids, self.new_ids, where, taken=self.placed(), both=self.strict
            )
            self.whole |= self.rows
        return self.layers

    def _whole_paths(self, model: PreTrainedModel, adapted: Collection[str]) -> list[str]:
        if self.strict:
            return _whole.choose(model, self.train_also, adapted, "adapter.train_also")
        return _whole.choose_as_peft(model, self.train_also, f"{self.targets_key}, modules_to_save")

    def layout(self, model: PreTrainedModel) -> dict[str, dict[str, object]]:
        """Return what the keys come to on a model without adapters, by key and module path."""
        paths = self.target_paths(model)
        whole = self._whole_paths(model, paths) if self.train_also else []
        return {
            "targets": dict.fromkeys(paths, "an adapter"),
            "layers": dict.fromkeys(paths, "an adapter"),
            "rank_pattern": {path: self._rank_of(path) for path in paths},
            "alpha_pattern": {path: self._alpha_of(path) for path in paths},
            "train_also": dict.fromkeys(whole, "its weights"),
        }

    def continue_training(self) -> None:
        """Train modules that share a weight in the base as one, where they were; PEFT trains each by itself."""
        _whole.tie_equal(self.whole)

    def make_layer(self, path: str, base: BaseLinear) -> AdapterLinear:
        """Return a LoraLinear whose start is a function of seed and path, of the base weight, or of `prepare`."""
        rank = self._rank_of(path)
        seed = stream_seed(self.seed, "adapter", path)
        layer = (ShiftedLoraLinear if self.init in _lora_init.FROM_BASE else LoraLinear)(
            base,
            rank=rank,
            alpha=self._alpha_of(path),
            dropout=self.dropout,
            rslora=self.rslora,
        )
        if isinstance(layer, ShiftedLoraLinear):
            layer.frozen_a = self.freeze_a
        if self.init in ("default", *_lora_init.PREPARED):
            # Not in `starts`: not a start of this kind, or all of it is in the checkpoint that the run goes on from.
            assert self.init == "default" or self.starts is not None
            start = (self.starts or {}).pop(path, None)
            if start is None:
                layer.reset(seed)
            else:
                layer.start_from(*start)
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
        if self.init in _lora_init.FROM_BASE:
            raise InputError(
                f"adapter.init: {self.init} is not there for an embedding {_lora_starts.remedy(path)}"
            )
        if self.freeze_a:
            raise InputError(
                f"adapter.freeze_a: an embedding's A starts at zero, and so would stay {_lora_starts.remedy(path)}"
            )
        rank = self._rank_of(path)
        layer = LoraEmbedding(base, rank=rank, alpha=self._alpha_of(path), rslora=self.rslora)
        layer.reset(stream_seed(self.seed, "adapter", path))
        return layer

    def rate_factor(self, name: str) -> float:
        """Return LoRA+'s ratio of B's rate to A's (arXiv 2402.12354); an embedding's factors have one rate."""
        return self.plus_ratio if name.endswith(".lora_B") else 1.0

    def state_dict(self) -> dict[str, Tensor]:
        """Return what is neither trained nor in the base: A where frozen, a start other than zero, EVA's ranks."""
        state: dict[str, Tensor] = {}
        if self.eva_ranks:
            state["eva_ranks"] = torch.tensor(list(self.eva_ranks.values()))  # in the order of the targets
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

    def note(self) -> str:
        """Say that LoftQ's adapter belongs to the quantized base."""
        return _lora_starts.LOFTQ_NOTE if self.init == "loftq" else ""

    def disk_config(self) -> dict[str, Any]:
        """Return PEFT's LoRA keys."""
        # A start other than zero may stand on disk with twice the rank.
        times = 2 if self.init in _lora_init.FROM_BASE and not self.freeze_a else 1
        config = _lora_config.written(
            (self.rank, self.rank_pattern), (self.alpha, self.alpha_pattern), self.layers, times, self.rslora
        )
        saved = [path for path in self.whole if path not in self.rows] if self.train_also else None
        tokens = {"trainable_token_indices": _lora_rows.on_disk(self.rows)} if self.rows else {}
        bias = _lora_config.BIASES[self.bias]
        return config | {"lora_dropout": self.dropout, "bias": bias, "modules_to_save": saved} | tokens

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Say whether an adapter_config.json is LoRA's and not DoRA's, which PEFT gives the same type."""
        return super().reads(config) and config.get("use_dora") is not True

    @classmethod
    def disk_settings(cls, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return the constructor's arguments that an adapter_config.json holds."""
        return _lora_config.read(config, where)

    @classmethod
    def from_disk_config(cls, config: Mapping[str, Any], where: str, **changes: Any) -> Lora:
        """Return the method that an adapter_config.json describes, but for `changes`."""
        method = cls(**cls.disk_settings(config, where) | changes)
        method.layer_names = _lora_config.layer_names(config)
        method.row_ids = config.get("trainable_token_indices") or []
        method.strict = False
        return method


METHOD = Lora
