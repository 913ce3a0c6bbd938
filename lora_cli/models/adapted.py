"""The one place where adapters and objectives meet: a model that scores tokens, generates, and can be its own base.

Shapes: B rows, T tokens, N trained tokens of a batch, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from lora_cli.models import norms
from lora_cli.models.output_head import OutputHead
from lora_cli.models.packing import share_prefixes
from lora_cli.types import Batch, Documents

State = Literal["live", "base", "began"]
"""What the model computes as: itself, its base, or what training began with."""


class Switchable(Protocol):
    """An adapter layer, as far as this floor needs to know it."""

    enabled: bool


class AdaptedModel:
    """A transformers model with adapter layers, or with weights that are trained and a frozen copy of the old ones."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Mapping[str, Switchable],
        frozen_copy: Mapping[str, Tensor] | None = None,
        *,
        began: Mapping[str, Mapping[str, nn.Parameter]] | None = None,
        packs: bool = False,
        head: OutputHead | None = None,
    ) -> None:
        self.model = model
        self.layers = layers
        self.packs = packs
        """Whether rows may share a sequence: each was seen to be kept apart in this very model (`packing.py`)."""
        self.head = head
        """What makes the losses without all logits; None: they are made of the model's own logits."""
        self._frozen_copy = frozen_copy or {}
        self._began = [
            _Stored(model.get_submodule(path), name, value)
            for path, values in (began or {}).items()
            for name, value in values.items()
        ]
        """The values of the adapters that training begins with, where it does not begin as the base (`values_of`)."""
        self._state: State = "live"
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    @cached_property
    def shares_prompts(self) -> bool:
        """Whether answers to one prompt may share its tokens in a packed sequence; tried when it is asked first."""
        with self.evaluating():
            return self.packs and share_prefixes(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """What the base is stored and computes in; an adapted embedding comes first, with trained float32 weights."""
        frozen = (weight.dtype for weight in self.model.parameters() if not weight.requires_grad)
        return next(frozen, self.model.dtype)

    def token_losses(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return each trained token's negative log-likelihood (N,) float32, with its gradient.

        In evaluation the second is whether the token was the most likely one, (N,) bool; None while training. Tokens
        come row by row as in `batch.targets`, so that what a row sums to, a log-probability of an answer, say,
        is a sum over its part of them. No logits of more than a few tokens are alive at a time where `head` is known.
        """
        best = not self.model.training
        if self.head is None:
            logits, wanted = self.trained_logits(batch)
            losses = nn.functional.cross_entropy(logits.float(), wanted, reduction="none")
            return losses, logits.argmax(dim=-1) == wanted if best else None
        return self.head.token_losses(self._predicting(batch, self.head), batch.targets.tokens, best=best)

    def token_losses_and_states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what `token_losses` does first, (N,), and the last hidden state that predicts each token, (N, H)."""
        targets = batch.targets
        if self.head is not None:
            chosen = self._predicting(batch, self.head)
            return self.head.token_losses(chosen, targets.tokens, best=False)[0], chosen
        output = self.model(**self._arguments(batch), use_cache=False, output_hidden_states=True)
        logits, chosen = (
            one.flatten(0, 1).index_select(0, targets.predictors)
            for one in (output.logits, output.hidden_states[-1])
        )
        return nn.functional.cross_entropy(logits.float(), targets.tokens, reduction="none"), chosen

    def states_at(self, batch: Batch, places: Tensor) -> Tensor:
        """Return the decoder's last hidden states at places of the batch flattened, (A,) -> (A, H), with gradients."""
        hidden = self.model.base_model(**self._arguments(batch), use_cache=False).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, places)

    def trained_logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the logits (N, V) that predict each trained token, and those tokens (N,)."""
        targets, arguments = batch.targets, self._arguments(batch)
        index, length = targets.predictors, batch.input_ids.shape[1]
        if self._keeps_logits:
            # The head is the largest product of small models; it is applied only where some row trains.
            columns, places = torch.unique(index % length, return_inverse=True)
            arguments["logits_to_keep"] = columns
            index = index // length * len(columns) + places
        logits: Tensor = self.model(**arguments, use_cache=False).logits
        return logits.flatten(0, 1).index_select(0, index), targets.tokens

    def _predicting(self, batch: Batch, head: OutputHead) -> Tensor:
        """Return the last hidden state before each trained token, (N, H)."""
        hidden = head.hidden(**self._arguments(batch))
        # Index by index: the backward pass of a boolean mask would sort.
        return hidden.flatten(0, 1).index_select(0, batch.targets.predictors)

    def _arguments(self, batch: Batch) -> dict[str, Tensor | Documents | None]:
        """Return what the model is called with, but for `use_cache`: false, or a document would see the one before."""
        arguments: dict[str, Tensor | Documents | None] = {
            "input_ids": batch.input_ids, "attention_mask": batch.attention_mask
        }  # fmt: skip
        if batch.documents is not None:
            assert self.packs
            assert batch.position_ids is not None
            arguments |= {"position_ids": batch.position_ids, "documents": batch.documents}
        return arguments

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[np.ndarray], *, max_new_tokens: int, stop_ids: Sequence[int], pad_id: int
    ) -> list[list[int]]:
        """Return the greedy continuation of each prompt, without its terminator; prompts are padded at the left."""
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), longest), pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask[row, longest - len(prompt) :] = 1
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(stop_ids),
            pad_token_id=pad_id,
            use_cache=True,
        )
        # generate() would fill unset values (a repetition penalty, say) from the model's own generation config.
        own, self.model.generation_config = self.model.generation_config, settings
        try:
            output: Tensor = self.model.generate(  # type: ignore[operator]
                ids.to(self.device), attention_mask=mask.to(self.device), generation_config=settings
            )
        finally:
            self.model.generation_config = own
        return [_until(row, stop_ids) for row in output[:, longest:].tolist()]

    @property
    def is_reference(self) -> bool:
        """Whether the model is its own base at the moment."""
        return self._state == "base"

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it the model is its own base: adapters off, or the frozen copy of fully trained weights in place.

        One within another changes nothing.
        """
        with self._as("base"):
            yield

    @contextmanager
    def as_it_began(self) -> Iterator[None]:
        """Within it the model is what training began with, without dropout or gradient.

        That is the base, or where the run starts from an adapter the base with that one. It rounds as the pass beside
        it does: a difference of a rounding in each layer adds up to several nats over an answer.
        """
        alike = norms.as_while_training() if self.model.training else nullcontext()
        with alike, self.evaluating(), self._as("began" if self._began else "base"):
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it dropout is off and no gradient is recorded."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(training)

    @contextmanager
    def _as(self, state: State) -> Iterator[None]:
        before = self._state
        self._become(state)
        try:
            yield
        finally:
            self._become(before)

    @torch.no_grad()
    def _become(self, state: State) -> None:
        before, self._state = self._state, state
        if before == state:
            return
        if "base" in (before, state):
            for layer in self.layers.values():
                layer.enabled = state != "base"
            for name, copy in self._frozen_copy.items():
                parameter = self.model.get_parameter(name)
                trained = parameter.detach().clone()
                parameter.copy_(copy)
                copy.copy_(trained)
        if "began" in (before, state):
            for stored in self._began:
                stored.exchange()


@dataclass(slots=True)
class _Stored:
    """A parameter that stands in for the one that a module has, and the other way round after `exchange`."""

    module: nn.Module
    name: str
    value: nn.Parameter

    def exchange(self) -> None:
        """Give the module this parameter, and keep its own; none is copied, so that a graph recorded before holds."""
        self.value, own = self.module.get_parameter(self.name), self.value
        self.module.register_parameter(self.name, own)


def values_of(modules: Mapping[str, nn.Module]) -> dict[str, dict[str, nn.Parameter]]:
    """Return a copy of what is trained of adapter layers, by path and name; modules that share a value share its copy.

    It takes 4 bytes a trained parameter. What of a layer is frozen is not copied: it stays what it is.
    """
    copies: dict[int, nn.Parameter] = {}
    found: dict[str, dict[str, nn.Parameter]] = {}
    for path, module in modules.items():
        for name, own in module.named_parameters(recurse=False):
            if own.requires_grad:
                if id(own) not in copies:
                    copies[id(own)] = nn.Parameter(own.detach().clone())
                found.setdefault(path, {})[name] = copies[id(own)]
    return found


def _until(ids: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
    kept = []
    for token in ids:
        if token in stop_ids:
            break
        kept.append(token)
    return kept
