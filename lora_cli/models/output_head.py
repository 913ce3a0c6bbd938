"""Whether a model's logits are those of its output head over its decoder's last hidden states: tried, not looked up.

Then the losses can be had without all logits (`linear_cross_entropy.py`). Two short random documents go through the
model itself and through decoder and head apart, and the logits must be the same; a scaling or a soft cap that the
model's configuration names is part of the comparison. The hidden states are tried as they come and enlarged, since a
cap does next to nothing to small logits. What fails: a model whose code does more to its logits, or reads the head's
weight past the layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli.models.linear_cross_entropy import Scaling, token_losses
from lora_cli.models.memory import is_out_of_memory
from lora_cli.models.packing import documents, positions

LENGTHS = (19, 13)
"""Tokens of the documents, of which the shorter is padded."""

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.01}
"""Difference of all logits as a part of their Euclidean norm: a cap in bfloat16 rounds them four times."""

_LARGE = 100.0
"""Largest logit of the second trial: beyond all caps that models have (30 to 50)."""

_MULTIPLIERS = (
    "logit_scale",  # Cohere: multiplied
    "logits_scaling",  # Granite: divided by it; HyperCLOVA X: multiplied
    "lm_head_multiplier",  # Falcon-H1: multiplied
    "output_multiplier",  # Muse: multiplied, then capped
)
_CAP = "final_logit_softcapping"  # Gemma 2 and later
"""Keys of a configuration that name what becomes of the logits."""


@dataclass(frozen=True, slots=True)
class OutputHead:
    """A model's decoder and its output head, whose scaled product the model's logits were seen to be."""

    decoder: nn.Module
    head: nn.Module
    scaling: Scaling

    def hidden(self, **arguments: Any) -> Tensor:
        """Return the last hidden states (B, T, H) of the decoder, for the arguments of the model's own forward."""
        states: Tensor = self.decoder(**arguments, use_cache=False).last_hidden_state
        return states

    def token_losses(self, hidden: Tensor, targets: Tensor, *, best: bool) -> tuple[Tensor, Tensor | None]:
        """Return what `linear_cross_entropy.token_losses` does, by this head: (N, H), (N,) -> (N,), (N,) or None."""
        return token_losses(hidden, targets, self.head, scaling=self.scaling, best=best)


@torch.no_grad()
def find_head(model: PreTrainedModel, *, packs: bool) -> OutputHead | str:
    """Return the model's decoder and head, or why its logits are not theirs; with `packs` also of packed documents."""
    decoder, head = _decoder(model), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if decoder is None or not isinstance(head, nn.Module):
        return "it has no decoder and head of their own"
    training = {module for module in model.modules() if module.training}
    model.eval()  # dropout would differ from pass to pass
    try:
        scalings = list(_candidates(model.config.get_text_config()))
        apart = [0.0] * len(scalings)
        for arguments in _trials(model, packs=packs):
            found = _distances(model, decoder, head, scalings, arguments)
            apart = [max(pair) for pair in zip(apart, found, strict=True)]
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        return str(error).splitlines()[0]
    finally:
        for module in training:
            module.training = True
    best = min(range(len(scalings)), key=apart.__getitem__)
    if not apart[best] <= 1.0:
        return "its logits are not the product of its last hidden states with its head"
    return OutputHead(decoder, head, scalings[best])


def _decoder(model: PreTrainedModel) -> nn.Module | None:
    if model.base_model is not model:
        return model.base_model
    # Llama 4's text model names its decoder otherwise than its class says.
    inner = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    return inner[0] if len(inner) == 1 else None


def _candidates(config: Any) -> Iterator[Scaling]:
    """Yield what may become of the logits, what the configuration names first."""
    named = [getattr(config, name, None) for name in _MULTIPLIERS]
    factors = [float(value) for value in named if isinstance(value, int | float) and value]
    cap = getattr(config, _CAP, None)
    caps = [float(cap), None] if cap else [None]
    multipliers = [*factors, *(1 / value for value in factors), 1.0]
    for multiplier, one in product(multipliers, caps):
        yield Scaling(multiplier, one)


def _trials(model: PreTrainedModel, *, packs: bool) -> Iterator[Mapping[str, Any]]:
    embedding: Any = model.get_input_embeddings()  # type: ignore[no-untyped-call]
    size, generator = embedding.weight.shape[0], torch.Generator().manual_seed(0)
    parts = [torch.randint(size, (length,), generator=generator).to(model.device) for length in LENGTHS]
    ids = nn.utils.rnn.pad_sequence(parts, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(part) for part in parts], batch_first=True)
    yield {"input_ids": ids, "attention_mask": mask}
    if packs:
        yield {
            "input_ids": torch.cat(parts)[None],
            "attention_mask": None,
            "position_ids": positions(LENGTHS, model.device),
            "documents": documents(LENGTHS, model.device),
        }


def _distances(
    model: PreTrainedModel,
    decoder: nn.Module,
    head: nn.Module,
    scalings: list[Scaling],
    arguments: Mapping[str, Any],
) -> list[float]:
    """Return how far each scaling is at most from the model's own logits, in multiples of what is allowed."""
    output = decoder(**arguments, use_cache=False)
    states = output.last_hidden_state
    largest = float(head(states).abs().max())
    apart = [0.0] * len(scalings)
    for factor in (1.0, _LARGE / max(largest, 1e-6)):
        # What the decoder gives the model was seen with the first factor; a pass through it costs time.
        settled = nullcontext() if factor == 1.0 else _settled(decoder, output)
        with _enlarged(head, factor), settled:
            own = model(**arguments, use_cache=False).logits.float()
        plain = head(states * factor).float()
        if own.shape != plain.shape:
            return [math.inf] * len(scalings)
        size = max(float(own.norm()), 1e-30)  # the head of a reward model is zero
        allowed = TOLERANCES.get(states.dtype, TOLERANCES[torch.bfloat16]) * size
        found = [float((one.apply_(plain.clone()) - own).norm()) / allowed for one in scalings]
        apart = [max(pair) for pair in zip(apart, found, strict=True)]
    return [value if math.isfinite(value) else math.inf for value in apart]


@contextmanager
def _settled(module: nn.Module, output: object) -> Iterator[None]:
    """Within it a module returns this and computes nothing."""
    own = module.__dict__.get("forward")
    module.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def _enlarged(head: nn.Module, factor: float) -> Iterator[None]:
    """Within it the head computes on hidden states `factor` times as large."""
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * factor, *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()
