"""Answers to the held-out rows: to which of them, how long, generated greedily, and written beside their references."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lora_cli.disk import writing
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.memory import PassSize, attempt
from lora_cli.objectives._prompts import split_answer
from lora_cli.recipe.schema import Evaluate
from lora_cli.runtime.dist import Runtime
from lora_cli.runtime.log import Log
from lora_cli.types import Examples, Prepared

GENERATIONS_FILE = "generations.jsonl"

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Asked:
    """A held-out row of which an answer is generated; of a pair the chosen answer is the reference."""

    where: str
    prompt: Ids  # (P,)
    reference: Ids  # (A,)


@dataclass(frozen=True, slots=True)
class Spoken:
    """An answer, and its tokens, its terminator among them where one ended it."""

    text: str
    ids: tuple[int, ...]


def asked_rows(settings: Evaluate, examples: Examples) -> list[Asked]:
    """Return the rows of which answers are generated."""
    number = min(settings.max_generated_rows or len(examples), len(examples))
    return [Asked(examples.where(row), *split_answer(examples[row].answers()[0])) for row in range(number)]


def max_new_tokens(settings: Evaluate, asked: Sequence[Asked]) -> int:
    """Return the most tokens that an answer may have."""
    if settings.max_new_tokens != "auto":
        return settings.max_new_tokens
    return max(len(one.reference) for one in asked)


def text_of(prepared: Prepared, ids: Sequence[int] | Ids) -> str:
    """Return tokens as text, control tokens and white space around it left out."""
    text: str = prepared.tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)
    return text.strip()


class Answering:
    """Generates the answers of one state of the model after another to the same rows."""

    def __init__(
        self,
        settings: Evaluate,
        model: AdaptedModel,
        prepared: Prepared,
        examples: Examples,
        size: PassSize,
        rt: Runtime,
        log: Log,
    ) -> None:
        self.model, self.prepared, self.size, self.rt, self.log = model, prepared, size, rt, log
        self.asked = asked_rows(settings, examples)
        self.references = [text_of(prepared, one.reference) for one in self.asked]
        self.max_new_tokens = max_new_tokens(settings, self.asked)

    def answers(self, name: str) -> list[Spoken]:
        """Return the answer to each row, in every process; `name` is the model's, for the progress that is shown.

        Raises:
            ResourceError: one row does not fit into memory.
        """
        # Each process fills its rows with token + 1 and leaves 0 elsewhere, so that a sum gathers them.
        tokens = torch.zeros(len(self.asked), self.max_new_tokens, dtype=torch.int64, device=self.rt.device)
        # Rows of similar prompt length share a batch, so that little of it is padding.
        todo = sorted(range(len(self.asked)), key=lambda index: -len(self.asked[index].prompt))
        self.log.start_progress(len(todo), 0, f"answers of {name}")
        done = 0
        waiting = deque(self._batches(todo[self.rt.rank :: self.rt.world_size]))
        while waiting:
            batch = waiting.popleft()
            prompts = [self.asked[index].prompt for index in batch]
            with attempt() as tried, self.model.evaluating():
                continuations = self.model.generate(
                    prompts,
                    max_new_tokens=self.max_new_tokens,
                    stop_ids=self.prepared.stop_ids,
                    pad_id=self.prepared.pad_id,
                )
            if tried.failed:
                lengths = [len(prompt) + self.max_new_tokens for prompt in prompts]
                where = self.asked[batch[0]].where
                self.size.halve_pass(lengths, max(lengths) * len(batch), where, self.rt.device)
                waiting.extendleft(reversed(self._batches(batch)))
                continue
            for index, ids in zip(batch, continuations, strict=True):
                tokens[index, : len(ids)] = torch.tensor(ids, dtype=torch.int64) + 1
            done += len(batch)
            self.log.advance(done, "")
        self.log.stop_progress()
        self.rt.sum_tensors([tokens])
        return [
            self._spoken(one, [token - 1 for token in row if token])
            for one, row in zip(self.asked, tokens.tolist(), strict=True)
        ]

    def write(
        self,
        path: Path,
        base: Sequence[Spoken],
        tuned: Sequence[Spoken],
        besides: Sequence[Mapping[str, Any]],
    ) -> None:
        """Write prompt, reference and answers of each row as JSON lines, with what is known of it besides.

        Raises:
            ResourceError: they cannot be written.
        """
        with writing(path), path.open("w", encoding="utf-8") as file:
            for index, (one, reference) in enumerate(zip(self.asked, self.references, strict=True)):
                line = {
                    "row": one.where,
                    "prompt": self.prepared.tokenizer.decode(one.prompt.tolist()),
                    "reference": reference,
                    "base": base[index].text if base else None,
                    "tuned": tuned[index].text,
                    "match": tuned[index].text == reference,
                    **(besides[index] if besides else {}),
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _spoken(self, one: Asked, ids: list[int]) -> Spoken:
        """Return an answer; of several terminators it is taken to have ended with that of the row's own."""
        text = text_of(self.prepared, ids)
        if len(ids) < self.max_new_tokens:
            own = int(one.reference[-1])
            ids = [*ids, own if own in self.prepared.stop_ids else self.prepared.stop_ids[0]]
        return Spoken(text, tuple(ids))

    def _batches(self, indices: list[int]) -> list[list[int]]:
        batches: list[list[int]] = []
        for index in indices:
            longest = len(self.asked[batches[-1][0]].prompt) if batches else 0
            if batches and (longest + self.max_new_tokens) * (len(batches[-1]) + 1) <= self.size.tokens:
                batches[-1].append(index)
            else:
                batches.append([index])
        return batches
