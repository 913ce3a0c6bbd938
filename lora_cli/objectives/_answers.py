"""Log-probabilities of whole answers, and batches of pairs of them.

An answer is what is trained of a row. A preference objective compares the two of a pair, so both are in one batch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from lora_cli.models.adapted import AdaptedModel
from lora_cli.objectives._base import Items, group_by_length, pad_rows
from lora_cli.objectives._packing import bins, pack_rows
from lora_cli.types import IGNORED, Batch, Example, PairExample

Extended = TypeVar("Extended", bound=Batch)


@dataclass(frozen=True, slots=True)
class Answers:
    """Of each answer of a batch, (A,) float32: the sum of its tokens' log-probabilities, and how many they are."""

    logps: Tensor
    lengths: Tensor

    @property
    def means(self) -> Tensor:
        """Log-probability by token, (A,)."""
        return self.logps / self.lengths

    def pairs(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return values of the chosen and of the rejected answers: (2 P,) -> (P,), (P,)."""
        return values[0::2], values[1::2]


def extended(batch: Batch, kind: type[Extended], **more: Any) -> Extended:
    """Return a batch as one of a kind that says more of its answers."""
    return kind(**{one.name: getattr(batch, one.name) for one in fields(batch)}, **more)


def answers_of(model: AdaptedModel, batch: Batch) -> Answers:
    """Return what the model gives the answers of a batch, with gradients where they are recorded."""
    losses, _ = model.token_losses(batch)  # (N,)
    places = _places(batch)
    number = batch.input_ids.shape[0] if batch.documents is None else len(batch.documents.lengths)
    counts = torch.bincount(places, minlength=number)
    whole = counts > 0  # a filler of a packed sequence has none
    sums = losses.new_zeros(number).index_add(0, places, -losses)
    return Answers(sums[whole], counts[whole].to(losses.dtype))


def _places(batch: Batch) -> Tensor:
    """Return the row or document of each trained token, (N,), in the order of `AdaptedModel.token_losses`."""
    trained = batch.labels[:, 1:] != IGNORED
    if batch.documents is None:
        return trained.nonzero(as_tuple=True)[0]
    lengths = batch.documents.offsets.diff()
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)[1:][trained[0]]


def pair_batches(model: AdaptedModel, rows: Items, *, tokens: int, pad_id: int) -> list[Batch]:
    """Return batches of pairs, each chosen answer followed by the rejected one, of at most `tokens` tokens.

    A pair that is longer is a batch of its own. `Batch.rows` names each pair once.
    """
    pairs: list[list[tuple[int, Example]]] = []
    for index, pair in rows:
        assert isinstance(pair, PairExample)
        pairs.append([(index, pair.chosen), (index, pair.rejected)])
    if model.packs:
        groups = bins([sum(one.tokens for _, one in pair) for pair in pairs], tokens)
    else:
        groups = group_by_length([2 * max(one.tokens for _, one in pair) for pair in pairs], tokens)
    batches = []
    for group in groups:
        answers = [answer for place in group for answer in pairs[place]]
        if model.packs:
            batch = pack_rows(answers, tokens, model.device)
        else:
            batch = pad_rows(answers, pad_id, model.device)
        batches.append(replace(batch, rows=tuple(pairs[place][0][0] for place in group)))
    return batches
