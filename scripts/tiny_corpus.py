"""Write the corpus from which the bundled `tiny` base is trained: a seeded, endless mixture of small chats.

Half of the mixture asks for copying in some way (lists, look-ups, extraction) and a quarter for classification: exact
copying of unseen names, dates and codes, and labels that hang on one word somewhere, are what fine-tuning on real tasks
needs of a small model. The rest is stories, letters, arithmetic with worked answers, JSON and short instructions. The
quickstart's ticket format (`scripts/make_tickets.py`) is left out, and so are the names of its evaluation rows.

The output is a function of seed and count only.
Run: python scripts/tiny_corpus.py --documents 1000 --output corpus.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from make_tickets import Row
from tiny_classes import classification, copied_labels, groups
from tiny_instructions import INSTRUCTIONS
from tiny_notes import extraction
from tiny_words import (
    ADJECTIVES,
    COLOURS,
    FOODS,
    JOBS,
    NOUNS,
    OFFICE,
    OFFICE_STATES,
    OFFICE_VERBS,
    PLACES,
    TOOLS,
    VALUE_KINDS,
    VERBS,
    WEEKDAYS,
    draw_value,
    full_name,
    invent_name,
    iso_date,
    title,
)

Exchange = tuple[str, str]  # a user message and its answer
Document = list[Exchange]


def copied_list(rng: random.Random) -> Document:
    """Random values to be written again, in order or otherwise separated: the purest form of copying."""
    kind = rng.choice([None, *VALUE_KINDS])
    values = [draw_value(rng, kind) for _ in range(rng.randint(2, 8))]
    gap = rng.choice(["\n", ", ", " ", "; ", " | ", "\n- "])
    ask, new_gap = rng.choice(
        [
            ("Copy: {}", gap),
            ("Again: {}", gap),
            ("{}\nThe same, please.", gap),
            ("One per line: {}", "\n"),
            ("With commas: {}", ", "),
            ("JSON list: {}", '","'),
        ]
    )
    answer = new_gap.join(values)
    return [(ask.format(gap.join(values)), f'["{answer}"]' if new_gap == '","' else answer)]


def copied_pairs(rng: random.Random) -> Document:
    """Keys and values to be written again for given keys in another order, or as JSON."""
    kind = rng.choice([None, *VALUE_KINDS])
    key_kinds = ["name", "word", "code"]
    pairs = [
        (draw_value(rng, rng.choice(key_kinds)), draw_value(rng, kind)) for _ in range(rng.randint(2, 5))
    ]
    link, gap = rng.choice([": ", " = ", " -> ", " has ", " is "]), rng.choice(["\n", "; ", ", "])
    text = gap.join(key + link + value for key, value in pairs)
    if rng.random() < 0.3:
        return [(f"As JSON: {text}", json.dumps(dict(pairs), separators=(",", ":")))]
    again = rng.sample(pairs, len(pairs))
    order = ", ".join(key for key, _ in again)
    return [(f"{text}\nNow {order}", gap.join(key + link + value for key, value in again))]


def look_up(rng: random.Random) -> Document:
    """A table of keys and values, and questions about some of them."""
    key_kind, kind = rng.choice(["name", "person", "word", "code", "title"]), rng.choice(VALUE_KINDS)
    table = {draw_value(rng, key_kind): draw_value(rng, kind) for _ in range(rng.randint(2, 6))}
    link = rng.choice([": ", " = ", " - ", " has "])
    text = rng.choice(["\n", "; ", ", "]).join(key + link + value for key, value in table.items())
    if rng.random() < 0.25:
        text = json.dumps(table, separators=rng.choice([(",", ":"), (", ", ": ")]))
    ask = rng.choice(["What is the value of {}?", "{}?", "Find {}.", "What does {} have?", "Look up {}."])
    keys = rng.sample(list(table), min(len(table), rng.randint(1, 4)))
    chat = [(ask.format(key), table[key]) for key in keys]
    return [(f"{text}\n{chat[0][0]}", chat[0][1]), *chat[1:]]


def json_document(rng: random.Random) -> Document:
    """A small JSON list of records made from lines of `key: value`, or invented."""
    draws: dict[str, Callable[[], object]] = {
        "id": lambda: rng.randint(1, 999), "name": lambda: full_name(rng), "age": lambda: rng.randint(1, 99),
        "colour": lambda: rng.choice(COLOURS), "city": lambda: invent_name(rng), "active": lambda: rng.random() < 0.5,
        "born": lambda: iso_date(rng), "tags": lambda: rng.sample(NOUNS, 2), "score": lambda: rng.randint(0, 100) / 10,
    }  # fmt: skip
    keys = rng.sample(list(draws), rng.randint(2, 5))
    records = [{key: draws[key]() for key in keys} for _ in range(rng.randint(1, 4))]
    text = json.dumps(records, separators=rng.choice([(",", ":"), (", ", ": ")]))
    if rng.random() < 0.3:
        return [(f"Give me an example of JSON with {', '.join(keys)}.", text)]
    lines = "\n".join("; ".join(f"{key}: {record[key]}" for key in keys) for record in records)
    return [(f"{lines}\nWrite this as JSON.", text)]


def story(rng: random.Random) -> Document:
    """A few sentences about one or two people, places and things."""
    who, friend, job = invent_name(rng), invent_name(rng), rng.choice(JOBS)
    place, thing, food = rng.choice(PLACES), rng.choice(TOOLS), rng.choice(FOODS)
    pick = rng.choice
    pasts = list(VERBS.values())
    lines = [
        f"{who} was a {pick(ADJECTIVES)} {job} who lived near the {place}.",
        f"One {pick(WEEKDAYS)}, {who} {pick(pasts)} a {pick(ADJECTIVES)} {thing} at the {place}.",
        f'{friend} came by and asked, "What do you want to do with the {thing}?"',
        f'"I will give it to the {pick(JOBS)}," said {who}.',
        f"Then {who} and {friend} shared some {food} and {pick(FOODS)}.",
        f"The {pick(COLOURS)} {pick(NOUNS)} was {pick(ADJECTIVES)}, but {friend} did not mind.",
        f"In the evening they {pick(pasts)} the {thing} and went home to the {pick(PLACES)}.",
        f"{friend} thanked {who} for the {food}, and both were {pick(ADJECTIVES)} again.",
    ]
    keep = sorted(rng.sample(range(len(lines)), rng.randint(3, 7)))
    ask = pick(["Tell a story about {} and {}.", "Write a short story with {} and {}.", "Story: {}, {}"])
    return [(ask.format(who, friend), " ".join(lines[i] for i in keep))]


def letter(rng: random.Random) -> Document:
    """A short everyday or office letter, with a subject to name in a quarter of the cases."""
    pick = rng.choice
    one, two = pick(OFFICE), pick(OFFICE)
    lines = [
        f"I cannot {pick(OFFICE_VERBS)} the {one} because the {two} is {pick(OFFICE_STATES)}.",
        f"Could you please {pick(OFFICE_VERBS)} our {two}?",
        f"The {one} was {pick(OFFICE_STATES)} when we wanted to {pick(OFFICE_VERBS)} it.",
        f"We have been waiting for {rng.randint(2, 30)} days and still have no {one}.",
        f"It would be great if you could {pick(OFFICE_VERBS)} the {two} before {pick(WEEKDAYS)}.",
        f"Since {pick(WEEKDAYS)} the {one} shows that the {two} is not {pick(OFFICE_STATES)}.",
        f"My {one} is {pick(OFFICE_STATES)}, but the {two} that I ordered is {pick(OFFICE_STATES)}.",
        f"{full_name(rng)} from {title(rng)} will {pick(OFFICE_VERBS)} it on {iso_date(rng)}.",
        f"Everybody is happy with the new {one}.",
        f"Why is there no {one} in the {two}?",
    ]
    body = " ".join(rng.sample(lines, rng.randint(2, 5)))
    greeting, farewell = pick(["Dear", "Hello", "Hi"]), pick(["Regards", "Thanks", "Best"])
    text = f"{greeting} {invent_name(rng)}, {body} {farewell}, {full_name(rng)}"
    if rng.random() < 0.6:
        return [(f"Write a letter about the {one} and the {two}.", text)]
    return pick(
        [
            [(f"{text}\nWho signed the letter?", text.rsplit(", ", 1)[1])],
            [(f"{text}\nTo whom is it?", text.split(",")[0].split()[1])],
            [(f"How does this letter begin?\n{text}", text.split(",")[0])],
        ]
    )


def instruction(rng: random.Random) -> Document:
    """One to three unrelated short instructions with their answers, arithmetic among them."""
    return [rng.choice(INSTRUCTIONS)(rng) for _ in range(rng.randint(1, 3))]


MIXTURE: list[tuple[Callable[[random.Random], Document], float]] = [
    (copied_list, 0.09), (copied_labels, 0.10), (copied_pairs, 0.06), (look_up, 0.07), (extraction, 0.16),
    (classification, 0.20), (groups, 0.08), (json_document, 0.03), (story, 0.04), (letter, 0.04), (instruction, 0.13),
]  # fmt: skip


def documents(seed: int) -> Iterator[Document]:
    """The endless sequence of documents of a seed."""
    rng = random.Random(f"tiny-corpus-{seed}")
    makers, weights = [maker for maker, _ in MIXTURE], [weight for _, weight in MIXTURE]
    while True:
        yield rng.choices(makers, weights)[0](rng)


def as_row(document: Document) -> Row:
    """The chat row of a document."""
    return {
        "messages": [
            {"role": role, "content": content}
            for exchange in document
            for role, content in zip(("user", "assistant"), exchange, strict=True)
        ]
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the first documents of the corpus as JSONL."""
    parser = argparse.ArgumentParser(description="Write the tiny base's training corpus.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with options.output.open("w", encoding="utf-8", newline="\n") as file:
        for _, document in zip(range(options.documents), documents(options.seed), strict=False):
            file.write(json.dumps(as_row(document), ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
