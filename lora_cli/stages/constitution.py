"""Rows made by principles: answers revised after a critique, and judged pairs of drawn answers (arXiv 2212.08073).

    prompts -> answer -> critique -> revision (rounds)  critiques.jsonl -> sft.jsonl     section 3 of the paper
    prompts -> drawn answers -> judged two by two       judgements.jsonl -> pairs.jsonl  section 4

Rows are worked on in batches that begin at fixed rows, so that a batch that is made again after a kill, of which some
rows are written already, comes out in the same bits. Critiques and revisions are asked for in one conversation, without
the paper's examples before it: the models of today follow a request without them. A pair's label is the judge's
log-odds, free of its liking for a letter (`voice.py`), kept as the row's margin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from lora_cli import interrupts
from lora_cli.constitution.journal import (
    CRITIQUES_FILE,
    JUDGEMENTS_FILE,
    PAIRS_FILE,
    SFT_FILE,
    Journal,
    dumped,
    rows_of,
)
from lora_cli.constitution.local import Voices
from lora_cli.constitution.principles import Principle, Principles
from lora_cli.constitution.requests import as_json, critique_turns, judge_turns, revision_turns
from lora_cli.constitution.voice import Asked, margin
from lora_cli.publish import write_lines
from lora_cli.recipe.schema import Constitution
from lora_cli.runtime.log import Log
from lora_cli.seeding import stream_seed
from lora_cli.types import Conversation

TOO_LONG = "the conversation is too long for the model"
EMPTY = "the answer is empty"
ALIKE = "no two of its samples differ and say something"


def run(
    settings: Constitution,
    principles: Principles,
    prompts: Sequence[Conversation],
    voices: Voices,
    folder: Path,
    *,
    seed: int,
    log: Log,
) -> dict[str, Any]:
    """Make the rows that the recipe asks for in `folder`, from the first that is not there on; return their counts.

    Raises:
        InputError: an endpoint refuses a request, or the folder is damaged.
        ResourceError: an endpoint cannot be had, or the disk or the memory is full.
    """
    making = _Making(settings, principles, prompts, voices, folder, seed, log)
    counts: dict[str, Any] = {"prompts": len(prompts)}
    if settings.rounds:
        making.work(folder / CRITIQUES_FILE, making.revised, "answers revised")
        counts |= making.publish(folder / CRITIQUES_FILE, folder / SFT_FILE, sft_rows)
    if settings.samples:
        making.work(folder / JUDGEMENTS_FILE, making.judged, "pairs judged")
        counts |= making.publish(folder / JUDGEMENTS_FILE, folder / PAIRS_FILE, making.pair_rows)
    return counts


@dataclass(slots=True)
class _Answer:
    """What became of a prompt's answer so far; `left_out` says why it ends there."""

    row: int
    prompt: Conversation
    text: str = ""
    first: str | None = None
    rounds: list[dict[str, str]] = field(default_factory=list)
    left_out: str | None = None

    def line(self) -> dict[str, Any]:
        """Return its line of critiques.jsonl."""
        return {
            "where": self.prompt.where, "prompt": as_json(self.prompt.messages), "response": self.first,
            "rounds": self.rounds, "final": None if self.left_out else self.text, "left_out": self.left_out,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Making:
    """The settings of a run of `lora constitution make`, and its two kinds of rows."""

    settings: Constitution
    principles: Principles
    prompts: Sequence[Conversation]
    voices: Voices
    folder: Path
    seed: int
    log: Log

    def work(self, path: Path, make: Callable[[range], list[dict[str, Any]]], what: str) -> None:
        """Bring a journal to its last row, batch by batch."""
        size = self.settings.batch_rows
        with Journal(path) as journal:
            if 0 < journal.done < len(self.prompts):
                self.log.line(f"resume: {path.name}: continuing after row {journal.done - 1}")
            self.log.start_progress(len(self.prompts), journal.done, what)
            for start in range(journal.done - journal.done % size, len(self.prompts), size):
                batch = range(start, min(start + size, len(self.prompts)))
                lines = make(batch)
                for line in lines[journal.done - start :]:
                    journal.append(line)
                self.log.advance(journal.done, "")
                interrupts.check()
            self.log.stop_progress()

    def publish(
        self, journal: Path, path: Path, rows: Callable[[dict[str, Any]], Iterator[dict[str, Any]]]
    ) -> dict[str, int]:
        """Write the training rows of a journal as one file, and return how many there are and were left out."""
        counts = {"written": 0, "left_out": 0, "judged": 0}

        def lines() -> Iterator[bytes]:
            for line in rows_of(journal):
                if line["left_out"]:
                    counts["left_out"] += 1
                    if counts["left_out"] <= 3:
                        self.log.line(f"warning: {line['where']}: left out: {line['left_out']}")
                counts["judged"] += len(line.get("pairs", ()))
                for row in rows(line):
                    counts["written"] += 1
                    yield dumped(row)

        write_lines(path, lines())
        name = path.name.partition(".")[0]
        found = {f"{name}_rows": counts["written"], f"{name}_left_out": counts["left_out"]}
        if path.name == PAIRS_FILE:
            found["pairs_undecided"] = counts["judged"] - counts["written"]
            self.log.line(f"{path}: {found['pairs_undecided']:,} judged pairs are not above the margin")
        self.log.line(f"{path}: {counts['written']:,} rows, {counts['left_out']:,} prompts left out")
        return found

    def revised(self, batch: range) -> list[dict[str, Any]]:
        """Return the lines of critiques.jsonl of some prompts."""
        answers = [_Answer(row, self.prompts[row]) for row in batch]
        texts = self.voices.model.answers(
            [Asked(f"{one.row}/response", one.prompt.messages) for one in answers]
        )
        for one, text in zip(answers, texts, strict=True):
            one.first, one.left_out = text, TOO_LONG if text is None else None
            one.text = text or ""
        for number in range(self.settings.rounds):
            self._round(number, [one for one in answers if one.left_out is None])
        for one in answers:
            if one.left_out is None and not one.text:
                one.left_out = EMPTY
        return [one.line() for one in answers]

    def _round(self, number: int, answers: list[_Answer]) -> None:
        critic = self.voices.critic
        assert critic is not None
        drawn = {one.row: self.principles.drawn(self.seed, "revise", one.row, number) for one in answers}
        critiques = critic.answers(
            [
                Asked(
                    f"{one.row}/critique {number}",
                    critique_turns(one.prompt.messages, one.text, drawn[one.row]),
                )
                for one in answers
            ]
        )
        asked = []
        for one, critique in zip(answers, critiques, strict=True):
            if critique is None:
                one.left_out = TOO_LONG
            else:
                turns = revision_turns(one.prompt.messages, one.text, critique, drawn[one.row])
                asked.append((one, critique, Asked(f"{one.row}/revision {number}", turns)))
        revisions = critic.answers([request for *_, request in asked])
        for (one, critique, _), revision in zip(asked, revisions, strict=True):
            if revision is None:
                one.left_out = TOO_LONG
                continue
            principle = drawn[one.row]
            done = {
                "principle": principle.name, "critique_request": principle.critique, "critique": critique,
                "revision_request": principle.revision, "revision": revision,
            }  # fmt: skip
            one.rounds.append(done)
            one.text = revision

    def judged(self, batch: range) -> list[dict[str, Any]]:
        """Return the lines of judgements.jsonl of some prompts."""
        judge, number = self.voices.judge, self.settings.samples
        assert judge is not None
        asked = [Asked(f"{row}/sample", self.prompts[row].messages) for row in batch]
        seeds = [[stream_seed(self.seed, "sample", row, index) for index in range(number)] for row in batch]
        drawn = self.voices.model.samples(asked, seeds, self.settings.temperature)
        pairs = [
            _Pair(
                row, index, texts[first], texts[second], self.principles.drawn(self.seed, "judge", row, index)
            )
            for row, texts in zip(batch, drawn, strict=True)
            if texts is not None
            for index, (first, second) in enumerate(combinations(range(number), 2))
            if texts[first] and texts[second] and texts[first] != texts[second]
        ]
        verdicts = judge.compare([request for one in pairs for request in one.asked(self.prompts[one.row])])
        lines: dict[int, dict[str, Any]] = {
            row: {
                "where": self.prompts[row].where, "prompt": as_json(self.prompts[row].messages),
                "samples": texts, "pairs": [], "left_out": TOO_LONG if texts is None else None,
            }
            for row, texts in zip(batch, drawn, strict=True)
        }  # fmt: skip
        for one, forward, backward in zip(pairs, verdicts[::2], verdicts[1::2], strict=True):
            if forward is None or backward is None:
                lines[one.row]["left_out"] = TOO_LONG
                continue
            found = {
                "first": one.first, "second": one.second, "principle": one.principle.name,
                "prompts": [request.turns[0].content for request in one.asked(self.prompts[one.row])],
                "log_odds": [forward.log_odds, backward.log_odds], "raw": [forward.raw, backward.raw],
                "margin": margin(forward, backward),
            }  # fmt: skip
            lines[one.row]["pairs"].append(found)
        for line in lines.values():
            if not line["pairs"] and line["left_out"] is None:
                line["left_out"] = ALIKE
        return list(lines.values())

    def pair_rows(self, line: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the preference rows of a line of judgements.jsonl."""
        for pair in line["pairs"]:
            if abs(pair["margin"]) > self.settings.min_margin:
                names = ("first", "second") if pair["margin"] > 0 else ("second", "first")
                chosen, rejected = (pair[name] for name in names)
                yield {
                    "prompt": line["prompt"], "chosen": chosen, "rejected": rejected,
                    "margin": abs(pair["margin"]),
                }  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two answers to the prompt of a row, the `index`-th such pair, and the principle that judges them."""

    row: int
    index: int
    first: str
    second: str
    principle: Principle

    def asked(self, prompt: Conversation) -> tuple[Asked, Asked]:
        """Return the question with the first answer as A, and with it as B."""
        orders = ((self.first, self.second), (self.second, self.first))
        forward, backward = (
            Asked(
                f"{self.row}/judge {self.index} {order}", judge_turns(prompt.messages, a, b, self.principle)
            )
            for order, (a, b) in enumerate(orders)
        )
        return forward, backward


def sft_rows(line: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the training row of a line of critiques.jsonl, if there is one."""
    if line["final"]:
        yield {"messages": [*line["prompt"], {"role": "assistant", "content": line["final"]}]}
