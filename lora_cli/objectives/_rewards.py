"""What a completion is worth: a closed table of pure functions of completion, prompt and reference, and their sum.

Each has a range that its docstring states. The only one that runs code which is not ours is `python`, and it is built
only where the recipe's `run.allow_code` says so.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from lora_cli.errors import InputError
from lora_cli.objectives._base import Scorer
from lora_cli.recipe.rollout_blocks import Reward

_GSM8K = r"####\s*(-?[\d.,]*\d)"
"""Where an answer of GSM8K has its number (arXiv 2110.14168)."""
_RUN = 3
"""Words of a run that counts as repeated."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion without its terminator, with what it is judged by."""

    text: str
    prompt: str
    reference: str
    tokens: int
    """Of the completion, its terminator counted."""
    ids: Sequence[int] = ()
    """All tokens of the prompt and the completion."""


RewardFunction = Callable[[Answer], float]


@dataclass(frozen=True, slots=True)
class Term:
    """One reward of the sum; `name` is how metrics and rollouts.jsonl call it."""

    name: str
    weight: float
    judge: Callable[[Sequence[Answer]], list[float]]
    """All answers of a rollout at once: what scores by a model does so in batches."""
    scorer: Scorer | None = None
    """The reward model that judges."""


def exact_match(answer: Answer) -> float:
    """Return 1.0 where the completion is the reference, white space around it aside, else 0.0."""
    return float(answer.text.strip() == answer.reference.strip())


def numeric_answer(answer: Answer, pattern: str = _GSM8K) -> float:
    """Return 1.0 where the last number that the pattern finds is that of the reference, else 0.0.

    `1,000`, `1000` and `1000.00` are one number.

    Raises:
        InputError: there is no number in the reference.
    """
    wanted = _last_number(pattern, answer.reference)
    if wanted is None:
        raise InputError(
            f"objective.rewards: numeric_answer: no number in the reference {answer.reference[-80:]!r} (correct the"
            " row, or give the pattern that finds it)"
        )
    return float(_last_number(pattern, answer.text) == wanted)


def regex(answer: Answer, pattern: str) -> float:
    """Return 1.0 where the pattern is found in the completion, else 0.0."""
    return float(re.search(pattern, answer.text) is not None)


def json_valid(answer: Answer) -> float:
    """Return 1.0 where the completion is JSON, white space around it aside, else 0.0."""
    return float(_parsed(answer.text) is not _BROKEN)


def json_fields(answer: Answer, *, partial: bool = True) -> float:
    """Return the part of all fields, of the reference and of the completion, that are the same in both: 0.0 to 1.0.

    Not `partial`: 1.0 where all are, else 0.0. A completion that is no JSON object has none.

    Raises:
        InputError: the reference is no JSON object with a field.
    """
    wanted, found = _parsed(answer.reference), _parsed(answer.text)
    if not isinstance(wanted, dict) or not wanted:
        raise InputError(
            f"objective.rewards: json_fields: the reference {answer.reference[:80]!r} is no JSON object with fields"
            " (correct the row, or choose another reward)"
        )
    if not isinstance(found, dict):
        return 0.0
    same = sum(name in found and _same(found[name], value) for name, value in wanted.items())
    share = same / len(wanted.keys() | found.keys())
    return share if partial else float(share == 1.0)


def length(answer: Answer, limit: int) -> float:
    """Return 0.0 up to `limit` tokens, then less in proportion, down to -1.0 at twice as many."""
    return max(-1.0, min(0.0, (limit - answer.tokens) / limit))


def no_repeat(answer: Answer) -> float:
    """Return less the part of the completion's runs of three words that were there before: -1.0 to 0.0."""
    words = answer.text.split()
    runs = [tuple(words[first : first + _RUN]) for first in range(len(words) - _RUN + 1)]
    return len(set(runs)) / len(runs) - 1.0 if runs else 0.0


def build(
    rewards: Sequence[Reward], *, allow_code: bool, open_scorer: Callable[[str], Scorer] | None = None
) -> list[Term]:
    """Return the terms of the sum; two of one name are told apart by a number. `open_scorer` opens reward models.

    Raises:
        InputError: one is Python code that may not run or has no such function, or a reward model that does not fit.
    """
    scorers: dict[str, Scorer] = {}
    terms: list[Term] = []
    for reward in rewards:
        count = sum(one.name == reward.name for one in rewards[: len(terms)])
        name = f"{reward.name}_{count + 1}" if count else reward.name
        if reward.run is None:
            judge = _one_by_one(_function(reward, allow_code=allow_code))
            terms.append(Term(name, reward.weight, judge))
            continue
        assert open_scorer is not None
        if reward.run not in scorers:
            scorers[reward.run] = open_scorer(reward.run)
        terms.append(Term(name, reward.weight, _by_model(scorers[reward.run]), scorers[reward.run]))
    return terms


