"""Stage 4: score the base and the tuned model on the same held-out rows, and show them side by side.

loss             the objective's, over all units (not a mean of batch means); of sft the mean negative log-likelihood of
                 a trained token, with perplexity = exp(loss) and token_accuracy, the part that were the most likely one
exact_match      part of the rows whose last answer, generated greedily from the row's own prompt, is the reference
win_rate         part of the rows where the tuned model's such answer is better than the base's, see `_win_rate.py`
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from lora_cli.errors import DivergedError, InputError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.memory import PassSize
from lora_cli.objectives import Objective
from lora_cli.objectives._base import batch_tokens
from lora_cli.objectives._heldout import heldout_sums, means_of
from lora_cli.recipe.schema import Evaluate
from lora_cli.runtime.dist import Runtime
from lora_cli.runtime.log import Log
from lora_cli.stages._generated import (
    GENERATIONS_FILE,
    Answering,
    Spoken,
    asked_rows,
    max_new_tokens,
    text_of,
)
from lora_cli.stages._win_rate import Contest, Outcome, Referee
from lora_cli.types import Evaluated, Examples, Prepared, Scores

BATCH_TOKENS = {"cpu": 8192, "cuda": 65536}
REMEDY = "lower data.max_length or evaluate.max_new_tokens, or set model.quantize: nf4"
"""What makes a pass of one row smaller."""
_COUNTS = ("win_rate_prompts",)
_PARTS = (
    "exact_match",
    "token_accuracy",
    "preference_accuracy",
    "label_accuracy",
    "calibration_error",
    "ended",
    "win_rate",
    "win_rate_low",
    "win_rate_high",
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
    referee: Referee | None = None,
) -> Evaluated:
    """Return the scores of the base and of the tuned model; generated answers go to `folder`, where one is given.

    `referee` decides the win rate, where the recipe asks for one.

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
    base_answers: list[Spoken] = []
    if with_base:
        with model.reference():
            base, base_answers = scorer.score("base")
    tuned, tuned_answers = scorer.score("tuned")
    outcomes: list[Outcome] = []
    if referee is not None:
        assert with_base
        outcomes = referee.decide(model, scorer.contests(base_answers, tuned_answers))
        theirs, ours = referee.scores(outcomes)
        base, tuned = base | theirs, tuned | ours
    if folder is not None and rt.is_main and scorer.answering is not None:
        lines = [one.line() for one in outcomes]
        scorer.answering.write(folder / GENERATIONS_FILE, base_answers, tuned_answers, lines)
    log.table(_table(base, tuned))
    return Evaluated(base, tuned)


def plan(settings: Evaluate, prepared: Prepared) -> int:
    """Return the most tokens that a prompt and its generated answer can have; 0 where nothing is generated.

    Raises:
        InputError: the held-out rows have no answers to compare with.
    """
    if not settings.generates() or prepared.eval is None:
        return 0
    if "text" in prepared.formats["eval"].split(", "):
        names = " and ".join(one for one in settings.metrics if one != "loss")
        raise InputError(
            f"evaluate.metrics: {names} needs answers, but the rows of data.eval are plain text (use loss)"
        )
    asked = asked_rows(settings, prepared.eval)
    return max(len(one.prompt) for one in asked) + max_new_tokens(settings, asked)


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
        self.answering: Answering | None = None
        if settings.generates():
            self.answering = Answering(settings, model, prepared, examples, size, rt, log)

    def score(self, name: str) -> tuple[Scores, list[Spoken]]:
        """Return the scores of the model as it is now, and its answers in the order of `answering.asked`."""
        scores: Scores = {}
        if "loss" in self.settings.metrics:
            scores |= self._loss(name)
        if self.answering is None:
            return scores, []
        answers, references = self.answering.answers(name), self.answering.references
        if "exact_match" in self.settings.metrics:
            right = sum(
                answer.text == reference for answer, reference in zip(answers, references, strict=True)
            )
            scores["exact_match"] = right / len(references)
        return scores, answers

    def contests(self, base: Sequence[Spoken], tuned: Sequence[Spoken]) -> list[Contest]:
        """Return the answers of both models to each prompt."""
        assert self.answering is not None
        rows = zip(self.answering.asked, self.answering.references, base, tuned, strict=True)
        return [
            Contest(one, text_of(self.prepared, one.prompt), reference, theirs, ours)
            for one, reference, theirs, ours in rows
        ]

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


def _table(base: Scores, tuned: Scores) -> Table:
    table = Table(title="held-out scores", title_justify="left")
    table.add_column("metric")
    if base:
        table.add_column("base", justify="right")
    table.add_column("tuned" if base else "model", justify="right")
    for name in tuned:
        cells = [base[name], tuned[name]] if base else [tuned[name]]
        form = ",.0f" if name in _COUNTS else ".1%" if name in _PARTS else ",.4f"
        table.add_row(name, *(format(value, form) for value in cells))
    return table
