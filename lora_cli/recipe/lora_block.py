"""The `adapter` block of LoRA, of which QLoRA is a form, and what its keys have in common with other methods'."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from lora_cli.recipe.section import Conflict, PositiveInt, Section, regex_fault

Rank = Annotated[int, Field(ge=1, le=4096)]
Alpha = Annotated[float, Field(gt=0, le=1_000_000)]
Token = Annotated[str, Field(min_length=1, max_length=200)]
LayerIndex = Annotated[int, Field(ge=0, le=9999)]

_LAYERS = re.compile(r"all|(first|last) [1-9]\d{0,3}|\d{1,4}-\d{1,4}")


def target_conflicts(targets: str | list[str]) -> Iterator[Conflict]:
    """Yield a list of targets that names nothing, or an expression that does not compile."""
    if not targets:
        yield Conflict("adapter.targets", "found nothing (name at least one layer, or write all-linear)")
    elif isinstance(targets, str) and (fault := regex_fault(targets)):
        yield Conflict("adapter.targets", fault)


class LoraAdapter(Section):
    """Low-rank adapters beside frozen linear layers (arXiv 2106.09685)."""

    method: Literal["lora"] = "lora"
    """Which method adapts the model."""
    rank: Rank = 16
    """Rank r of the update B A. Parameters grow linearly with it."""
    alpha: Alpha = 32.0
    """The update is scaled by alpha / rank, or as `scaling` says."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Probability of zeroing an input of the adapter while training."""
    targets: str | list[str] = "all-linear"
    """Layers that get an adapter: `all-linear` (all linear layers but the output head; experts held in 3-D tensors are
    none), `attention`, `mlp`, a list of module names (`[q_proj, v_proj]`, matched at the end of the path), or a regular
    expression that matches the whole path. The last two may name embeddings (`[q_proj, embed_tokens]`); an output head
    that shares the embedding's weight keeps the base's."""
    layers: str | list[LayerIndex] = "all"
    """Decoder layers whose targets get an adapter, counted from 0: `all`, `first 8`, `last 8`, a range `4-11` (both
    ends included), or a list `[0, 1, 15]`. Anything but all leaves out targets outside the layers, such as lm_head."""
    scaling: Literal["standard", "rslora"] = "standard"
    """standard: alpha / rank. rslora: alpha / sqrt(rank), with which large ranks keep learning (arXiv 2312.03732)."""
    rank_pattern: dict[str, Rank] = Field(default={})
    """Other ranks for some targets, `{down_proj: 64}`. A key is a regular expression for the end of the module path,
    from a dot on; the first that matches counts."""
    alpha_pattern: dict[str, Alpha] = Field(default={})
    """Other alphas for some targets, matched like rank_pattern."""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "eva", "loftq"] = "default"
    """How A and B start. default: A uniform, B zero. gaussian: A normal, B zero. orthogonal: both random, B A zero.
    pissa (arXiv 2404.02948), olora (arXiv 2406.01775): at the base weight's largest singular directions, or at its QR
    factors; the base itself stays as it is, and the adapter is written as plain LoRA of twice the rank, of the rank
    itself with freeze_a. eva (arXiv 2410.07170): A at the directions in which the layer's inputs vary most over the
    training rows, B zero, and the ranks shared out anew. loftq (arXiv 2310.08659): B A is what a quantized base lacks
    of the full weight, as far as the rank goes; it stays part of the adapter, which then fits only that base. An
    embedding always starts with A zero and B normal, and has no dropout."""
    eva_rho: Annotated[float, Field(ge=1.0, le=64.0)] = 2.0
    """With init eva, the most that a layer's rank may grow: the sum of all ranks stays, a layer whose inputs vary in
    more directions gets up to so many times its own, another less, or none. 1.0: all keep theirs."""
    eva_tokens: PositiveInt = 65_536
    """With init eva, stop after so many tokens of the training rows if the directions still move by then."""
    plus_ratio: Annotated[float, Field(gt=0.0, le=1000.0)] = 1.0
    """LoRA+ (arXiv 2402.12354): B's learning rate is this many times train.learning_rate, which is A's. The paper
    recommends about 16, with a lower rate for A."""
    freeze_a: bool = False
    """LoRA-FA (arXiv 2308.03303): A keeps its initial values and only B is trained. Half the trained parameters or
    fewer, and no layer input has to be kept for the backward pass."""

    bias: Literal["none", "adapter", "all"] = "none"
    """Biases that are trained besides. adapter: those of the layers that have an adapter. all: every bias."""
    train_also: list[str] = Field(default=[])
    """Modules trained whole besides, `[norm, lm_head]`: names matched at the end of the path. Modules that share a
    weight, as lm_head and embed_tokens do in many small models, are trained together. They are stored whole."""
    init_from: str | None = None
    """Start from an adapter that exists, a PEFT folder or a run's folder. It settles rank, alpha, targets, layers,
    scaling, the patterns, bias and train_also; a key written here besides must agree. null: a new adapter."""
    train_tokens: list[Token] = Field(default=[])
    """Tokens of the tokenizer whose rows of the embedding and of the output head are trained, and no other rows:
    `["<tool>", "<|reserved_special_token_0|>"]`. Where they are control tokens, messages may spell them out."""
    add_tokens: list[Token] = Field(default=[])
    """New tokens: added to the tokenizer, which is written with the adapter, and trained like train_tokens. Their rows
    start at the mean of the embedding, which grows where it has no rows to spare."""

    def conflicts(self) -> Iterator[Conflict]:
        """Yield every broken rule that joins keys of this block, and every expression that does not compile."""
        yield from target_conflicts(self.targets)
        for name in ("rank_pattern", "alpha_pattern"):
            for fault in filter(None, map(regex_fault, getattr(self, name))):
                yield Conflict(f"adapter.{name}", fault)
        if not self.layers:
            yield Conflict("adapter.layers", "found nothing (name at least one layer, or write all)")
        elif isinstance(self.layers, str) and not _LAYERS.fullmatch(self.layers):
            message = f"found {self.layers!r} (write all, first 8, last 8, 4-11, or a list of numbers)"
            yield Conflict("adapter.layers", message)
        elif isinstance(self.layers, str) and "-" in self.layers:
            first, last = map(int, self.layers.split("-"))
            if first > last:
                yield Conflict("adapter.layers", f"found {self.layers}, which ends before it begins")
        if self.init != "default" and self.init_from is not None:
            message = f"found {self.init}, but adapter.init_from already says how A and B start (remove one)"
            yield Conflict("adapter.init", message, reads=("adapter.init_from",))
        if self.init == "orthogonal" and any(rank % 2 for rank in (self.rank, *self.rank_pattern.values())):
            message = "found orthogonal, which halves the rank (choose even ranks)"
            yield Conflict("adapter.init", message, reads=("adapter.rank", "adapter.rank_pattern"))
        yield from self._eva_conflicts()
        if self.train_also and self.bias == "all":
            message = (
                "found modules, but adapter.bias all trains parts of them already (use bias adapter or none)"
            )
            yield Conflict("adapter.train_also", message, reads=("adapter.bias",))
        yield from self._token_conflicts()
        if self.freeze_a and self.plus_ratio != 1.0:
            message = (
                f"found {self.plus_ratio}, but A has no learning rate (set train.learning_rate, which is B's)"
            )
            yield Conflict("adapter.plus_ratio", message, reads=("adapter.freeze_a",))

    def _eva_conflicts(self) -> Iterator[Conflict]:
        if self.init != "eva":
            for name in ("eva_rho", "eva_tokens"):
                if (value := getattr(self, name)) != type(self).model_fields[name].default:
                    message = (
                        f"found {value}, but init is {self.init} (set adapter.init: eva, or remove the key)"
                    )
                    yield Conflict(f"adapter.{name}", message, reads=("adapter.init",))

    def loftq_conflicts(self, form: str, merge_base: str) -> Iterator[Conflict]:
        """Yield what init loftq cannot do with a base stored in `form`, or with the base of a merge."""
        if self.init != "loftq":
            return
        if form == "none":
            message = "found loftq, which mends a quantized base (set model.quantize: nf4, or another init)"
            yield Conflict("adapter.init", message, ("adapter.method", "model.quantize"))
        elif merge_base == "full":
            message = (
                "found full, but loftq's adapter holds a correction of the quantized base, which the full one does"
                " not need (use auto or dequantized)"
            )
            yield Conflict("export.merge_base", message, ("adapter.init", "adapter.method", "model.quantize"))

    def _token_conflicts(self) -> Iterator[Conflict]:
        """Yield tokens that are named twice, or beside an adapter that a run starts from."""
        for name in ("train_tokens", "add_tokens"):
            tokens = getattr(self, name)
            for token in sorted({token for token in tokens if tokens.count(token) > 1}):
                yield Conflict(f"adapter.{name}", f"found {token!r} twice")
            if tokens and self.init_from is not None:
                message = f"found {tokens[0]!r} beside adapter.init_from (merge that adapter, and train on the result)"
                yield Conflict(f"adapter.{name}", message, reads=("adapter.init_from",))
        for token in sorted({*self.train_tokens} & {*self.add_tokens}):
            message = f"found {token!r}, which is in adapter.train_tokens too (new tokens are trained anyway)"
            yield Conflict("adapter.add_tokens", message, reads=("adapter.train_tokens",))


class QloraAdapter(LoraAdapter):
    """LoRA on a base whose linear layers are stored in 4 bits (arXiv 2305.14314)."""

    method: Literal["qlora"] = "qlora"  # type: ignore[assignment]
    """Which method adapts the model."""