def load(terms: Sequence[Term], ids: Sequence[int]) -> None:
    """Have each reward model score some tokens: one that cannot be loaded is told before anything is written."""
    for term in terms:
        if term.scorer is not None:
            term.scorer([ids])


def contents(terms: Sequence[Term]) -> dict[str, str]:
    """Return a sha256 of all reward models under the key that names them; nothing where there are none."""
    found = [term.scorer.fingerprint for term in terms if term.scorer is not None]
    return {"objective.rewards": hashlib.sha256(" ".join(found).encode()).hexdigest()} if found else {}


def require_comparable(terms: Sequence[Term], text: Callable[[], str], tokens: int) -> None:
    """Refuse a reference, of so many tokens, that a reward cannot compare with.

    Raises:
        InputError: with what it lacks.
    """
    for term in terms:
        if term.name.split("_")[0] in ("numeric", "json"):
            term.judge([Answer(text(), "", text(), tokens)])


def _function(reward: Reward, *, allow_code: bool) -> RewardFunction:
    match reward.name:
        case "exact_match":
            return exact_match
        case "numeric_answer":
            pattern = reward.pattern or _GSM8K
            return lambda answer: numeric_answer(answer, pattern)
        case "regex":
            assert reward.pattern is not None
            wanted = reward.pattern
            return lambda answer: regex(answer, wanted)
        case "json_valid":
            return json_valid
        case "json_fields":
            partial = reward.partial is not False
            return lambda answer: json_fields(answer, partial=partial)
        case "length":
            assert reward.limit is not None
            limit = reward.limit
            return lambda answer: length(answer, limit)
        case "no_repeat":
            return no_repeat
        case "python":
            assert reward.file is not None
            assert reward.function is not None
            return _of_file(Path(reward.file).expanduser(), reward.function, allow_code=allow_code)
    raise AssertionError(reward.name)


def _by_model(scorer: Scorer) -> Callable[[Sequence[Answer]], list[float]]:
    return lambda answers: scorer([answer.ids for answer in answers])


def _one_by_one(function: RewardFunction) -> Callable[[Sequence[Answer]], list[float]]:
    return lambda answers: [function(answer) for answer in answers]


def _of_file(path: Path, name: str, *, allow_code: bool) -> RewardFunction:
    """Return a function of a file of Python code, which runs as it is loaded.

    Raises:
        InputError: code may not run, the file cannot be loaded, it has no such function, or that returns no number.
    """
    if not allow_code:
        raise InputError(
            f"objective.rewards: {path}: is Python code, which would run (read it, then set run.allow_code: true)"
        )
    spec = importlib.util.spec_from_file_location("lora_cli_reward", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InputError(f"objective.rewards: {path}: is no file of Python code (name one that ends in .py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        raise InputError(f"objective.rewards: {path}: {type(error).__name__}: {error}") from error
    function: Any = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"objective.rewards: {path}: has no function {name} (correct the name)")

    def judge(answer: Answer) -> float:
        try:
            value = float(function(answer.text, answer.prompt, answer.reference))
        except Exception as error:  # as above
            raise InputError(f"objective.rewards: {path}: {name}: {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise InputError(f"objective.rewards: {path}: {name} returned {value} (return a finite number)")
        return value

    return judge


_BROKEN = object()


def _parsed(text: str) -> Any:
    """Return what a text is as JSON, which has no NaN and no infinity; `_BROKEN` where it is none."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _BROKEN


def _refuse(constant: str) -> Any:
    raise ValueError(constant)


def _same(one: Any, other: Any) -> bool:
    # In Python true is 1; in JSON it is not.
    return isinstance(one, bool) is isinstance(other, bool) and bool(one == other)


def _last_number(pattern: str, text: str) -> Decimal | None:
    found = [match[1] if match.re.groups else match[0] for match in re.finditer(pattern, text)]
    if not found or found[-1] is None:
        return None
    try:
        number = Decimal(found[-1].replace(",", "").replace("$", "").strip())
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
