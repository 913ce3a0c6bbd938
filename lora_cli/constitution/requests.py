"""What the critic and the judge are asked: conversations, as functions of the prompt, the answers and the principle."""

from __future__ import annotations

from collections.abc import Sequence

from lora_cli.constitution.principles import Principle
from lora_cli.types import Message

Turns = tuple[Message, ...]

_ROLES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}


def critique_turns(prompt: Turns, answer: str, principle: Principle) -> Turns:
    """Return the conversation that ends with the request for a critique (arXiv 2212.08073, section 3.1)."""
    return (*prompt, Message("assistant", answer), Message("user", principle.critique))


def revision_turns(prompt: Turns, answer: str, critique: str, principle: Principle) -> Turns:
    """Return the conversation that ends with the request for a revision, after the critique (section 3.1)."""
    asked = critique_turns(prompt, answer, principle)
    return (*asked, Message("assistant", critique), Message("user", principle.revision))


def judge_turns(prompt: Turns, first: str, second: str, principle: Principle) -> Turns:
    """Return the question which of two answers is better by a principle (section 4.1)."""
    said = "\n".join(f"{_ROLES[turn.role]}: {turn.content}" for turn in prompt)
    return question_turns(said, first, second, principle.judge)


def question_turns(said: str, first: str, second: str, question: str) -> Turns:
    """Return a question about two answers to what was said, to be answered by the letter A or B (section 4.1)."""
    text = (
        f"A conversation:\n\n{said}\n\nTwo replies to it.\n\nA: {first}\n\nB: {second}\n\n"
        f"{question}\n\nAnswer with one letter, A or B."
    )
    return (Message("user", text),)


def as_json(turns: Sequence[Message]) -> list[dict[str, str]]:
    """Return turns as `role` and `content`, as rows and endpoints have them."""
    return [{"role": turn.role, "content": turn.content} for turn in turns]
