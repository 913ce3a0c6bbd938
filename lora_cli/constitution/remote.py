"""A voice behind an endpoint that speaks OpenAI's chat completions.

A judge's log-odds come from the log-probabilities of the first token (`logprobs`, `top_logprobs`), where the endpoint
gives them: A's is the sum over the tokens that are the letter without white space. A letter that is not among the
listed tokens is less likely than the last of them, whose probability takes its place: the odds are then a lower bound.
Where it gives none, it is asked several times at temperature 1, and the odds are (a + 1/2) / (b + 1/2) of the votes,
finite and without bias to the first order (Haldane 1956).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from lora_cli.constitution.endpoint import Client, NoLogprobs, TooLong
from lora_cli.constitution.ledger import Ledger
from lora_cli.constitution.pace import Pace
from lora_cli.constitution.requests import as_json
from lora_cli.constitution.voice import Asked, Verdict
from lora_cli.errors import InputError
from lora_cli.recipe.constitution_block import Critic, Judge

_T = TypeVar("_T")
_LETTER = re.compile(r"\W*([AB])\b")
_TOP = 20
"""Tokens whose log-probabilities are asked for: the most that the protocol allows."""
_CHARACTERS_PER_TOKEN = 4
"""To reserve for a prompt before the endpoint says how many tokens it had."""


class EndpointVoice:
    """Answers of an endpoint; what the ledger holds is not asked for again. `place` is the recipe's block."""

    def __init__(
        self,
        settings: Critic | Judge,
        key: str | None,
        ledger: Ledger,
        *,
        place: str,
        answer_tokens: int,
        log: Callable[[str], None],
    ) -> None:
        assert settings.url is not None
        self._settings, self._ledger, self._place, self._log = settings, ledger, place, log
        self._answer_tokens = answer_tokens
        self._client = Client(
            settings.url, key, place=place, timeout=settings.timeout, retries=settings.retries, log=log
        )
        self._pace = Pace(settings.requests_per_minute, settings.tokens_per_minute)
        self._votes_only = False

    def answers(self, asked: Sequence[Asked]) -> list[str | None]:
        """Return the next turn of each conversation, at temperature 0.

        Raises:
            InputError: the endpoint refuses a request.
            ResourceError: the endpoint cannot be had.
        """
        return self._all(self._answer, asked)

    def compare(self, asked: Sequence[Asked]) -> list[Verdict | None]:
        """Return how much more likely each conversation is answered by A than by B.

        Raises:
            InputError: the endpoint refuses a request.
            ResourceError: the endpoint cannot be had.
        """
        return self._all(self._verdict, asked)

    def _all(self, work: Callable[[Asked], _T], asked: Sequence[Asked]) -> list[_T]:
        """Return the results in order; a fault of one ends the others' waits, and is raised when they have ended."""
        with ThreadPoolExecutor(self._settings.parallel) as pool:
            futures = [pool.submit(work, one) for one in asked]
            try:
                return [future.result() for future in futures]
            except BaseException:
                self._client.stop()
                for future in futures:
                    future.cancel()
                raise

    def _answer(self, one: Asked) -> str | None:
        try:
            return _text(self._ask(one.name, one, self._answer_tokens, temperature=0))
        except TooLong:
            return None

    def _verdict(self, one: Asked) -> Verdict | None:
        try:
            if not self._votes_only:
                try:
                    choice = self._ask(one.name, one, 1, temperature=0, logprobs=True, top_logprobs=_TOP)
                except NoLogprobs:
                    choice = {}
                listed = first_logprobs(choice)
                if listed:
                    return by_logprobs(listed)
                if not self._votes_only:
                    self._log(
                        f"{self._place}: gives no log-probabilities; {self._settings.votes} votes instead"
                    )
                self._votes_only = True
            texts = [
                _text(self._ask(f"{one.name}/vote {vote}", one, 8, temperature=1, seed=vote))
                for vote in range(self._settings.votes)
            ]
        except TooLong:
            return None
        return by_votes(texts)

    def _ask(self, name: str, one: Asked, tokens: int, **options: Any) -> dict[str, Any]:
        """Return the endpoint's choice, from the ledger where it is there."""
        body = {
            "model": self._settings.model, "messages": as_json(one.turns), "max_tokens": tokens, **options
        }  # fmt: skip
        known = self._ledger.find(name, body)
        if known is not None:
            return known
        reserved = tokens + sum(len(turn.content) for turn in one.turns) // _CHARACTERS_PER_TOKEN
        self._client.wait(self._pace.reserve(reserved))
        answer = self._client.post(body)
        choice = self._choice(answer)
        usage = answer.get("usage")
        prompt, completion = (_whole(usage, key) for key in ("prompt_tokens", "completion_tokens"))
        self._pace.settle(reserved, prompt + completion)
        cost = (prompt * self._settings.price_in + completion * self._settings.price_out) / 1e6
        self._ledger.keep(name, body, choice, prompt_tokens=prompt, completion_tokens=completion, cost=cost)
        return choice

    def _choice(self, answer: Mapping[str, Any]) -> dict[str, Any]:
        choices = answer.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = choice.get("message") if isinstance(choice, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(choice, dict) or not isinstance(content, str | None) or message is None:
            raise InputError(
                f"{self._place}.url: the endpoint's answer has no choices[0].message.content (it must speak OpenAI's"
                " chat completions)"
            )
        return {
            "content": content or "",
            "finish": choice.get("finish_reason"),
            "logprobs": choice.get("logprobs"),
        }


def _text(choice: Mapping[str, Any]) -> str:
    # Half a surrogate pair, which JSON can spell, is no text that a file takes.
    return str(choice["content"]).encode("utf-8", "replace").decode().strip()


def _whole(usage: Any, key: str) -> int:
    value = usage.get(key) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def first_logprobs(choice: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return token and log-probability of what the first token of a choice could have been; nothing where not given."""
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    first = content[0] if isinstance(content, list) and content else None
    listed = first.get("top_logprobs") if isinstance(first, dict) else None
    found = []
    for entry in listed if isinstance(listed, list) else ():
        token, value = (entry.get("token"), entry.get("logprob")) if isinstance(entry, dict) else (None, None)
        if isinstance(token, str) and isinstance(value, int | float) and math.isfinite(value):
            found.append((token, float(value)))
    return found


def by_logprobs(listed: Sequence[tuple[str, float]]) -> Verdict:
    """Return the log-odds of A against B from the listed tokens; 0 where neither letter is among them."""
    least = min(value for _, value in listed)
    found = {
        letter: _log_sum([value for token, value in listed if token.strip() == letter]) for letter in "AB"
    }
    if found["A"] is None and found["B"] is None:
        return Verdict(0.0, {"A": None, "B": None})
    a, b = (least if found[letter] is None else found[letter] for letter in "AB")
    assert a is not None
    assert b is not None
    return Verdict(a - b, dict(found))


def by_votes(texts: Sequence[str]) -> Verdict:
    """Return the log-odds of A against B from answers that were drawn; those that name no letter are no votes."""
    letters = [match[1] for text in texts if (match := _LETTER.match(text))]
    a, b = letters.count("A"), letters.count("B")
    return Verdict(math.log((a + 0.5) / (b + 0.5)), {"votes": {"A": a, "B": b}, "texts": list(texts)})


def _log_sum(values: Sequence[float]) -> float | None:
    if not values:
        return None
    most = max(values)
    return most + math.log(sum(math.exp(value - most) for value in values))
