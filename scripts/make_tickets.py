"""Write the quickstart's data: support messages and the JSON ticket each one should become.

Extraction into a fixed JSON shape is one of the most common reasons to fine-tune a small model. The hard part is
not the classes (category, severity) but copying what was never seen: every product and person in the evaluation
rows is made of invented words that occur neither in the training rows nor in the corpus of the bundled base model
(`scripts/tiny_corpus.py`), and the due dates are drawn over two years. Which split a word belongs to is a function of
the word alone (`split_of`), so the three generators agree without sharing a list.

The output is a function of the seed only: the same bytes on every run and platform.
Run: python scripts/make_tickets.py
"""

from __future__ import annotations

import argparse
import json
import random
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

TRAIN_ROWS, EVAL_ROWS = 2000, 300
ASSETS = Path(__file__).resolve().parent.parent / "lora_cli" / "assets" / "tiny"

ONSETS = "b br c ch d dr f g gr h j k l m n p r s sh st t tr v w z".split()
VOWELS = "a e i o u".split()
CODAS = "l m n r s t k x nd".split()
SUFFIXES = ("Desk Cloud Mini Pro Air Sync Hub Pay Mail Track Board Store").split()

# Message parts. {p} is the product; every part belongs to exactly one class, so a ticket has one right answer.
PROBLEMS: dict[str, list[str]] = {
    "bug": [
        "{p} crashes when I open a report.",
        "{p} freezes as soon as I press save.",
        "The export in {p} gives an empty file.",
        "Since the update {p} shows an error on start.",
    ],
    "billing": [
        "I was charged twice for {p}.",
        "The invoice for {p} shows the wrong amount.",
        "Please refund my last payment for {p}.",
        "My card was billed for {p} after I cancelled.",
    ],
    "access": [
        "I cannot log in to {p}.",
        "My password for {p} is not accepted.",
        "Our new colleague has no access to {p}.",
        "{p} says that my account is locked.",
    ],
    "delivery": [
        "The parcel with {p} has not arrived.",
        "Our {p} was sent to the wrong address.",
        "{p} came with a broken box.",
        "The tracking for {p} has not moved in days.",
    ],
    "feature": [
        "Could {p} get a dark mode?",
        "It would be great if {p} could read spreadsheets.",
        "Please add keyboard shortcuts to {p}.",
        "We would like {p} to support more languages.",
    ],
}
URGENCIES: dict[str, list[str]] = {
    "low": [
        "There is no rush.",
        "It is only a small thing.",
        "This can wait.",
        "Whenever you have time.",
        "It does not bother us much.",
    ],
    "medium": [
        "It slows us down a bit.",
        "We have a workaround for now.",
        "It is annoying but we can work.",
        "It happens now and then.",
        "Some of us are affected.",
    ],
    "high": [
        "It is urgent.",
        "This blocks my team.",
        "We are losing hours every day.",
        "Please treat this with priority.",
        "My boss is getting nervous.",
    ],
    "critical": [
        "Nobody can work!",
        "All our sites are down!",
        "We are losing customers right now!",
        "This is an emergency!",
        "Everything has stopped!",
    ],
}
OPENINGS = [
    "Hi, {c} here.",
    "Hello, this is {c}.",
    "My name is {c}.",
    "{c} writing.",
    "Good morning, I am {c}.",
    "Dear team, {c} here.",
    "From: {c}.",
]
CLOSINGS = ["Regards, {c}", "Thanks, {c}", "Best, {c}", "Yours, {c}", "{c}"]
DEADLINES = [
    "Please solve it by {d}.",
    "We need this before {d}.",
    "Deadline is {d}.",
    "Can it be done by {d}?",
    "I need an answer until {d}.",
    "It has to be settled by {d}.",
    "Latest date: {d}.",
]


class Message(TypedDict):
    """One chat turn in the OpenAI form."""

    role: str
    content: str


class Row(TypedDict):
    """One line of a chat JSONL file."""

    messages: list[Message]


