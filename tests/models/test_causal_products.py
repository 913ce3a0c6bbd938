"""Attention by tiles is torch's own attention of each document alone, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import eager_attention_forward

from lora_cli.models import causal_products

LENGTHS = (33, 1, 64, 65, 146, 31, 146, 32, 257, 5, 146, 530)
"""On both sides of a step, of a tile, of the wide tiles and of what is kept; equal ones apart."""

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(
    lengths: tuple[int, ...] = LENGTHS, dtype: torch.dtype = torch.float32, shared: int = 2, wide: int = 8
) -> list[Tensor]:
    """Return queries of 4 heads, keys and values of `shared` heads, the values `wide`, as projections return them."""
    generator = torch.Generator().manual_seed(len(lengths))
    sizes = ((4, 16), (shared, 16), (shared, wide))
    return [
        torch.randn(1, sum(lengths), heads, width, generator=generator)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for heads, width in sizes
    ]


def attention_of(
    lengths: tuple[int, ...],
    window: int | None = None,
    dtype: torch.dtype | None = None,
    *,
    eager: bool = False,
) -> Attention:
    """Return torch's own attention, or transformers' eager one, of one document after the other, in `dtype`."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        found = []
        parts = (part.to(dtype or part.dtype).split(lengths, 2) for part in (query, key, value))
        layer = torch.nn.Module()
        layer.num_key_value_groups = query.shape[1] // key.shape[1]
        for q, k, v in zip(*parts, strict=True):
            places = torch.arange(q.shape[2])
            behind = places[:, None] - places
            visible = (behind >= 0) & (behind < (window or len(places)))
            if eager:
                hidden = torch.zeros(visible.shape, dtype=q.dtype).masked_fill(~visible, -torch.inf)
                found.append(eager_attention_forward(layer, q, k, v, hidden, 0.3)[0].transpose(1, 2))
            else:
                found.append(F.scaled_dot_product_attention(q, k, v, visible, scale=0.3, enable_gqa=True))
        return torch.cat(found, 2).transpose(1, 2)

    return attend


def tiled(lengths: tuple[int, ...], window: int | None = None) -> Attention:
    """Return ours."""
    return lambda q, k, v: causal_products.attend(q, k, v, lengths, scale=0.3, window=window)


def results(attention: Attention, parts: list[Tensor]) -> list[Tensor]:
    """Return what is attended, and the gradients of queries, keys and values under random slopes."""
    attended = attention(*parts)
    slopes = torch.randn(attended.shape, generator=torch.Generator().manual_seed(9))
    return [attended, *torch.autograd.grad(attended, parts, slopes.to(attended.dtype))]


def distance(one: Tensor, other: Tensor) -> float:
    """Return the difference relative to the second, in the 2-norm."""
    mine, right = one.detach().double(), other.detach().double()
    return float((mine - right).norm() / right.norm())


@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 20, 64, 100])
def test_tiles_are_the_attention_of_each_document(shared: int, window: int | None) -> None:
    """In float32 values and all gradients are those of torch's attention in float64, to 1e-6 relative."""
    parts = inputs(shared=shared)
    exact = results(attention_of(LENGTHS, window, torch.float64), parts)
    for ours, theirs in zip(results(tiled(LENGTHS, window), parts), exact, strict=True):
        assert ours.shape == theirs.shape
        assert distance(ours, theirs) <= 1e-6


@pytest.mark.parametrize("window", [None, 64])
def test_bfloat16_is_as_near_as_eager_attention(window: int | None) -> None:
    """In bfloat16 the distance to float64 is at most 1.1 times that of transformers' eager attention."""
    parts = inputs(dtype=torch.bfloat16)
    exact = results(attention_of(LENGTHS, window, torch.float64), parts)
    theirs = results(attention_of(LENGTHS, window, eager=True), parts)
    for mine, other, right in zip(results(tiled(LENGTHS, window), parts), theirs, exact, strict=True):
        assert distance(mine, right) <= 1.1 * distance(other, right)


def test_computed_again_or_kept_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probabilities that are not kept are computed again to the same bits."""
    parts = inputs(dtype=torch.bfloat16)
    kept = results(tiled(LENGTHS), parts)
    monkeypatch.setattr(causal_products, "KEPT", 0)
    assert all(map(torch.equal, results(tiled(LENGTHS), parts), kept))


def test_a_document_does_not_depend_on_the_others() -> None:
    """Values and gradients of a document stay the same to the bit when the others hold other numbers, even NaN."""
    lengths = (33, 146, 33, 40, 33)
    parts = inputs(lengths)
    before = results(tiled(lengths), parts)
    with torch.no_grad():
        for part in parts:
            part[:, :, :33] = torch.nan
            part[:, :, -33:] *= -3.0
    after = results(tiled(lengths), parts)
    # The values lie by token, the gradients by head.
    for old, new in zip(before, after, strict=True):
        axis = 1 if new.shape[1] == sum(lengths) else 2
        assert torch.equal(*(one.narrow(axis, 33, 219) for one in (old, new)))


def test_rows_are_documents_of_one_length() -> None:
    """A batch of rows is attended as so many documents."""
    parts = inputs((100,) * 3)
    rows = [part.unflatten(2, (3, 100))[0].transpose(0, 1) for part in parts]
    assert torch.equal(tiled((100,) * 3)(*rows).flatten(0, 1)[None], tiled((100,) * 3)(*parts))


def test_a_pass_without_gradients_keeps_nothing() -> None:
    """Without gradients the values are the same, and no graph is made."""
    parts = inputs()
    recorded = tiled(LENGTHS)(*parts)
    with torch.no_grad():
        plain = tiled(LENGTHS)(*parts)
    assert torch.equal(plain, recorded)
    assert recorded.grad_fn is not None
    assert plain.grad_fn is None


def test_lengths_come_to_few_shapes() -> None:
    """200 batches of documents of 1 to 500 tokens are made of at most 100 shapes of chunks."""
    generator = torch.Generator().manual_seed(0)
    shapes = set()
    for _ in range(200):
        lengths = tuple(torch.randint(1, 501, (20,), generator=generator).tolist())
        plan = causal_products._plan(lengths, 4, 2, None)
        shapes |= {(chunk.count, chunk.length) for chunk in plan.chunks}
        assert sum(chunk.count for chunk in plan.chunks) == 20
    assert len(shapes) <= 100
