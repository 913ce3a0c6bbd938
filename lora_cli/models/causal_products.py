"""Causal attention by plain matrix products, for a CPU: many documents of many lengths, forward and backward.

torch's fused attention has a slow backward pass on a CPU. As plain products, three things make it cheaper still:

    tiles     the queries of a document go in tiles of rows, each with the keys up to its own end: of the half of the
              products that causality hides, most are not computed
    shapes    lengths are rounded up to a multiple of STEP, and as many documents go together as a power of two says.
              A processor prepares each shape of a product once and keeps it, which costs more than a small product
    gathers   one index takes the rows of all documents into this order, one brings them back; no tile is ever copied

The padding needs no mask: its keys come after all queries that count, its queries are not brought back, and their
gradient is zero. The probabilities of documents up to KEPT tokens are kept for the backward pass, those of longer ones,
whose memory grows with the square, are computed again.

Shapes: B rows, T tokens of a row, H heads, K heads of keys and values (each serves G = H / K of queries), D and E the
widths of a head's keys and values. In a chunk of n documents of L tokens: tiles of m queries with e keys.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_cli.models.prefixes import unfold

STEP = 32
"""What lengths are multiples of, as a processor's vectors are: a softmax over rows of other lengths takes longer."""
TILE = {True: 64, False: 128}
"""Queries of a tile, in documents up to WIDE_FROM tokens and beyond: a wide tile hides less, and is fewer products."""
WIDE_FROM = 256
KEPT = 512
"""Longest document whose probabilities are kept."""
_SCORES = 1 << 21
"""Scores that are computed together; of many more the processor's cache would hold none when the softmax comes."""


@dataclass(frozen=True, slots=True)
class _Tile:
    """Queries `first` to `last` of each document of a chunk, and the keys from `seen` to `last` that they may see."""

    first: int
    last: int
    seen: int


@dataclass(frozen=True, slots=True)
class _Chunk:
    """`count` documents of `length` tokens, padding counted, of which `tiles` are the queries."""

    count: int
    length: int
    tiles: tuple[_Tile, ...]

    @property
    def kept(self) -> bool:
        return self.length <= KEPT


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where the rows of all documents go; a row is one head of one token, and rows count from 0 over all tokens."""

    chunks: tuple[_Chunk, ...]
    queries: Tensor
    """Row of each gathered query, by chunk, tile, document and head; of padding, the document's last."""
    keys: Tensor
    """Row of each gathered key, by chunk, document and head."""
    query_places: Tensor  # (B T H,): where each row of a query went
    key_places: Tensor  # (B T K,)
    padding: Tensor
    """Places of the queries that are padding, or that an earlier document has too."""
    again: Tensor  # (N K,): places of the keys that an earlier document has too, by token and head
    again_tokens: Tensor  # (N,): which tokens they are


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    *,
    scale: float,
    window: int | None,
    common: tuple[int, ...] = (),
) -> Tensor:
    """Attend within documents of these lengths: (B, H, T, D), (B, K, T, D), (B, K, T, E) -> (B, T, H, E).

    The documents lie one after the other in the rows, and none in two of them; what they have in `common` with the
    one before stands there once (`prefixes.py`). `window` is how many tokens a query sees, its own counted; None: all
    before it.
    """
    recorded = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    attended: Tensor = _Products.apply(query, key, value, lengths, common, scale, window, recorded)
    return attended


