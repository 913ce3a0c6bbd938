"""Who answers, criticises and judges, behind one interface: the model in use, another one, or an endpoint.

A judge says how much more likely it takes A to be the better of two answers than B. Its liking for a letter, or for
what stands first, is an addend of these log-odds. Asked in both orders, the halved difference has the addend no more:
z1 = d + b with the answers as (y1, y2), z2 = -d + b with them as (y2, y1), so d = (z1 - z2) / 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lora_cli.types import Message


@dataclass(frozen=True, slots=True)
class Asked:
    """A conversation that waits for its next turn; `name` is its own in a run: row, what is asked, and which."""

    name: str
    turns: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's log-odds of A against B (natural logarithm), and what they were made of, as JSON values."""

    log_odds: float
    raw: Mapping[str, Any]


class Voice(Protocol):
    """A model that answers; None in place of an answer says that the conversation is too long for it."""

    def answers(self, asked: Sequence[Asked]) -> list[str | None]:
        """Return the next turn of each conversation."""

    def compare(self, asked: Sequence[Asked]) -> list[Verdict | None]:
        """Return how much more likely each conversation is answered by A than by B."""


def margin(forward: Verdict, backward: Verdict) -> float:
    """Return the log-odds that the first of two answers is better, free of the judge's liking for a letter.

    `forward` was given with the first answer as A, `backward` with it as B.
    """
    return (forward.log_odds - backward.log_odds) / 2
