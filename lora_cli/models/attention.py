"""Causal attention for sequences that hold several documents, each of which sees only itself.

Registered with transformers' AttentionInterface under NAME, with a mask function of its own. It serves every pass of a
model it is set on, so that nothing has to be switched between passes, or back in time for a recomputed layer:

    documents given      packed, (1, T): each document by itself, never a (T, T) mask
    no mask              rows without padding: each row is one document
    a mask               padded rows and generation with a cache: the mask that transformers' own attention would get

On CUDA the packed pass is torch's variable-length attention. On a CPU it is plain matrix products
(`causal_products.py`), as the backward pass of the fused attention is slow there: forward and backward together it
takes 4.4 times as long for 28 documents of 146 tokens, 3 times for 4 of 512, 1.5 times for one of 2,048 (bfloat16, 9
heads of 64, 3 of keys, one thread).

What a layer asks for beyond this (sinks, position biases, attention that is not causal) is refused, not left out.

Shapes: B rows, H heads, K heads of keys and values (each serves H / K of queries), L queries, S keys, D a head's width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from lora_cli.errors import InputError
from lora_cli.models import causal_products
from lora_cli.models.prefixes import unfolding
from lora_cli.types import Documents

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]

NAME = "lora_cli_documents"
"""What transformers knows the attention by."""

PLAIN_PRODUCTS = {torch.bfloat16: 512, torch.float32: 128}
"""Longest row that is plain matrix products on a CPU under a mask or a cap; beyond it its square counts."""

TILED = {torch.bfloat16: 1 << 40, torch.float32: 512}
"""Longest document that is attended by tiles on a CPU, in a batch without a mask, a cap or a dropout."""

_HARMLESS = {
    "position_ids", "cache_position", "past_key_values", "use_cache", "output_attentions", "output_hidden_states",
    "output_router_logits", "num_items_in_batch", "return_dict",
}  # fmt: skip
"""What models hand down that does not change what a causal layer computes."""

_VARLEN = varlen_attn is not None and {"window_size", "enable_gqa", "scale"} <= set(
    inspect.signature(varlen_attn).parameters
)
"""Whether torch's variable-length attention takes windows and shared heads (its first releases did not)."""


class AttentionRefused(InputError):
    """A layer asks for what this attention does not compute."""


@dataclass(slots=True)
class Windows:
    """Sliding windows seen in a pass, None for full attention: asked for as masks, and handed to the layers."""

    masks: set[int | None] = field(default_factory=set)
    layers: set[int | None] = field(default_factory=set)


_watched: ContextVar[Windows | None] = ContextVar("watched", default=None)


@contextmanager
def watch_windows() -> Iterator[Windows]:
    """Within it every mask and every layer notes its window."""
    windows = Windows()
    token = _watched.set(windows)
    try:
        yield windows
    finally:
        _watched.reset(token)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    documents: Documents | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return the attended values: (B, H, L, D), (B, K, S, D), (B, K, S, E) -> (B, L, H, E).

    Raises:
        AttentionRefused: the layer asks for something else than causal attention with a window, a cap or dropout.
    """
    asked = sorted(name for name, given in others.items() if given is not None and name not in _HARMLESS)
    if asked:
        raise AttentionRefused(f"its attention takes {asked[0]}")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise AttentionRefused("its attention is not causal")
    if (windows := _watched.get()) is not None:
        windows.layers.add(sliding_window)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    maths = _Maths(scale, softcap, dropout)
    if documents is not None:
        if attention_mask is not None or query.shape[0] != 1:
            raise AttentionRefused("it makes a mask of its own")
        return _packed(query, key, value, documents, sliding_window, maths), None
    if attention_mask is None:
        if query.shape[2] != key.shape[2]:
            raise AttentionRefused("it hands over a cache without a mask")
        if _suits_tiles(query, query.shape[2], maths):
            lengths = (query.shape[2],) * query.shape[0]
            return causal_products.attend(
                query, key, value, lengths, scale=scale, window=sliding_window
            ), None
        return _rows(query, key, value, sliding_window, maths).transpose(1, 2).contiguous(), None
    if softcap is not None or _is_short(query, key.shape[2]):
        lowest = torch.finfo(query.dtype).min  # not -inf: a padded query may see no key at all
        bias = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, lowest)
        attended = maths.products(query, key, value, bias)
    else:
        attended = maths.fused(query, key, value, attention_mask)
    return attended.transpose(1, 2).contiguous(), None


def make_mask(
    *,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **others: Any,
) -> Tensor | None:
    """Return the mask of padded or cached rows, (B, 1, L, S), True = visible; None where `attend` needs none."""
    if (windows := _watched.get()) is not None:
        windows.masks.add(local_size)
    same = q_length == kv_length
    if attention_mask is None and same and not use_vmap:  # vmap: a pattern of the model's own
        return None
    return sdpa_mask(
        q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip and same, use_vmap=use_vmap, **others,
    )  # fmt: skip


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, make_mask)


@dataclass(frozen=True, slots=True)
class _Maths:
    """The attention of whole rows, in the two ways that torch has for it."""

    scale: float
    softcap: float | None
    dropout: float

    def products(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """Attend by plain products; `bias` is (L, S), or (B, 1, L, S) by row: -> (B, H, L, E)."""
        (batch, heads, length, width), (shared, keys) = query.shape, key.shape[1:3]
        group = heads // shared
        queries = query.reshape(
            batch * shared, group * length, width
        )  # the heads that share keys, one after another
        flipped = key.transpose(-1, -2).reshape(batch * shared, width, keys)
        if bias.dim() == 2:
            bias = bias.repeat(group, 1)
        else:
            bias = (
                bias[:, :, None].expand(batch, shared, group, length, keys).reshape(-1, group * length, keys)
            )
        if self.softcap is None:
            scores = torch.baddbmm(bias, queries, flipped, alpha=self.scale)
        else:  # arXiv 2408.00118, section 2: capped before anything is hidden
            scores = self.softcap * torch.tanh(queries @ flipped * (self.scale / self.softcap)) + bias
        weights = F.softmax(scores, dim=-1)  # computed in float32 in any case
        if self.dropout:
            weights = F.dropout(weights, self.dropout)
        return (weights @ value.reshape(batch * shared, keys, -1)).view(batch, heads, length, -1)

    def fused(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
        """Attend by torch's fused attention; causal where `visible` is None: -> (B, H, L, E)."""
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, dropout_p=self.dropout, is_causal=visible is None,
            scale=self.scale, enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip


def _packed(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, window: int | None, maths: _Maths
) -> Tensor:
    """Attend within each document: (1, H, T, D), (1, K, T, D), (1, K, T, E) -> (1, T, H, E)."""
    lengths, common = documents.lengths, documents.common
    if _suits_tiles(query, max(lengths), maths):
        return causal_products.attend(
            query, key, value, lengths, scale=maths.scale, window=window, common=common
        )
    if common:
        order, places = unfolding(lengths, common, query.device)
        # By token, as projections return them, and as they are read again.
        q, k, v = (
            part.transpose(1, 2).index_select(1, order).transpose(1, 2) for part in (query, key, value)
        )
        return _packed(q, k, v, replace(documents, common=()), window, maths).index_select(1, places)
    if (
        query.is_cuda
        and _VARLEN
        and maths.softcap is None
        and not maths.dropout
        and _suits_varlen(query, value)
    ):
        longest = max(lengths)
        q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
        out: Any = varlen_attn(
            q, k, v, documents.offsets, documents.offsets, longest, longest, scale=maths.scale,
            window_size=(-1 if window is None else window - 1, 0), enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        return out[None]
    runs = [(length, len(list(equal))) for length, equal in groupby(lengths)]
    # One split and one cat: a slice a document would fill a gradient of the whole sequence each.
    sizes = [length * count for length, count in runs]
    parts = zip(runs, query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    attended = [
        _rows(_as_rows(q, *run), _as_rows(k, *run), _as_rows(v, *run), window, maths)
        for run, q, k, v in parts
    ]
    return torch.cat([rows.transpose(1, 2).flatten(0, 1) for rows in attended])[None]


def _is_short(query: Tensor, length: int) -> bool:
    return query.device.type == "cpu" and length <= PLAIN_PRODUCTS.get(query.dtype, 0)


def _suits_tiles(query: Tensor, longest: int, maths: _Maths) -> bool:
    plain = maths.softcap is None and not maths.dropout
    return plain and query.device.type == "cpu" and longest <= TILED.get(query.dtype, 0)


def _suits_varlen(query: Tensor, value: Tensor) -> bool:
    return query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] == value.shape[-1] <= 256


def _as_rows(part: Tensor, length: int, count: int) -> Tensor:
    """(1, K, count * length, D) -> (count, K, length, D)."""
    return part[0].unflatten(1, (count, length)).transpose(0, 1)


def _rows(query: Tensor, key: Tensor, value: Tensor, window: int | None, maths: _Maths) -> Tensor:
    """Attend causally in rows without padding: (B, H, L, D), (B, K, L, D), (B, K, L, E) -> (B, H, L, E)."""
    length = query.shape[2]
    if window is not None and window >= length:
        window = None
    if maths.softcap is not None or _is_short(query, length):
        hidden = ~_visible(length, window, query.device)
        bias = torch.zeros_like(hidden, dtype=query.dtype).masked_fill(hidden, -torch.inf)
        return maths.products(query, key, value, bias)
    return maths.fused(query, key, value, None if window is None else _visible(length, window, query.device))


def _visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """Return which keys a query sees, (L, L): itself and those before it, `window` in all."""
    visible = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return visible if window is None else visible.triu(1 - window)


def lost_windows(windows: Windows, kinds: Sequence[str]) -> bool:
    """Say whether the layers were handed other windows than the model's masks have; `kinds` are its layer types."""
    asked = windows.masks
    if kinds and "full_attention" not in kinds:
        asked = asked - {None}  # made for no layer
    return bool(asked) and asked != windows.layers
