"""Win rate: the tuned model's answers against the base's to the same prompts, decided by rewards or by a judge.

A win counts 1, a tie 1/2. The interval is Wilson's (1927): all P with |p - P| <= z sqrt(P (1 - P) / n). It stays within
0 and 1, also where every answer wins. Halves vary less than wins and losses: with ties it is wider than need be. A
judge is asked in both orders, see `constitution/voice.py`; equal answers are a tie that nobody is asked about. One
process decides, for all of them.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lora_cli import interrupts
from lora_cli.constitution import requests
from lora_cli.constitution.endpoint import require_key
from lora_cli.constitution.journal import ENDPOINT_FILE
from lora_cli.constitution.ledger import Ledger
from lora_cli.constitution.local import LocalVoice, letters
from lora_cli.constitution.remote import EndpointVoice
from lora_cli.constitution.voice import Asked, Voice, margin
from lora_cli.errors import InputError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.load import DTYPES, load_model, load_tokenizer
from lora_cli.objectives import _rewards
from lora_cli.objectives._base import group_by_length, tokens_of_pass
from lora_cli.recipe.schema import Judge, Recipe, WinRate
from lora_cli.runtime.dist import Runtime
from lora_cli.runtime.log import Log
from lora_cli.stages import _voices
from lora_cli.stages._generated import Asked as Row
from lora_cli.stages._generated import Spoken, asked_rows, text_of
from lora_cli.stages._scorer import RewardScorer
from lora_cli.types import Prepared, Scores

PLACE = "evaluate.win_rate"
Z95 = 1.959963984540054
"""The normal distribution has 95 % of its mass between less this and this."""
_TOKENS = {"cpu": 8192, "cuda": 65536}
"""Padded tokens of questions that a local judge reads at once."""
_REMEDY = "evaluate.batch_tokens: out of memory: the judge's questions do not fit together (lower it)"
_REQUESTS = 64
"""Questions that an endpoint is asked before the run looks whether it is to stop."""


@dataclass(frozen=True, slots=True)
class Contest:
    """Two answers to one prompt; `prompt` and `reference` are texts of `asked`."""

    asked: Row
    prompt: str
    reference: str
    base: Spoken
    tuned: Spoken


@dataclass(frozen=True, slots=True)
class Outcome:
    """Who won: 1.0 the tuned model, 0.0 the base, 0.5 none; None where the judge has no place for the question."""

    won: float | None
    found: Mapping[str, Any]
    """What it was decided by, as JSON values."""

    def line(self) -> dict[str, Any]:
        """Return it as it stands in generations.jsonl."""
        return {"won": self.won, **self.found}


class Referee:
    """Decides by what the recipe says; `folder` is the run's, None where none is written."""

    def __init__(
        self,
        recipe: Recipe,
        win_rate: WinRate,
        prepared: Prepared,
        folder: Path | None,
        rt: Runtime,
        log: Log,
    ) -> None:
        self.win_rate, self._recipe, self._prepared, self._folder = win_rate, recipe, prepared, folder
        self._rt, self._log = rt, log
        self._terms = []
        with _placed():
            if win_rate.rewards is not None:
                self._terms = _rewards.build(
                    win_rate.rewards,
                    allow_code=recipe.run.allow_code,
                    open_scorer=lambda name: RewardScorer(name, recipe, prepared, rt.device, log.line),
                )
            self._require_references()
        self._key = None
        if win_rate.judge is not None:
            self._key = self._require_judge(win_rate.judge)

    def _require_references(self) -> None:
        """Refuse a row whose answer a reward cannot compare with, before anything is trained."""
        assert self._prepared.eval is not None
        for row in asked_rows(self._recipe.evaluate, self._prepared.eval) if self._terms else ():
            text = partial(text_of, self._prepared, row.reference)
            try:
                _rewards.require_comparable(self._terms, text, len(row.reference))
            except InputError as fault:
                raise InputError(f"{row.where}: {fault}") from None

    def _require_judge(self, judge: Judge) -> str | None:
        """Return the key of an endpoint; see that a local judge has the letters that it is to answer with."""
        place = f"{PLACE}.judge"
        if judge.kind == "endpoint":
            return require_key(judge.key_from, os.environ, place)
        local = self._prepared.tokenizer
        if judge.kind == "local":
            local = load_tokenizer(_voices.folder_of(judge))
        letters(local, place)
        return None

    def decide(self, model: AdaptedModel, contests: Sequence[Contest]) -> list[Outcome]:
        """Return who won each contest, in the main process; nothing in the others, which wait for it.

        Raises:
            InputError: a reward cannot judge an answer, or an endpoint refuses a question.
            ResourceError: an endpoint cannot be had, or a judge has not enough memory.
        """
        found: list[Outcome] = []

        def work() -> None:
            with _placed():
                found.extend(self._by_rewards(contests) if self._terms else self._by_judge(model, contests))

        self._rt.in_main(work)
        return found

    def scores(self, outcomes: Sequence[Outcome]) -> tuple[Scores, Scores]:
        """Return the scores of base and tuned model, the same in every process; nothing where nothing was judged."""
        won = [one.won for one in outcomes if one.won is not None]
        points, ties, judged, unjudged = self._rt.sum(
            [math.fsum(won), won.count(0.5), len(won), len(outcomes) - len(won)]
        )
        if unjudged:
            self._log.line(
                f"warning: {PLACE}: {unjudged:,.0f} prompts are too long for the judge and are left out"
            )
        if not judged:
            return {}, {}
        low, high = wilson(points, judged)
        rate = points / judged
        by = ", ".join(term.name for term in self._terms) or f"a judge ({self._judge().kind})"
        self._log.line(
            f"win rate: {rate:.1%} of {judged:,.0f} prompts (95 % interval {low:.1%} to {high:.1%}, Wilson),"
            f" {ties:,.0f} of them ties; decided by {by}"
        )
        return (
            _named(1 - rate, 1 - high, 1 - low, judged),
            _named(rate, low, high, judged),
        )

    def _by_rewards(self, contests: Sequence[Contest]) -> list[Outcome]:
        base, tuned = (
            self._worth([(one, one.base) for one in contests]),
            self._worth([(one, one.tuned) for one in contests]),
        )
        return [
            Outcome(_won(ours - theirs), {"base_reward": theirs, "tuned_reward": ours})
            for theirs, ours in zip(base, tuned, strict=True)
        ]

    def _worth(self, spoken: Sequence[tuple[Contest, Spoken]]) -> list[float]:
        answers = [
            _rewards.Answer(
                answer.text,
                one.prompt,
                one.reference,
                len(answer.ids),
                [*one.asked.prompt.tolist(), *answer.ids],
            )
            for one, answer in spoken
        ]
        columns = [[term.weight * value for value in term.judge(answers)] for term in self._terms]
        return [math.fsum(values) for values in zip(*columns, strict=True)]

    def _by_judge(self, model: AdaptedModel, contests: Sequence[Contest]) -> list[Outcome]:
        outcomes = [Outcome(0.5, {"margin": 0.0}) for _ in contests]
        differing = [index for index, one in enumerate(contests) if one.base.text != one.tuned.text]
        self._log.start_progress(len(differing), 0, "answers judged")
        done = 0
        with ExitStack() as stack:
            voice = self._voice(model, stack)
            for batch in self._batches(voice, [(index, self._asked(contests[index])) for index in differing]):
                verdicts = voice.compare([question for _, both in batch for question in both])
                for (index, _), forward, backward in zip(batch, verdicts[::2], verdicts[1::2], strict=True):
                    outcomes[index] = Outcome(None, {"margin": None})
                    if forward is not None and backward is not None:
                        by = margin(forward, backward)
                        odds = [forward.log_odds, backward.log_odds]
                        outcomes[index] = Outcome(_won(by), {"margin": by, "log_odds": odds})
                done += len(batch)
                self._log.advance(done, "")
                interrupts.check()
        self._log.stop_progress()
        return outcomes

    def _asked(self, one: Contest) -> tuple[Asked, Asked]:
        """Return the question with the tuned model's answer as A, and with it as B."""
        orders = ((one.tuned.text, one.base.text), (one.base.text, one.tuned.text))
        forward, backward = (
            Asked(
                f"{one.asked.where}/win rate {order}",
                requests.question_turns(one.prompt, first, second, self.win_rate.question),
            )
            for order, (first, second) in enumerate(orders)
        )
        return forward, backward

    def _voice(self, model: AdaptedModel, stack: ExitStack) -> Voice:
        judge, place = self._judge(), f"{PLACE}.judge"
        if judge.kind == "endpoint":
            self._log.line(f"{place}: {judge.url}, {judge.model}")
            kept = self._folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            ledger = stack.enter_context(Ledger(kept / ENDPOINT_FILE))
            stack.callback(lambda: self._log.line(ledger.usage.line()))
            return EndpointVoice(judge, self._key, ledger, place=place, answer_tokens=1, log=self._log.line)
        if judge.kind == "self":
            stack.enter_context(model.reference())
            return _voices.local_voice(
                model, self._prepared.tokenizer, self._recipe.data.template, 1, judges=True, remedy=_REMEDY
            )
        folder = _voices.folder_of(judge)
        self._log.line(f"{place}: {folder}")
        other = load_model(folder, dtype=DTYPES[self._recipe.model.dtype], device=model.device)
        return _voices.local_voice(
            AdaptedModel(other, {}), load_tokenizer(folder), "auto", 1, judges=True, remedy=_REMEDY
        )

    def _judge(self) -> Judge:
        assert self.win_rate.judge is not None
        return self.win_rate.judge

    def _batches(
        self, voice: Voice, questions: Sequence[tuple[int, tuple[Asked, Asked]]]
    ) -> Iterator[list[tuple[int, tuple[Asked, Asked]]]]:
        """Yield questions that are asked together: of a local judge as many as fit into a pass."""
        if not isinstance(voice, LocalVoice):
            for first in range(0, len(questions), _REQUESTS):
                yield list(questions[first : first + _REQUESTS])
            return
        wanted = self._recipe.evaluate.batch_tokens
        tokens = tokens_of_pass(wanted, voice.model.device.type, at_most=_TOKENS)
        lengths = [2 * max(len(voice.encode(one.turns)) for one in both) for _, both in questions]
        for group in group_by_length(lengths, tokens):
            yield [questions[index] for index in group]