def split_of(word: str) -> str:
    """The split ("train" or "eval") that an invented word belongs to, as a function of the word alone."""
    return "eval" if zlib.crc32(word.lower().encode()) % 5 == 0 else "train"


def invent_word(rng: random.Random, split: str) -> str:
    """A capitalised, pronounceable word of two or three syllables of the given split."""
    while True:
        syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(2 + (rng.random() < 0.15))]
        word = "".join(syllables) + (rng.choice(CODAS) if rng.random() < 0.5 else "")
        # Shorter ones are too often ordinary words ("date").
        if 5 <= len(word) <= 9 and split_of(word) == split:
            return word.capitalize()


def invent_product(rng: random.Random, split: str) -> str:
    """A product name: one invented word, mostly followed by an ordinary suffix."""
    word = invent_word(rng, split)
    return f"{word} {rng.choice(SUFFIXES)}" if rng.random() < 0.6 else word


def invent_person(rng: random.Random, split: str) -> str:
    """A person's first and last name, both invented."""
    return f"{invent_word(rng, split)} {invent_word(rng, split)}"


def draw_date(rng: random.Random) -> str:
    """A date of 2026 or 2027 in ISO form (days up to 28, so that every month has it)."""
    return f"{rng.randint(2026, 2027)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def make_ticket(rng: random.Random, split: str) -> tuple[str, dict[str, str | None]]:
    """One support message and its ticket; one message in ten names no due date, and its ticket has null there."""
    product, customer = invent_product(rng, split), invent_person(rng, split)
    category, severity = rng.choice(list(PROBLEMS)), rng.choice(list(URGENCIES))
    due = draw_date(rng) if rng.random() < 0.9 else None
    body = [rng.choice(PROBLEMS[category]).format(p=product), rng.choice(URGENCIES[severity])]
    if due is not None:
        body.insert(rng.randint(1, 2), rng.choice(DEADLINES).format(d=due))
    if rng.random() < 0.6:
        body.insert(0, rng.choice(OPENINGS).format(c=customer))
    else:
        body.append(rng.choice(CLOSINGS).format(c=customer))
    ticket = {
        "product": product,
        "category": category,
        "severity": severity,
        "customer": customer,
        "due": due,
    }
    return " ".join(body), ticket


def make_rows(split: str, count: int, seed: int) -> list[Row]:
    """`count` distinct chat rows of one split; the answer is the ticket as compact JSON."""
    rng = random.Random(f"tickets-{split}-{seed}")
    rows: dict[str, Row] = {}
    while len(rows) < count:
        message, ticket = make_ticket(rng, split)
        answer = json.dumps(ticket, separators=(",", ":"))
        rows[message] = {
            "messages": [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
        }
    return list(rows.values())


def entity_words(rows: Sequence[Row]) -> set[str]:
    """The invented words in the products and customers of the rows' tickets."""
    words: set[str] = set()
    for row in rows:
        ticket = json.loads(row["messages"][1]["content"])
        words.update(f"{ticket['product']} {ticket['customer']}".split())
    return words - set(SUFFIXES)


def write_jsonl(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows one a line, UTF-8, with a newline at the end on every platform."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def main(arguments: Sequence[str] | None = None) -> None:
    """Write `tickets.train.jsonl` and `tickets.eval.jsonl` and check that they share no entity name."""
    parser = argparse.ArgumentParser(description="Write the quickstart's ticket data.")
    parser.add_argument("--output", type=Path, default=ASSETS, help="folder of the two files")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    train, held_out = (
        make_rows("train", TRAIN_ROWS, options.seed),
        make_rows("eval", EVAL_ROWS, options.seed),
    )
    shared = entity_words(train) & entity_words(held_out)
    assert not shared, f"names in both splits: {sorted(shared)}"
    write_jsonl(options.output / "tickets.train.jsonl", train)
    write_jsonl(options.output / "tickets.eval.jsonl", held_out)
    print(f"wrote {len(train)} + {len(held_out)} rows to {options.output}")


if __name__ == "__main__":
    main()
