"""A voice that is a model in this process: greedy and drawn answers, and the probabilities of a judge's two letters.

Shapes: B conversations, T tokens of the longest, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lora_cli.constitution.voice import Asked, Verdict, Voice
from lora_cli.errors import InputError, ResourceError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.memory import attempt, forget
from lora_cli.models.sampling import Draw, sample
from lora_cli.targets import Targets
from lora_cli.types import IGNORED, Batch, Message

PASS_TOKENS = {"cpu": 8192, "cuda": 65536}
"""Padded tokens of prompts and answers that are drawn together, at most."""
REMEDY = (
    "constitution.batch_rows: out of memory: the prompts of a batch do not fit together (lower it, or"
    " constitution.answer_tokens)"
)
"""What is told where rows are made and memory is wanting."""

Ids = npt.NDArray[np.int32]


class LocalVoice:
    """A model with its tokenizer: `encode` gives the tokens that it is fed for a conversation, `decode` a text.

    `letter_ids` are the tokens that each letter can be, by letter; see `letters`. `remedy` is told where there is too
    little memory.
    """

    def __init__(
        self,
        model: AdaptedModel,
        encode: Callable[[Sequence[Message]], Ids],
        decode: Callable[[Sequence[int]], str],
        *,
        letter_ids: dict[str, tuple[int, ...]],
        stop_ids: Sequence[int],
        pad_id: int,
        answer_tokens: int,
        remedy: str = REMEDY,
    ) -> None:
        self._remedy = remedy
        self.model, self.encode, self.decode = model, encode, decode
        self.stop_ids, self.pad_id, self.answer_tokens = tuple(stop_ids), pad_id, answer_tokens
        self._letter_ids = letter_ids
        self._positions: int | None = getattr(model.model.config, "max_position_embeddings", None)

    def answers(self, asked: Sequence[Asked]) -> list[str | None]:
        """Return the greedy next turn of each conversation; None where it would go beyond the model's positions."""
        prompts = [self.fitting(one, self.answer_tokens) for one in asked]
        fitting = [prompt for prompt in prompts if prompt is not None]
        if not fitting:
            return [None] * len(asked)
        with _roomy(self.model, self._remedy), self.model.evaluating():
            found = self.model.generate(
                fitting, max_new_tokens=self.answer_tokens, stop_ids=self.stop_ids, pad_id=self.pad_id
            )
        texts = iter(self.decode(ids) for ids in found)
        return [None if prompt is None else next(texts) for prompt in prompts]

    def compare(self, asked: Sequence[Asked]) -> list[Verdict | None]:
        """Return the log-odds of the letters A and B as the first token of each answer."""
        prompts = [self.fitting(one, 1) for one in asked]
        fitting = [prompt for prompt in prompts if prompt is not None]
        if not fitting:
            return [None] * len(asked)
        with _roomy(self.model, self._remedy), self.model.evaluating():
            logits, _ = self.model.trained_logits(self._batch(fitting))  # (B, V)
            log_probabilities = logits.double().log_softmax(dim=-1)
        found = iter([self._verdict(row) for row in log_probabilities])
        return [None if prompt is None else next(found) for prompt in prompts]

    def samples(
        self, asked: Sequence[Asked], seeds: Sequence[Sequence[int]], temperature: float
    ) -> list[list[str] | None]:
        """Return a drawn next turn of each conversation for each of its seeds; None where it has no place."""
        prompts = [self.fitting(one, self.answer_tokens) for one in asked]
        wanted = [
            (row, seed) for row, prompt in enumerate(prompts) for seed in seeds[row] if prompt is not None
        ]
        draw = Draw(self.answer_tokens, self.stop_ids, temperature)
        with self.model.evaluating():
            drawn = sample(
                self.model,
                [prompt for row, _ in wanted if (prompt := prompts[row]) is not None],
                [seed for _, seed in wanted],
                draw,
                pad_id=self.pad_id,
                tokens=PASS_TOKENS[self.model.device.type],
            )
        found: list[list[str] | None] = [None if prompt is None else [] for prompt in prompts]
        for (row, _), completion in zip(wanted, drawn, strict=True):
            texts = found[row]
            assert texts is not None
            texts.append(self.decode(completion.answer()))
        return found

    def fitting(self, one: Asked, new_tokens: int) -> Ids | None:
        """Return the tokens of a conversation; None where they and the new ones are more than the model has places."""
        ids = self.encode(one.turns)
        beyond = self._positions is not None and len(ids) + new_tokens > self._positions
        return None if beyond else ids

    def _verdict(self, row: torch.Tensor) -> Verdict:  # (V,)
        a, b = (float(row[list(self._letter_ids[letter])].logsumexp(dim=0)) for letter in "AB")
        return Verdict(a - b, {"A": a, "B": b})

    def _batch(self, prompts: Sequence[Ids]) -> Batch:
        """Return the prompts with a token after each, whose prediction is wanted."""
        longest = max(map(len, prompts)) + 1
        ids = torch.full((len(prompts), longest), self.pad_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.from_numpy(prompt.astype(np.int64))
            mask[row, : len(prompt) + 1] = 1
            labels[row, len(prompt)] = ids[row, len(prompt)]
        device = self.model.device
        rows = tuple(range(len(prompts)))
        targets = Targets.of_rows(labels).to(device)
        return Batch(ids.to(device), mask.to(device), labels.to(device), rows, targets=targets)


@dataclass(frozen=True, slots=True)
class Voices:
    """Who answers the prompts, who criticises and revises, and who judges; None where the recipe needs none."""

    model: LocalVoice
    critic: Voice | None
    judge: Voice | None


@contextmanager
def _roomy(model: AdaptedModel, remedy: str) -> Iterator[None]:
    """Tell a want of memory by the keys that change it; a smaller batch of its own accord would change the rows' bits.

    Raises:
        ResourceError: there was too little within.
    """
    with attempt() as tried:
        yield
    if tried.failed:
        forget(model.device)
        raise ResourceError(remedy)


def letters(tokenizer: Any, place: str = "constitution.judge") -> dict[str, tuple[int, ...]]:
    """Return the tokens that an answer of the letter A, and of B, can begin with: with a space before it or without.

    Raises:
        InputError: the tokenizer has no token of its own for each of them.
    """
    found: dict[str, tuple[int, ...]] = {}
    for letter in "AB":
        spelled = [tokenizer.encode(text, add_special_tokens=False) for text in (letter, f" {letter}")]
        found[letter] = tuple(dict.fromkeys(ids[0] for ids in spelled if len(ids) == 1))
    if not all(found.values()) or set(found["A"]) & set(found["B"]):
        raise InputError(
            f"{place}: the tokenizer has no token for the letter A or B, so that the model cannot judge"
            " (choose another judge)"
        )
    return found
