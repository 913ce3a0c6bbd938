"""Whether a model keeps documents apart that share a sequence: tried on the very model in use, not looked up in a list.

Two short random documents go through the model packed, and each in a row of its own with the attention that
transformers gives the model. The packed logits must be those of the documents alone. What fails: state-space and
convolution layers, which run over the boundary; models that count positions themselves, that bypass transformers'
AttentionInterface, or that make masks of their own; and a sliding window that a mask has but the layers are not told
of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lora_cli.models import attention
from lora_cli.models.prefixes import own_lengths
from lora_cli.types import Documents

LENGTHS = (19, 13)
"""Tokens of the documents: unlike, and longer than any convolution over time."""

TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest difference of a document's logits, packed from alone, as a part of what an open boundary would make.

Rounding gives less than 1e-6 in float32 and at most 0.02 in bfloat16, over eleven architectures; a leak gives about 1.
"""


def positions(lengths: tuple[int, ...], device: torch.device, common: tuple[int, ...] = ()) -> Tensor:
    """Return the position ids of a packed sequence, (1, T) int64: they begin at 0 in each document.

    Those of a document that has its first tokens in `common` with the one before it go on behind them.
    """
    firsts = common or (0,) * len(lengths)
    parts = [torch.arange(first, length) for first, length in zip(firsts, lengths, strict=True)]
    return torch.cat(parts)[None].to(device)


def documents(lengths: tuple[int, ...], device: torch.device, common: tuple[int, ...] = ()) -> Documents:
    """Return where documents of these lengths lie in a packed sequence, and what each has in `common`."""
    offsets = torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)
    return Documents(lengths, offsets.to(device), common)


@torch.no_grad()
def keep_apart(model: PreTrainedModel) -> str | None:
    """Give the model the attention that keeps packed documents apart, and return None; else why it does not.

    In that case the model has its former attention again.
    """
    training = {module for module in model.modules() if module.training}
    model.eval()  # a new adapter layer may draw a dropout, in a model that was loaded for evaluation
    try:
        return _try(model)
    finally:
        for module in training:
            module.training = True


def _try(model: PreTrainedModel) -> str | None:
    former = model.config._attn_implementation
    embedding: Any = model.get_input_embeddings()
    ids = torch.randint(
        embedding.weight.shape[0], (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0)
    ).to(model.device)
    # In one pass, since a pass costs time: what follows a document in its row, a causal model does not see.
    rows = [F.pad(part, (0, ids.shape[1] - part.shape[1])) for part in (*ids.split(LENGTHS, 1), ids)]
    *alone, joined = _logits(model, torch.cat(rows))
    model.set_attn_implementation(attention.NAME)
    alone = [logits[:length] for logits, length in zip(alone, LENGTHS, strict=True)]
    reason = _compare(model, ids, torch.cat(alone), joined)
    if reason is not None:
        model.set_attn_implementation(former)
    return reason


@torch.no_grad()
def share_prefixes(model: PreTrainedModel) -> bool:
    """Say whether documents that begin alike may share their beginning, in a model in evaluation that packs.

    Tried as `keep_apart` is. A layer that finds the documents by positions that are 0 would fail.
    """
    embedding: Any = model.get_input_embeddings()
    size, draw = embedding.weight.shape[0], torch.Generator().manual_seed(0)
    long, prompt = LENGTHS
    first, one, other = (torch.randint(size, (1, n), generator=draw) for n in (prompt, long - 3, long))
    lengths = (prompt + long - 3, prompt + long, long)
    apart = _by_document(model, torch.cat([first, one, first, other, other], 1), lengths)
    shared = _by_document(model, torch.cat([first, one, other, other], 1), lengths, (0, prompt, 0))
    leak = max(_distance(shared[0], apart[0]), _distance(shared[1], apart[1][prompt:]))
    return leak <= _tolerance(model) * _distance(apart[2], apart[1][prompt:])


def _by_document(
    model: PreTrainedModel, ids: Tensor, lengths: tuple[int, ...], common: tuple[int, ...] = ()
) -> list[Tensor]:
    """Return the logits (T, V) of each document's own tokens."""
    places, where = positions(lengths, model.device, common), documents(lengths, model.device, common)
    (logits,) = _logits(
        model, ids.to(model.device), attention_mask=None, position_ids=places, documents=where
    )
    return list(logits.split(own_lengths(lengths, common)))


def _compare(model: PreTrainedModel, ids: Tensor, alone: Tensor, joined: Tensor) -> str | None:
    if model.config.get_text_config()._attn_implementation != attention.NAME:
        return "its attention does not go through transformers' AttentionInterface"
    packed = {
        "position_ids": positions(LENGTHS, ids.device), "documents": documents(LENGTHS, ids.device)
    }  # fmt: skip
    try:
        with attention.watch_windows() as windows:
            (together,) = _logits(model, ids, attention_mask=None, **packed)
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        return str(error).splitlines()[0]
    if not windows.layers:
        return "its layers do not call transformers' AttentionInterface"
    if attention.lost_windows(windows, getattr(model.config.get_text_config(), "layer_types", None) or ()):
        return "its layers are not told of the windows that its masks have"
    leak, opened = _distance(together, alone), _distance(joined, alone)
    if not leak <= _tolerance(model) * opened:
        return f"the logits of a document change by {leak:.2g} when it is packed, by {opened:.2g} when it is open"
    return None


def _tolerance(model: PreTrainedModel) -> float:
    # Not the model's own `dtype`: an embedding that is trained comes first, with float32 weights.
    frozen = (weight.dtype for weight in model.parameters() if not weight.requires_grad)
    return TOLERANCES[next(frozen, model.dtype)]


def _logits(model: PreTrainedModel, ids: Tensor, **arguments: Any) -> Tensor:
    """(B, T) -> (B, T, V) float32."""
    logits: Tensor = model(input_ids=ids, use_cache=False, **arguments).logits
    return logits.float()


def _distance(one: Tensor, other: Tensor) -> float:
    """Return the largest Euclidean distance between the logits of a position: (T, V), (T, V)."""
    return float((one - other).norm(dim=-1).max())
