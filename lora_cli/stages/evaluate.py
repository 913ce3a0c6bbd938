"""Stage 4: score the base and the tuned model on the same held-out rows, and show them side by side.

loss             the objective's, over all units (not a mean of batch means); of sft the mean negative log-likelihood of
                 a trained token, with perplexity = exp(loss) and token_accuracy, the part that were the most likely one
exact_match      part of the rows whose last answer, generated greedily from the row's own prompt, is the reference
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from lora_cli.disk import writing
from lora_cli.errors import DivergedError, InputError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.memory import PassSize, attempt
from lora_cli.objectives import Objective
from lora_cli.objectives._base import batch_tokens
from lora_cli.objectives._heldout import heldout_sums, means_of
from lora_cli.objectives._prompts import split_answer
from lora_cli.recipe.schema import Evaluate
from lora_cli.runtime.dist import Runtime
from lora_cli.runtime.log import Log
from lora_cli.types import Evaluated, Examples, Prepared, Scores

BATCH_TOKENS = {"cpu": 8192, "cuda": 65536}
REMEDY = "lower data.max_length or evaluate.max_new_tokens, or set model.quantize: nf4"
"""What makes a pass of one row smaller."""
GENERATIONS_FILE = "generations.jsonl"
_PARTS = (
    "exact_match",
    "token_accuracy",
    "preference_accuracy",
    "label_accuracy",
    "calibration_error",
    "ended",
)
"""Scores that are shown in percent."""


def run(
    settings: Evaluate,
    model: AdaptedModel,
    objective: Objective,
    prepared: Prepared,
    *,
    rt: Runtime,
    log: Log,
    folder: Path | None = None,
    with_base: bool = True,
) -> Evaluated:
    """Return the scores of the base and of the tuned model; generated answers go to `folder`, where one is given.

    Without held-out rows both are empty. With `with_base` false (a plain model, no adapter) only `tuned` is filled.

    Raises:
        DivergedError: a held-out loss is not finite.
        ResourceError: one row does not fit into memory; passes of several rows that do not are split.
    """
    if prepared.eval is None:
        return Evaluated({}, {})
    tokens = batch_tokens(settings.batch_tokens, model, at_most=BATCH_TOKENS)
    size = PassSize(tokens, "evaluate.batch_tokens", REMEDY, log.line)
    scorer = _Scorer(settings, model, objective, prepared, prepared.eval, size, rt, log)
    base: Scores = {}
    base_answers: list[str] = []
    if with_base:
        with model.reference():
            base, base_answers = scorer.score("base")
    tuned, tuned_answers = scorer.score("tuned")
    if folder is not None and rt.is_main and tuned_answers:
        scorer.write_generations(folder / GENERATIONS_FILE, base_answers, tuned_answers)
    log.table(_table(base, tuned))
    return Evaluated(base, tuned)


def plan(settings: Evaluate, prepared: Prepared) -> int:
    """Return the most tokens that a prompt and its generated answer can have; 0 where nothing is generated.

    Raises:
        InputError: the held-out rows have no answers to compare with.
    """
    if "exact_match" not in settings.metrics or prepared.eval is None:
        return 0
    if "text" in prepared.formats["eval"].split(", "):
        raise InputError(
            "evaluate.metrics: exact_match needs answers, but the rows of data.eval are plain text"
        )
    parts = [split_answer(*prepared.eval[row].answers()) for row in _generated_rows(settings, prepared.eval)]
    return max(len(prompt) for prompt, _ in parts) + _max_new_tokens(
        settings, [answer for _, answer in parts]
    )


def _generated_rows(settings: Evaluate, examples: Examples) -> range:
    return range(min(settings.max_generated_rows or len(examples), len(examples)))


def _max_new_tokens(settings: Evaluate, answers: Sequence[np.ndarray]) -> int:
    if settings.max_new_tokens != "auto":
        return settings.max_new_tokens
    return max(len(answer) for answer in answers)


class _Scorer:
    """Scores one state of the model after another on the same rows."""

    def __init__(
        self,
        settings: Evaluate,
        model: AdaptedModel,
        objective: Objective,
        prepared: Prepared,
        examples: Examples,
        size: PassSize,
        rt: Runtime,
        log: Log,
    ) -> None:
        self.settings, self.model, self.objective, self.prepared = settings, model, objective, prepared
        self.examples, self.size, self.rt, self.log = examples, size, rt, log
        self.generated: list[tuple[int, np.ndarray, str]] = []
        self.max_new_tokens = 1
        if "exact_match" in settings.metrics:
            self._choose_rows()

    def _choose_rows(self) -> None:
        answers = []
        for row in _generated_rows(self.settings, self.examples):
            prompt, answer = split_answer(*self.examples[row].answers())
            self.generated.append((row, prompt, self._text(answer)))
            answers.append(answer)
        self.max_new_tokens = _max_new_tokens(self.settings, answers)

    def score(self, name: str) -> tuple[Scores, list[str]]:
        """Return the scores of the model as it is now, and the generated answers in the order of `generated`."""
        scores: Scores = {}
        if "loss" in self.settings.metrics:
            scores |= self._loss(name)
        if not self.generated:
            return scores, []
        with self.model.evaluating():
            answers = self._generate(name)
        right = sum(
            answer == reference for answer, (_, _, reference) in zip(answers, self.generated, strict=True)
        )
        scores["exact_match"] = right / len(self.generated)
        return scores, answers

    def write_generations(self, path: Path, base: list[str], tuned: list[str]) -> None:
        """Write prompt, reference and answers of each generated row as JSON lines.

        Raises:
            ResourceError: they cannot be written.
        """
        with writing(path), path.open("w", encoding="utf-8") as file:
            for index, (row, prompt, reference) in enumerate(self.generated):
                line = {
                    "row": self.examples.where(row),
                    "prompt": self.prepared.tokenizer.decode(prompt.tolist()),
                    "reference": reference,
                    "base": base[index] if base else None,
                    "tuned": tuned[index],
                    "match": tuned[index] == reference,
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _loss(self, name: str) -> Scores:
        self.log.start_progress(len(self.examples), 0, f"loss of {name}")
        sums = heldout_sums(
            self.objective,
            self.model,
            self.examples,
            rank=self.rt.rank,
            world_size=self.rt.world_size,
            size=self.size,
        )
        self.log.stop_progress()
        means = means_of(sums, self.rt.sum)
        if not math.isfinite(means["loss"]):
            raise DivergedError(
                f"evaluate: the held-out loss of {name} is {means['loss']:g}; nothing was exported"
            )
        return self.objective.scores(means)

    def _generate(self, name: str) -> list[str]:
        # Each process fills its rows with token + 1 and leaves 0 elsewhere, so that a sum gathers them.
        tokens = torch.zeros(
            len(self.generated), self.max_new_tokens, dtype=torch.int64, device=self.rt.device
        )
        # Rows of similar prompt length share a batch, so that little of it is padding.
        todo = sorted(range(len(self.generated)), key=lambda index: -len(self.generated[index][1]))
        self.log.start_progress(len(todo), 0, f"answers of {name}")
        done = 0
        waiting = deque(self._batches(todo[self.rt.rank :: self.rt.world_size]))
        while waiting:
            batch = waiting.popleft()
            prompts = [self.generated[index][1] for index in batch]
            with attempt() as tried:
                continuations = self.model.generate(
                    prompts,
                    max_new_tokens=self.max_new_tokens,
                    stop_ids=self.prepared.stop_ids,
                    pad_id=self.prepared.pad_id,
                )
            if tried.failed:
                lengths = [len(prompt) + self.max_new_tokens for prompt in prompts]
                where = self.examples.where(self.generated[batch[0]][0])
                self.size.halve_pass(lengths, max(lengths) * len(batch), where, self.rt.device)
                waiting.extendleft(reversed(self._batches(batch)))
                continue
            for index, ids in zip(batch, continuations, strict=True):
                tokens[index, : len(ids)] = torch.tensor(ids, dtype=torch.int64) + 1
            done += len(batch)
            self.log.advance(done, "")
        self.log.stop_progress()
        self.rt.sum_tensors([tokens])
        return [self._text([token - 1 for token in row if token]) for row in tokens.tolist()]

    def _batches(self, indices: list[int]) -> list[list[int]]:
        batches: list[list[int]] = []
        for index in indices:
            longest = len(self.generated[batches[-1][0]][1]) if batches else 0
            if batches and (longest + self.max_new_tokens) * (len(batches[-1]) + 1) <= self.size.tokens:
                batches[-1].append(index)
            else:
                batches.append([index])
        return batches

    def _text(self, ids: Sequence[int] | np.ndarray) -> str:
        text: str = self.prepared.tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)
        return text.strip()


def _table(base: Scores, tuned: Scores) -> Table:
    table = Table(title="held-out scores", title_justify="left")
    table.add_column("metric")
    if base:
        table.add_column("base", justify="right")
    table.add_column("tuned" if base else "model", justify="right")
    for name in tuned:
        cells = [base[name], tuned[name]] if base else [tuned[name]]
        percent = name in _PARTS
        table.add_row(name, *(f"{value:.1%}" if percent else f"{value:,.4f}" for value in cells))
    return table