class _Products(torch.autograd.Function):
    """softmax(scale Q K^T + mask) V, by tiles."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: tuple[int, ...],
        common: tuple[int, ...],
        scale: float,
        window: int | None,
        recorded: bool,
    ) -> Tensor:
        """Compute all tiles, and keep the gathered rows and the probabilities that are worth it."""
        (batch, heads, length), shared = query.shape[:3], key.shape[1]
        plan = _plan(lengths, heads, shared, window, common)
        queries = _rows(query).index_select(0, plan.queries)
        keys, values = (_rows(part).index_select(0, plan.keys) for part in (key, value))
        attended = queries.new_empty(len(queries), value.shape[-1])
        kept: list[Tensor] = []
        for chunk, q, out, k, v in _walk(plan, (heads, shared), (queries, attended), (keys, values)):
            for tile, q_tile, out_tile in _tiles(chunk, heads, shared, q, out):
                weights = _weights(q_tile, k, tile, scale, window)
                torch.bmm(weights, v[:, tile.seen : tile.last], out=out_tile)
                if recorded and chunk.kept:
                    kept.append(weights)
        if recorded:
            ctx.save_for_backward(queries, keys, values, *kept)
            ctx.plan, ctx.scale, ctx.window = plan, scale, window
            ctx.sizes = batch, length, heads, shared
        return attended.index_select(0, plan.query_places).view(batch, length, heads, -1)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of queries, keys and values."""
        plan, scale, window = ctx.plan, ctx.scale, ctx.window
        batch, length, heads, shared = ctx.sizes
        queries, keys, values, *kept = ctx.saved_tensors
        probabilities = iter(kept)
        outer = gradient.reshape(-1, gradient.shape[-1]).index_select(0, plan.queries)
        outer.index_fill_(0, plan.padding, 0.0)
        d_queries, d_keys, d_values = (torch.empty_like(part) for part in (queries, keys, values))
        parts = (queries, outer, d_queries), (keys, values, d_keys, d_values)
        for chunk, q, g, dq, k, v, dk, dv in _walk(plan, (heads, shared), *parts):
            k_sum, v_sum = _Sum(dk, len(chunk.tiles)), _Sum(dv, len(chunk.tiles))
            for tile, q_tile, g_tile, dq_tile in _tiles(chunk, heads, shared, q, g, dq):
                weights = next(probabilities) if chunk.kept else _weights(q_tile, k, tile, scale, window)
                seen = slice(tile.seen, tile.last)
                slopes = torch.bmm(g_tile, v[:, seen].transpose(1, 2))
                scores = torch._softmax_backward_data(slopes, weights, -1, weights.dtype)
                torch.baddbmm(dq_tile, scores, k[:, seen], beta=0, alpha=scale, out=dq_tile)
                k_sum.add(scores, q_tile, seen, scale)
                v_sum.add(weights, g_tile, seen, 1.0)
            k_sum.finish()
            v_sum.finish()

        def back(rows: Tensor, places: Tensor, again: Tensor | None) -> Tensor:
            found = rows.index_select(0, places).view(batch * length, -1)
            if again is not None and len(again):
                others = rows.index_select(0, again).view(len(plan.again_tokens), -1)
                found.index_add_(0, plan.again_tokens, others)
            return found.view(batch, length, -1, rows.shape[-1]).transpose(1, 2)

        return (
            back(d_queries, plan.query_places, None), back(d_keys, plan.key_places, plan.again),
            back(d_values, plan.key_places, plan.again), None, None, None, None, None,
        )  # fmt: skip


class _Sum:
    """The gradient of a chunk's keys or values, a sum over tiles: in float32, as each term is rounded already."""

    def __init__(self, result: Tensor, terms: int) -> None:
        self.result = result  # (n K, L, D)
        exact = torch.promote_types(result.dtype, torch.float32)
        self.total = None if terms == 1 else torch.zeros_like(result, dtype=exact)

    def add(self, left: Tensor, right: Tensor, seen: slice, scale: float) -> None:
        """Add scale left^T right, (n K, G m, e) and (n K, G m, D), to the keys that the tile sees."""
        if self.total is None:
            torch.baddbmm(self.result, left.transpose(1, 2), right, beta=0, alpha=scale, out=self.result)
        else:
            self.total[:, seen].add_(torch.bmm(left.transpose(1, 2), right), alpha=scale)

    def finish(self) -> None:
        """Round the sum into the result."""
        if self.total is not None:
            self.result.copy_(self.total)


def _weights(query: Tensor, keys: Tensor, tile: _Tile, scale: float, window: int | None) -> Tensor:
    """Return a tile's probabilities: (n K, G m, D), (n K, L, D) -> (n K, G m, e)."""
    rows, size = tile.last - tile.first, tile.last - tile.seen
    scores = query.new_empty(len(query), query.shape[1], size)
    visible = keys[:, tile.seen : tile.last].transpose(1, 2)
    torch.baddbmm(scores, query, visible, beta=0, alpha=scale, out=scores)
    by_head = scores.view(len(query), -1, rows, size)
    if window is None:  # all before the tile is seen by all of it
        by_head[..., size - rows :] += _hidden(rows, rows, None, scores.dtype)
    else:
        by_head += _hidden(rows, size, window, scores.dtype)
    return torch.softmax(scores, dim=-1)  # computed in float32 in any case