def wilson(points: float, number: float, z: float = Z95) -> tuple[float, float]:
    """Return the bounds of Wilson's interval for `points` of `number`; each a part of 1."""
    p = points / number
    middle = (p + z * z / (2 * number)) / (1 + z * z / number)
    reach = z / (1 + z * z / number) * math.sqrt(p * (1 - p) / number + z * z / (4 * number * number))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def referee_of(
    recipe: Recipe, prepared: Prepared, folder: Path | None, rt: Runtime, log: Log
) -> Referee | None:
    """Return who decides the recipe's win rate; None where it asks for none.

    Raises:
        InputError: a reward cannot be made or has no reference to compare with, or a judge cannot be asked.
    """
    win_rate = recipe.evaluate.compares()
    if win_rate is None or prepared.eval is None:
        return None
    return Referee(recipe, win_rate, prepared, folder, rt, log)


def _won(difference: float) -> float:
    return 0.5 if difference == 0 else float(difference > 0)


def _named(rate: float, low: float, high: float, judged: float) -> Scores:
    return {"win_rate": rate, "win_rate_low": low, "win_rate_high": high, "win_rate_prompts": judged}


@contextmanager
def _placed() -> Iterator[None]:
    """Name rewards by where the recipe has these: what they raise names those of an objective."""
    try:
        yield
    except InputError as fault:
        lines = [line.replace("objective.rewards", f"{PLACE}.rewards") for line in fault.lines]
        raise InputError(lines) from fault
