"""Documents that begin alike are computed as if each stood there whole, on every kind of attention."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import PACKS, make
from test_causal_products import attention_of, distance, inputs, results
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from lora_cli.models import attention, causal_products, packing
from lora_cli.models.prefixes import own_lengths, unfold, unfolding

CPU = torch.device("cpu")
LENGTHS = (70, 90, 33, 64, 40, 41, 300, 520, 9, 12)
COMMON = (0, 60, 0, 0, 33, 17, 0, 280, 0, 9)
"""Pairs whose halves are of different tiles; one of three; one that ends where the other begins; one beside none."""


def naive(lengths: tuple[int, ...], common: tuple[int, ...]) -> list[list[int]]:
    """Return where the tokens of each document stand, told token by token."""
    documents: list[list[int]] = []
    end = 0
    for length, shared in zip(lengths, common, strict=True):
        document = []
        for token in range(length):
            if token < shared:
                document.append(documents[-1][token])
            else:
                document.append(end)
                end += 1
        documents.append(document)
    return documents


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Draw lengths, and of each how much is in common with the one before."""
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    pairs = zip([0, *lengths], lengths, strict=False)
    common = [draw(st.integers(0, min(before, own))) for before, own in pairs]
    return tuple(lengths), tuple(common)


@given(layouts())
@settings(deadline=None, max_examples=200)
def test_documents_are_unfolded(layout: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Every token of every document is found where it stands, and of each token the first place that has it."""
    lengths, common = layout
    documents = naive(lengths, common)
    order, places = unfolding(lengths, common, CPU)
    flat = [token for document in documents for token in document]
    assert order.tolist() == flat == unfold(lengths, common).tolist()
    assert places.tolist() == [flat.index(token) for token in range(sum(own_lengths(lengths, common)))]
    positions = packing.positions(lengths, CPU, common)[0].tolist()
    expected = [range(first, length) for first, length in zip(common, lengths, strict=True)]
    assert positions == [place for one in expected for place in one]


def folded(window: int | None) -> Any:
    """Return ours, over what stands in the sequence."""
    return lambda q, k, v: causal_products.attend(q, k, v, LENGTHS, scale=0.3, window=window, common=COMMON)


def unfolded(window: int | None, **how: Any) -> Any:
    """Return torch's attention of each whole document, from which the first place of each token is taken."""
    order, places = unfolding(LENGTHS, COMMON, CPU)
    whole = attention_of(LENGTHS, window, **how)

    def attend(*parts: Tensor) -> Tensor:
        return whole(*(part.index_select(2, order) for part in parts)).index_select(1, places)

    return attend


@pytest.mark.parametrize("shared", [1, 4])
@pytest.mark.parametrize("window", [None, 20, 100])
def test_tiles_are_the_attention_of_each_whole_document(shared: int, window: int | None) -> None:
    """In float32 values and all gradients are those of torch's attention in float64, to 1e-6 relative."""
    parts = inputs(tuple(own_lengths(LENGTHS, COMMON)), shared=shared)
    exact = results(unfolded(window, dtype=torch.float64), parts)
    for ours, theirs in zip(results(folded(window), parts), exact, strict=True):
        assert ours.shape == theirs.shape
        assert distance(ours, theirs) <= 1e-6


def test_bfloat16_is_as_near_as_eager_attention() -> None:
    """In bfloat16 the distance to float64 is at most 1.1 times that of transformers' eager attention."""
    parts = inputs(tuple(own_lengths(LENGTHS, COMMON)), dtype=torch.bfloat16)
    exact = results(unfolded(None, dtype=torch.float64), parts)
    theirs = results(unfolded(None, eager=True), parts)
    for mine, other, right in zip(results(folded(None), parts), theirs, exact, strict=True):
        assert distance(mine, right) <= 1.1 * distance(other, right)


def test_where_nothing_is_in_common_nothing_changes() -> None:
    """Zeros for every document are the same bits as none at all."""
    parts = inputs()
    lengths = (33, 1, 64, 65, 146, 31, 146, 32, 257, 5, 146, 530)
    plain, zeros = (
        results(
            lambda q, k, v, common=common: causal_products.attend(
                q, k, v, lengths, scale=0.3, window=None, common=common
            ),
            parts,
        )
        for common in ((), (0,) * len(lengths))
    )
    assert all(map(torch.equal, plain, zeros))


def logits(
    model: PreTrainedModel, ids: Tensor, lengths: tuple[int, ...], common: tuple[int, ...] = ()
) -> Tensor:
    """Return the logits of a packed sequence, with their gradients."""
    found: Tensor = model(
        input_ids=ids, attention_mask=None, use_cache=False,
        position_ids=packing.positions(lengths, CPU, common),
        documents=packing.documents(lengths, CPU, common),
    ).logits[0]  # fmt: skip
    return found


@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("name", PACKS)
def test_every_architecture_shares(name: str, tiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every architecture that packs, logits and gradients are those of whole documents, to 1e-6 of their size."""
    if not tiled:
        monkeypatch.setitem(attention.TILED, torch.float32, 0)
    model = make(copy.deepcopy(PACKS[name]))
    assert packing.keep_apart(model) is None
    assert packing.share_prefixes(model)
    lengths, common = (30, 41, 37, 12), (0, 24, 20, 0)
    ids = torch.randint(1, 96, (1, sum(own_lengths(lengths, common))), generator=torch.manual_seed(0))
    order, _ = unfolding(lengths, common, CPU)
    found = []
    for shared in (True, False):
        model.zero_grad()
        got = logits(model, ids, lengths, common) if shared else logits(model, ids[:, order], lengths)
        whole = got[order] if shared else got
        whole.square().mean().backward()
        gradients = [one.grad.flatten() for one in model.parameters() if one.grad is not None]
        found.append((whole.detach(), torch.cat(gradients)))
    for one, other in zip(*found, strict=True):
        assert distance(one, other) <= 1e-6


def test_a_model_that_cannot_share_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that packs, but takes each document to begin where its own tokens do, is found out by its trial."""
    model = make(copy.deepcopy(PACKS["llama"]))
    assert packing.keep_apart(model) is None

    def by_own_tokens(*args: Any, documents: Any = None, **kwargs: Any) -> Any:
        if documents is not None and documents.common:
            lengths = tuple(own_lengths(documents.lengths, documents.common))
            documents = replace(packing.documents(lengths, CPU), common=())
        return attention.attend(*args, documents=documents, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, by_own_tokens)
    assert not packing.share_prefixes(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", PACKS)
def test_on_a_gpu_documents_share(name: str) -> None:
    """On CUDA in bfloat16 the trial passes on every architecture."""
    model = make(copy.deepcopy(PACKS[name]), torch.bfloat16).cuda()
    assert packing.keep_apart(model) is None
    assert packing.share_prefixes(model)
