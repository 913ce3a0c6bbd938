"""Rows of a step as packed micro-batches: bins by first-fit-decreasing, each one sequence without padding between rows.

First-fit-decreasing needs at most 11/9 of the fewest bins possible, plus 6/9 (Dosa 2007). Rows of equal length come to
lie side by side in a bin, where the attention can take them together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lora_cli.models.packing import documents, positions
from lora_cli.models.prefixes import own_lengths, unfold
from lora_cli.objectives._base import Rows
from lora_cli.targets import Targets
from lora_cli.types import IGNORED, Batch

STEP = 64
"""What the length of a sequence is a multiple of on a CPU, by a last document of which nothing is trained.

A processor prepares the products of each length once and keeps them: in 60 steps of the quickstart, whose sequences
have as many lengths, that comes to 0.5 GB and a tenth of the time.
"""


def bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return the indices of `lengths` in bins of at most `capacity` in all; what is longer has a bin of its own.

    Each goes, the longest first, into the first bin with room. A tree over the bins holds the most room below each of
    its nodes, so that the first bin is found in O(log n).
    """
    leaves = 1 << max(0, len(lengths) - 1).bit_length()
    room = [capacity] * (2 * leaves)  # node k has the children 2k and 2k + 1; the leaves are the bins
    filled: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        needed = min(lengths[index], capacity)
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < needed:
                node += 1
        if node - leaves == len(filled):
            filled.append([])
        filled[node - leaves].append(index)
        room[node] -= needed
        while node > 1:
            node //= 2
            most = max(room[2 * node], room[2 * node + 1])
            if room[node] == most:
                break
            room[node] = most
    return filled


def pack_batches(rows: Rows, *, tokens: int, device: torch.device) -> list[Batch]:
    """Return the rows as packed sequences of at most `tokens` tokens; a longer row is a batch of its own.

    On a CPU a document follows that only fills the sequence up to a multiple of STEP, where there is room for it.
    """
    lengths = [len(example.input_ids) for _, example in rows]
    return [
        pack_rows([rows[index] for index in members], tokens, device) for members in bins(lengths, tokens)
    ]


def pack_rows(rows: Rows, tokens: int, device: torch.device, common: tuple[int, ...] = ()) -> Batch:
    """Return the rows, in their order, as one packed sequence, of a pass of at most `tokens`.

    The first `common[i]` tokens of row i, none of them trained, are those of the row before it, and stand in the
    sequence once; () stands for none in any.
    """
    lengths, firsts = tuple(example.tokens for _, example in rows), common or (0,) * len(rows)
    filler = _filler(sum(own_lengths(lengths, common)), tokens) if device.type == "cpu" else 0
    if filler:
        lengths, common = (*lengths, filler), (*common, 0) if common else ()
    places, start = unfold(lengths, common), 0
    ids, labels, wanted, predictors = [], [], [], []
    for (_, example), first in zip(rows, firsts, strict=True):
        trained = example.trained.copy()
        trained[0] = False  # the token before a document's first one belongs to another document
        assert not trained[:first].any()
        chosen = np.flatnonzero(trained)
        ids.append(example.input_ids[first:])
        labels.append(np.where(trained, example.input_ids, IGNORED)[first:])
        wanted.append(example.input_ids[chosen])
        predictors.append(places[start + chosen - 1])
        start += example.tokens
    ids.append(np.zeros(filler, np.int32))
    labels.append(np.full(filler, IGNORED, np.int32))
    columns = (np.concatenate(one).astype("int64") for one in (ids, labels, wanted, predictors))
    packed_ids, packed_labels, targets, before = (
        torch.from_numpy(one).to(device, non_blocking=True) for one in columns
    )
    return Batch(
        packed_ids[None],
        None,
        packed_labels[None],
        tuple(row for row, _ in rows),
        positions(lengths, device, common),
        documents(lengths, device, common),
        targets=Targets(targets, before, tuple(map(len, wanted))),
    )


def _filler(length: int, tokens: int) -> int:
    """Return how many tokens make a sequence as long as few others are, within a pass of `tokens`."""
    return max(0, min(-(-length // STEP) * STEP, tokens) - length)
