"""Rows of a step as packed micro-batches: bins by first-fit-decreasing, each one sequence without padding between rows.

First-fit-decreasing needs at most 11/9 of the fewest bins possible, plus 6/9 (Dosa 2007). Rows of equal length come to
lie side by side in a bin, where the attention can take them together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_cli.models.packing import documents, positions
from lora_cli.objectives._base import Rows
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


def pack_rows(rows: Rows, tokens: int, device: torch.device) -> Batch:
    """Return the rows, in their order, as one packed sequence, of a pass of at most `tokens`."""
    lengths = tuple(len(example.input_ids) for _, example in rows)
    ids = torch.cat([torch.from_numpy(example.input_ids.astype("int64")) for _, example in rows])
    trained = torch.cat([torch.from_numpy(example.trained.copy()) for _, example in rows])
    filler = _filler(len(ids), tokens) if device.type == "cpu" else 0
    if filler:
        lengths = (*lengths, filler)
        ids, trained = (torch.nn.functional.pad(part, (0, filler)) for part in (ids, trained))
    places = positions(lengths, ids.device)
    # The token before a document's first one belongs to another document.
    labels = torch.where(trained & (places[0] != 0), ids, IGNORED)
    return Batch(
        ids[None].to(device, non_blocking=True),
        None,
        labels[None].to(device, non_blocking=True),
        tuple(row for row, _ in rows),
        places.to(device, non_blocking=True),
        documents(lengths, device),
    )


def _filler(length: int, tokens: int) -> int:
    """Return how many tokens make a sequence as long as few others are, within a pass of `tokens`."""
    return max(0, min(-(-length // STEP) * STEP, tokens) - length)
