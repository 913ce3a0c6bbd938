"""What a run of principles changed: answers before and after side by side, and how many of each break a rule.

It is read of `lora constitution make` (response and last revision), and of a training run that generated answers to
held-out rows (base and tuned, or an earlier run's tuned and its own), for which the constitution is named besides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.constitution.journal import CRITIQUES_FILE, JUDGEMENTS_FILE, rows_of
from lora_cli.constitution.principles import Principles, read_principles
from lora_cli.constitution.violations import count
from lora_cli.errors import InputError

GENERATIONS_FILE, PRINCIPLES_FILE = "generations.jsonl", "constitution.yaml"


@dataclass(frozen=True, slots=True)
class Change:
    """An answer before and after, to the message that it answers; `prompt` is as it is shown."""

    where: str
    prompt: str
    message: str
    before: str
    after: str
    principles: tuple[str, ...] = ()


def report(
    folder: Path,
    constitution: Path | None,
    *,
    show: int,
    before: Path | None = None,
    said: Mapping[str, tuple[str, ...]] | None = None,
) -> dict[str, Any]:
    """Return counts and the first `show` changed answers of a folder, as plain values.

    Of a training run, `before` is the run whose tuned model's answers stand in place of the base's, and `said` what the
    user says in held-out rows, by their place: a prompt of another place is searched as the model was shown it.

    Raises:
        InputError: the folder holds neither kind of answers, no constitution is known, or the two runs have no prompt
            in common.
    """
    made = (folder / CRITIQUES_FILE).is_file() or (folder / JUDGEMENTS_FILE).is_file()
    for run in filter(None, (None if made else folder, before)):
        if not (run / GENERATIONS_FILE).is_file():
            raise InputError(
                f"{run}: holds neither critiques.jsonl, judgements.jsonl nor generations.jsonl (give a run of lora"
                " constitution make, or one that was trained with evaluate.metrics exact_match or win_rate)"
            )
    if made and before is not None:
        raise InputError(f"--before: {folder} holds answers before and after itself (leave it out)")
    if constitution is None and not made:
        raise InputError(
            f"{folder}: is a training run, which has no constitution (name one: --constitution FILE)"
        )
    principles = read_principles(constitution or folder / PRINCIPLES_FILE)
    found: dict[str, Any] = {"folder": str(folder), "titles": ["response", "revision"]}
    if (folder / CRITIQUES_FILE).is_file() or not made:
        changes = list(_revisions(folder) if made else _generations(folder, before, said or {}))
        if not made:
            found["titles"] = ["base", "tuned"] if before is None else [before.name, folder.name]
        found |= _compared(changes, principles, show)
    if (folder / JUDGEMENTS_FILE).is_file():
        found["pairs"] = _judged(folder, principles)
    return found


def _compared(changes: list[Change], principles: Principles, show: int) -> dict[str, Any]:
    before = count(principles.every, [(one.message, one.before) for one in changes])
    after = count(principles.every, [(one.message, one.after) for one in changes])
    return {
        "answers": len(changes),
        "changed": sum(one.before != one.after for one in changes),
        "violations": [
            {"principle": one.principle, "before": one.broken, "after": then.broken, "answers": one.answers}
            for one, then in zip(before, after, strict=True)
        ],
        "samples": [
            {
                "where": one.where, "prompt": one.prompt, "before": one.before, "after": one.after,
                "principles": list(one.principles),
            }
            for one in changes[:show]
        ],
    }  # fmt: skip


def _revisions(folder: Path) -> Iterator[Change]:
    for line in rows_of(folder / CRITIQUES_FILE):
        if line["final"] is not None:
            yield Change(
                line["where"], shown(line["prompt"]), message(line["prompt"]), line["response"], line["final"],
                tuple(one["principle"] for one in line["rounds"]),
            )  # fmt: skip


def _generations(folder: Path, before: Path | None, said: Mapping[str, tuple[str, ...]]) -> Iterator[Change]:
    earlier = None
    if before is not None:
        earlier = {line["prompt"]: line["tuned"] for line in rows_of(before / GENERATIONS_FILE)}
    common = False
    for line in rows_of(folder / GENERATIONS_FILE):
        first = line["base"] if earlier is None else earlier.get(line["prompt"])
        if first is None:
            continue
        common = True
        turns = said.get(line["row"], ())
        # A file that was changed since does not say any more what the model was asked.
        known = bool(turns) and all(turn.strip() in line["prompt"] for turn in turns)
        asked = "\n".join(turns) if known else line["prompt"]
        yield Change(line["row"], asked, asked, first, line["tuned"])
    if earlier is not None and not common:
        raise InputError(f"--before: {before} and {folder} have no held-out prompt in common (give another)")


def _judged(folder: Path, principles: Principles) -> dict[str, Any]:
    """Return how many pairs were judged, and how many chosen and rejected answers break a rule."""
    chosen: list[tuple[str, str]] = []
    rejected: list[tuple[str, str]] = []
    ties = alike = 0
    for line in rows_of(folder / JUDGEMENTS_FILE):
        for pair in line["pairs"]:
            forward, backward = pair["log_odds"]
            alike += (forward > 0) != (backward > 0)  # the same answer was preferred as A and as B
            if pair["margin"] == 0:
                ties += 1
                continue
            better = pair["margin"] > 0
            asked = message(line["prompt"])
            chosen.append((asked, pair["first" if better else "second"]))
            rejected.append((asked, pair["second" if better else "first"]))
    return {
        "judged": len(chosen) + ties,
        "ties": ties,
        "same_in_both_orders": alike,
        "violations": [
            {
                "principle": one.principle,
                "chosen": one.broken,
                "rejected": other.broken,
                "answers": one.answers,
            }
            for one, other in zip(
                count(principles.every, chosen), count(principles.every, rejected), strict=True
            )
        ],
    }


def message(prompt: list[dict[str, str]]) -> str:
    """Return what the user said in a prompt."""
    return "\n".join(turn["content"] for turn in prompt if turn["role"] == "user")


def shown(prompt: list[dict[str, str]]) -> str:
    """Return a prompt as it is shown: the last turn, with its role before it where there are several."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
