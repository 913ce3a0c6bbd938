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
from lora_cli.types import Batch, PairExample

Extended = TypeVar("Extended", bound=Batch)


@dataclass(frozen=True, slots=True)
class Answers:
    """Of each answer of a batch, (A,) float64: the sum of its tokens' log-probabilities, and how many they are.

    A thousand tokens have some 3,000 nats, where float32 steps by 0.0002, and objectives compare differences of sums.
    """

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
    counts = torch.tensor(batch.targets.counts)  # (A,)
    answers = torch.repeat_interleave(counts).to(losses.device, non_blocking=True)  # (N,): each token's
    sums = losses.new_zeros(len(counts), dtype=torch.float64).index_add(0, answers, -losses.double())
    return Answers(sums, counts.to(sums))


def pair_batches(
    model: AdaptedModel, rows: Items, *, tokens: int, pad_id: int, share: bool = False
) -> list[Batch]:
    """Return batches of pairs, each chosen answer followed by the rejected one, of at most `tokens` tokens.

    A pair that is longer is a batch of its own. `Batch.rows` names each pair once. With `share` a pair's prompt stands
    in a packed sequence once, where the model was seen to allow it, so that an answer's tokens do not all stand
    together; what it is trained on is in `Batch.targets` in any case.
    """
    pairs = [(index, pair) for index, pair in rows if isinstance(pair, PairExample)]
    assert len(pairs) == len(rows)
    share = share and model.shares_prompts
    common = [common_prompt(pair) if share else 0 for _, pair in pairs]
    if model.packs:
        groups = bins([pair.tokens - both for (_, pair), both in zip(pairs, common, strict=True)], tokens)
    else:
        groups = group_by_length([2 * max(one.tokens for one in pair.answers()) for _, pair in pairs], tokens)
    batches = []
    for group in groups:
        members = [pairs[place] for place in group]
        answers = [(index, answer) for index, pair in members for answer in pair.answers()]
        if model.packs:
            firsts = tuple(first for place in group for first in (0, common[place]))
            batch = pack_rows(answers, tokens, model.device, firsts if any(firsts) else ())
        else:
            batch = pad_rows(answers, pad_id, model.device)
        batches.append(replace(batch, rows=tuple(index for index, _ in members)))
    return batches


def common_prompt(pair: PairExample) -> int:
    """Return with how many tokens both answers of a pair begin alike before the first that is trained.

    It is what their prompts were rendered to, not what the row says, so that a template or a cut that makes them differ
    ends it.
    """
    one, other = pair.answers()
    shorter = min(one.tokens, other.tokens)
    apart = one.input_ids[:shorter] != other.input_ids[:shorter]
    apart |= one.trained[:shorter] | other.trained[:shorter]
    return int(apart.argmax()) if apart.any() else shorter
