"""Kahneman-Tversky optimization (arXiv 2402.01306): single answers, each wanted or not.

    r  = log p(y | x) / p0(y | x)                               of an answer, p0 the model that training begins with
    z0 = max(0, mean of r over prompts with answers to others)  how far the model has moved as a whole
    w_d (1 - sigmoid(beta (r - z0)))                            a wanted answer, eq. 7
    w_u (1 - sigmoid(beta (z0 - r)))                            an unwanted one

z0 has no gradient. The paper takes it from each micro-batch; here it is one number of the whole step, over all
processes: its rows in their order, each prompt with the answer of the row before. So a step does not depend on how it
is split. Held-out rows have one z0 too, of the first of them, each prompt with the answer half of these rows away,
since both answers of a pair stand side by side there.

The unit is a row. A pair of answers is two rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_cli.errors import ResourceError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.memory import attempt, forget
from lora_cli.objectives._answers import answers_of, extended
from lora_cli.objectives._base import Items, Metrics, Objective, Rows, Surroundings, pad_batches
from lora_cli.objectives._packing import pack_batches
from lora_cli.types import (
    Batch,
    Example,
    Examples,
    Item,
    Labelled,
    LabelledExample,
    Pair,
    Prepared,
    Progress,
    Scores,
)

HELD_OUT = 256
"""Rows that the z0 of held-out rows is estimated on, at most."""


@dataclass(slots=True)
class LabelledBatch(Batch):
    """Answers, whether each is wanted, (A,) bool, and the z0 of the step that they are part of."""

    wanted: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    divergence: float = 0.0


class Kto(Objective):
    """Wanted answers gain and unwanted ones lose, measured from the model that training begins with."""

    consumes = (Labelled, Pair)
    reported = watched = ("right", "wanted", "reward_wanted", "reward_unwanted", "kl")

    def __init__(
        self, *, pad_id: int, beta: float, desirable_weight: float, undesirable_weight: float
    ) -> None:
        self.pad_id, self.beta = pad_id, beta
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight
        self.longest: int | None = None
        """Tokens of the longest row there is; a prompt with another's answer is cut to as many."""
        self._gather: Callable[[bytes], list[bytes]] = lambda content: [content]
        self._sum: Callable[[Sequence[float]], list[float]] = list
        self._rank = 0
        self._of_step: tuple[int, float] | None = None
        self._held_out = 0.0

    def begin(self, around: Surroundings) -> None:
        """Take what the processes share."""
        self._gather, self._sum, self._rank = around.gather, around.sum, around.rank

    def require_rows(self, prepared: Prepared) -> int:
        """Note how long rows are."""
        splits = filter(None, (prepared.train, prepared.eval))
        self.longest = max(int(examples.lengths.max()) for examples in splits)
        return 0

    def micro_batches(
        self, model: AdaptedModel, rows: Items, progress: Progress, *, tokens: int
    ) -> list[Batch]:
        """Return the rows as batches; the first call of a step, which all processes make, estimates its z0."""
        # A step that is split anew, where a pass did not fit, must not wait for the others.
        if self._of_step is None or self._of_step[0] != progress.step:
            self._of_step = progress.step, self._divergence(model, rows, tokens)
        return self._batches(model, rows, tokens, self._of_step[1])

    def trial_batches(
        self, model: AdaptedModel, rows: Items, progress: Progress, *, tokens: int
    ) -> list[Batch]:
        """Return the rows as batches of no divergence."""
        del progress
        return self._batches(model, rows, tokens, 0.0)

    def begin_heldout(self, model: AdaptedModel, examples: Examples, *, tokens: int) -> None:
        """Estimate the z0 of held-out rows, in each process for itself."""
        chosen = [_split(examples[row]) for row in range(min(len(examples), HELD_OUT))]
        answers = [answer for _, answer in chosen]
        half = len(chosen) // 2
        total, count = self._gain(
            model, [(prompt, answers[place - half]) for place, (prompt, _) in enumerate(chosen)], tokens
        )
        self._held_out = max(0.0, total / max(count, 1.0)) if half else 0.0

    def heldout_batches(
        self, model: AdaptedModel, rows: Items, progress: Progress, *, tokens: int
    ) -> list[Batch]:
        """Return held-out rows as batches."""
        del progress
        return self._batches(model, rows, tokens, self._held_out)

    def units(self, batch: Batch) -> int:
        """Return the number of answers."""
        return len(batch.rows)

    def loss_sum(self, model: AdaptedModel, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return the summed loss of the answers, and sums over them to report."""
        assert isinstance(batch, LabelledBatch)
        with model.as_it_began():
            reference = answers_of(model, batch).logps
        gains, wanted, z0 = answers_of(model, batch).logps - reference, batch.wanted, batch.divergence
        losses = kto_losses(
            gains, wanted, z0,
            beta=self.beta, desirable_weight=self.desirable_weight, undesirable_weight=self.undesirable_weight,
        )  # fmt: skip
        with torch.no_grad():
            lead = torch.where(wanted, gains - z0, z0 - gains)
            rewards = self.beta * gains
            metrics = {
                "right": (lead > 0).sum() + (lead == 0).sum() / 2,
                "wanted": wanted.sum(),
                "reward_wanted": rewards[wanted].sum(),
                "reward_unwanted": rewards[~wanted].sum(),
                "kl": torch.full_like(gains, z0).sum(),
            }
        return losses.sum().float(), metrics

    def scores(self, means: Mapping[str, float]) -> Scores:
        """Return loss, the part of the answers on their side of z0, mean rewards of both kinds, and z0."""
        part = means["wanted"]
        found = {"loss": means["loss"], "label_accuracy": means["right"]}
        if part > 0:
            found["reward_wanted"] = means["reward_wanted"] / part
        if part < 1:
            found["reward_unwanted"] = means["reward_unwanted"] / (1 - part)
        if 0 < part < 1:
            found["reward_margin"] = found["reward_wanted"] - found["reward_unwanted"]
        return found | {"kl": means["kl"]}

    def _batches(self, model: AdaptedModel, rows: Items, tokens: int, divergence: float) -> list[Batch]:
        wanted = {index: row.wanted for index, row in rows if isinstance(row, LabelledExample)}
        assert len(wanted) == len({index for index, _ in rows})
        plain = self._plain([(index, row.answers()[0]) for index, row in rows], model, tokens)
        return [
            extended(
                batch,
                LabelledBatch,
                wanted=torch.tensor([wanted[row] for row in batch.rows], device=batch.input_ids.device),
                divergence=divergence,
            )
            for batch in plain
        ]

    def _plain(self, rows: Rows, model: AdaptedModel, tokens: int) -> list[Batch]:
        if model.packs:
            return pack_batches(rows, tokens=tokens, device=model.device)
        return pad_batches(rows, tokens=tokens, pad_id=self.pad_id, device=model.device)

    def _divergence(self, model: AdaptedModel, rows: Items, tokens: int) -> float:
        """Return z0 of a step. Row k of process r is row k * processes + r of it."""
        mine = [_split(row) for _, row in rows]
        told = self._gather(json.dumps([answer.as_json() for _, answer in mine]).encode())
        by_rank = [json.loads(content) for content in told]
        answers = [
            _Answer.from_json(one) for each in zip_longest(*by_rank) for one in each if one is not None
        ]
        if len(answers) < 2:  # of an epoch's last step: there is no other answer
            return 0.0
        before = [answers[place * len(told) + self._rank - 1] for place in range(len(mine))]
        pairs = [(prompt, answer) for (prompt, _), answer in zip(mine, before, strict=True)]
        total, count = self._sum(self._gain(model, pairs, tokens))
        return max(0.0, total / max(count, 1.0))

    def _gain(
        self, model: AdaptedModel, pairs: Sequence[tuple[np.ndarray, _Answer]], tokens: int
    ) -> tuple[float, float]:
        """Return the sum of r over prompts with answers, and how many have a place; in smaller passes if need be.

        Raises:
            ResourceError: one does not fit into memory.
        """
        joined = [answer.after(prompt, self.longest) for prompt, answer in pairs]
        rows = [(place, one) for place, one in enumerate(one for one in joined if one is not None)]

        def logps() -> Tensor:
            found = torch.zeros(len(rows), dtype=torch.float64)
            for batch in self._plain(rows, model, tokens):
                found[list(batch.rows)] = answers_of(model, batch).logps.double().cpu()
            return found

        longest = max((one.tokens for _, one in rows), default=1)
        tokens = min(tokens, len(rows) * longest)
        while True:
            with attempt() as tried, model.evaluating():
                own = logps()
                with model.as_it_began():
                    gains = own - logps()
            if not tried.failed:
                return float(gains.sum()), float(len(rows))
            forget(model.device)
            if tokens <= longest:
                raise ResourceError(
                    "out of memory: a prompt with the answer to another one does not fit (lower data.max_length, or set"
                    " model.quantize: nf4)"
                )
            tokens //= 2


@dataclass(frozen=True, slots=True)
class _Answer:
    """The tokens of a row from its first trained one on, and which of them are trained."""

    ids: np.ndarray
    trained: np.ndarray

    def after(self, prompt: np.ndarray, longest: int | None) -> Example | None:
        """Return it behind a prompt, cut where it is longer than rows are; None where nothing of it has a place."""
        if longest is not None and len(prompt) >= longest:
            return None
        ids = np.concatenate([prompt, self.ids])[:longest].astype(np.int32)
        trained = np.concatenate([np.zeros(len(prompt), dtype=np.bool_), self.trained])[:longest]
        return Example(ids, trained)

    def as_json(self) -> list[Any]:
        return [self.ids.tolist(), self.trained.tolist()]

    @classmethod
    def from_json(cls, content: list[Any]) -> _Answer:
        return cls(np.array(content[0], dtype=np.int32), np.array(content[1], dtype=np.bool_))


def _split(row: Item) -> tuple[np.ndarray, _Answer]:
    """Return the tokens of a row's prompt and its answer."""
    (example,) = row.answers()
    first = max(1, int(np.argmax(example.trained)))  # nothing predicts a row's first token
    return example.input_ids[:first], _Answer(example.input_ids[first:], example.trained[first:])


def kto_losses(
    gains: Tensor,
    wanted: Tensor,
    divergence: float,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """Return the loss of each answer from its gain r in log-probability, (A,), and whether it is wanted, (A,) bool."""
    lead = torch.where(wanted, gains - divergence, divergence - gains)
    weights = torch.where(wanted, gains.new_tensor(desirable_weight), gains.new_tensor(undesirable_weight))
    return weights * torch.sigmoid(-beta * lead)


OBJECTIVE = Kto