@functools.lru_cache(maxsize=64)
def _hidden(rows: int, size: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Return -inf where a query must not look, else 0, (rows, size); the last query is at the last key."""
    behind = torch.arange(size - rows, size)[:, None] - torch.arange(size)[None]
    hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
    return torch.zeros(rows, size, dtype=dtype).masked_fill_(hidden, -torch.inf)


def _rows(part: Tensor) -> Tensor:
    """(B, H, T, D) -> (B T H, D), which is a view of what a projection returned."""
    return part.transpose(1, 2).reshape(-1, part.shape[-1])


def _walk(
    plan: _Plan, sizes: tuple[int, int], of_queries: Sequence[Tensor], of_keys: Sequence[Tensor]
) -> Iterator[tuple[Any, ...]]:
    """Yield each chunk with its share of the gathered rows: of queries as they are, of keys as (n K, L, D)."""
    heads, shared = sizes
    first = 0
    for chunk in plan.chunks:
        last = first + chunk.count * chunk.length
        queries = (part[first * heads : last * heads] for part in of_queries)
        keys = (part[first * shared : last * shared] for part in of_keys)
        yield (chunk, *queries, *(part.view(chunk.count * shared, chunk.length, -1) for part in keys))
        first = last


def _tiles(chunk: _Chunk, heads: int, shared: int, *parts: Tensor) -> Iterator[tuple[Any, ...]]:
    """Yield each tile with its share of a chunk's rows, (n K, G m, D)."""
    for tile in chunk.tiles:
        rows = slice(*(chunk.count * heads * place for place in (tile.first, tile.last)))
        yield (tile, *(part[rows].view(chunk.count * shared, -1, part.shape[-1]) for part in parts))


@functools.lru_cache(maxsize=8)
def _plan(
    lengths: tuple[int, ...], heads: int, shared: int, window: int | None, common: tuple[int, ...] = ()
) -> _Plan:
    """Return the order of the rows; asked by each layer of a pass, and made once."""
    starts, tokens = np.array([0, *accumulate(lengths)]), unfold(lengths, common)
    firsts, number = np.array(common or [0] * len(lengths)), int(tokens.max()) + 1
    keys: list[npt.NDArray[np.int64]] = []
    chunks, queries, of_queries, of_keys, again, again_tokens = [], [], [], [], [], []
    for members, length in _chunks(lengths, heads):
        start, last = starts[members, None], np.array([lengths[one] for one in members])[:, None] - 1
        within = np.arange(length)
        places = tokens[start + np.minimum(within, last)]  # (n, L)
        own = (within <= last) & (within >= firsts[members, None])
        tiles = tuple(_tiles_of(length, window))
        for tile in tiles:
            part, real = (one[:, None, tile.first : tile.last] for one in (places, own))
            queries.append((part * heads + np.arange(heads)[:, None]).reshape(-1))
            of_queries.append(np.repeat(real, heads, axis=1).reshape(-1))
        first = sum(len(one) for one in keys)
        keys.append((places[:, None] * shared + np.arange(shared)[:, None]).reshape(-1))
        of_keys.append(np.repeat(own[:, None], shared, axis=1).reshape(-1))
        twice = (within <= last) & ~own
        by_token = np.arange(first, first + len(keys[-1])).reshape(len(members), shared, length)
        again.append(by_token.transpose(0, 2, 1)[twice].reshape(-1))
        again_tokens.append(places[twice])
        chunks.append(_Chunk(len(members), length, tiles))
    query_rows, own_queries = np.concatenate(queries), np.concatenate(of_queries)
    key_rows, own_keys = np.concatenate(keys), np.concatenate(of_keys)
    query_places, key_places = np.empty(number * heads, np.int64), np.empty(number * shared, np.int64)
    query_places[query_rows[own_queries]] = np.flatnonzero(own_queries)
    key_places[key_rows[own_keys]] = np.flatnonzero(own_keys)
    found = [query_rows, key_rows, query_places, key_places, np.flatnonzero(~own_queries)]
    return _Plan(tuple(chunks), *map(torch.from_numpy, [*found, *map(np.concatenate, (again, again_tokens))]))


def _chunks(lengths: tuple[int, ...], heads: int) -> Iterator[tuple[list[int], int]]:
    """Yield documents that are computed together, and their rounded length."""
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_length.setdefault(-(-length // STEP) * STEP, []).append(index)
    for length, members in sorted(by_length.items()):
        most = max(1, _SCORES // (heads * length * min(length, TILE[length <= WIDE_FROM])))
        while members:
            count = 1 << min(most, len(members)).bit_length() - 1
            yield members[:count], length
            members = members[count:]


def _tiles_of(length: int, window: int | None) -> Iterator[_Tile]:
    size = TILE[length <= WIDE_FROM]
    for first in range(0, length, size):
        seen = 0 if window is None else max(0, first - window + 1) // STEP * STEP
        yield _Tile(first, min(first + size, length), seen)
