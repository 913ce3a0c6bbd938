"""Documents that begin alike: what they have in common stands in a packed sequence once.

    sequence     P C R           P: a prompt, C and R: two answers to it
    documents    P C | P R       what attention sees

Layers compute each token by itself, but for attention. What P is to it does not depend on what follows, so P's outputs
are the same in both documents, and those of the first are taken; the gradients of P's keys and values are sums over
both. The positions of C and R both begin behind P.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@functools.lru_cache(maxsize=8)
def unfold(lengths: tuple[int, ...], common: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Return where each token of each document stands in the sequence, (sum of lengths,).

    The first `common[i]` tokens of document i are those of the document before it; () stands for none in any.
    """
    if not common:
        return np.arange(sum(lengths))
    documents: list[npt.NDArray[np.int64]] = []
    end = 0
    for length, shared in zip(lengths, common, strict=True):
        assert shared <= (len(documents[-1]) if documents else 0)
        own = np.arange(end, end + length - shared)
        documents.append(np.concatenate([documents[-1][:shared], own]) if shared else own)
        end += len(own)
    return np.concatenate(documents)


@functools.lru_cache(maxsize=8)
def unfolding(
    lengths: tuple[int, ...], common: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return `unfold` as a tensor, (sum of lengths,), and the first place of each of the T tokens in it, (T,)."""
    order = unfold(lengths, common)
    _, places = np.unique(order, return_index=True)
    return torch.from_numpy(order).to(device), torch.from_numpy(places).to(device)


def own_lengths(lengths: Sequence[int], common: Sequence[int]) -> list[int]:
    """Return how many tokens of each document stand in the sequence on its account."""
    return [length - shared for length, shared in zip(lengths, common or [0] * len(lengths), strict=True)]
