"""Extraction for the tiny base's corpus: short notes on several subjects, and questions or JSON about their fields."""

from __future__ import annotations

import json
import random

from tiny_words import COLOURS, TOOLS, draw_value

Exchange = tuple[str, str]  # a user message and its answer

# Notes for extraction. Each field is (key, kind of value, question); {key} stands in the sentences.
NOTES: list[tuple[list[str], dict[str, tuple[str, str]]]] = [
    (
        [
            "{host} invites you to the {event}.",
            "It starts on {day}.",
            "The room is {room}.",
            "Come at {time}.",
        ],
        {
            "host": ("person", "Who is the host?"),
            "event": ("title", "What is the event called?"),
            "day": ("date", "On which day is it?"),
            "room": ("code", "Which room is it?"),
            "time": ("time", "At what time?"),
        },
    ),
    (
        [
            "{author} wrote {book}.",
            "It was printed on {printed}.",
            "The shelf is {shelf}.",
            "It has {pages} pages.",
        ],
        {
            "author": ("person", "Who is the author?"),
            "book": ("title", "What is the title?"),
            "printed": ("date", "When was it printed?"),
            "shelf": ("code", "Where is it on the shelf?"),
            "pages": ("number", "How many pages are there?"),
        },
    ),
    (
        [
            "The ship {ship} left {port} on {left}.",
            "Captain {captain} is on board.",
            "It should land by {lands}.",
        ],
        {
            "ship": ("title", "Which ship is it?"),
            "port": ("name", "Which port did it leave?"),
            "left": ("date", "When did it leave?"),
            "captain": ("person", "Who is the captain?"),
            "lands": ("date", "When should it land?"),
        },
    ),
    (
        [
            "{patient} saw doctor {doctor}.",
            "The next visit is on {visit}.",
            "The file is {file}.",
            "All is well.",
        ],
        {
            "patient": ("person", "Who is the patient?"),
            "doctor": ("name", "Which doctor was it?"),
            "visit": ("date", "When is the next visit?"),
            "file": ("code", "What is the file number?"),
        },
    ),
    (
        ["My name is {player} and I play for {team}.", "We beat {rival}.", "The match was on {match}."],
        {
            "player": ("person", "Who plays?"),
            "team": ("title", "What is the team?"),
            "rival": ("title", "Who lost?"),
            "match": ("date", "When was the match?"),
        },
    ),
    (
        [
            "I am {guest}.",
            "I would like a table at {inn}.",
            "We come on {date} at {time}.",
            "We are {people} people.",
        ],
        {
            "guest": ("person", "Who is the guest?"),
            "inn": ("title", "Which inn is it?"),
            "date": ("date", "For which date?"),
            "time": ("time", "For what time?"),
            "people": ("number", "How many people come?"),
        },
    ),
    (
        ["Please return {item} until {back}.", "You borrowed it on {lent}.", "Thanks, {owner}"],
        {
            "item": ("title", "What must be returned?"),
            "back": ("date", "Until when?"),
            "lent": ("date", "When was it borrowed?"),
            "owner": ("person", "Who is the owner?"),
        },
    ),
    (
        ["{pupil} here.", "My essay on {topic} will be ready by {ready}.", "It is for {school}."],
        {
            "pupil": ("person", "Who is the pupil?"),
            "topic": ("title", "What is the essay about?"),
            "ready": ("date", "When will it be ready?"),
            "school": ("name", "For which school?"),
        },
    ),
    (
        ["The {colour} {thing} belongs to {keeper}.", "It was found near {place} on {found}."],
        {
            "colour": ("colour", "Which colour is it?"),
            "thing": ("tool", "What was found?"),
            "keeper": ("person", "Who owns it?"),
            "place": ("name", "Where was it found?"),
            "found": ("date", "When was it found?"),
        },
    ),
]
FILLERS = [
    "The weather was fine.", "Nobody knew why.", "Please read this twice.", "It was a long day.", "Thank you!",
    "All is ready.", "We look forward to it.", "There is nothing else to say.", "Call us any time.",
]  # fmt: skip


def write_note(rng: random.Random) -> tuple[str, dict[str, str], dict[str, tuple[str, str]]]:
    """A short note on one subject with the values of its fields, in the order in which the subject lists them."""
    sentences, fields = rng.choice(NOTES)
    draws = {"colour": lambda: rng.choice(COLOURS), "tool": lambda: rng.choice(TOOLS)}
    values = {}
    for key, (kind, _) in fields.items():
        values[key] = draws[kind]() if kind in draws else draw_value(rng, kind)
    chosen = rng.sample(sentences, rng.randint(max(1, len(sentences) - 2), len(sentences)))
    used = {key: value for key, value in values.items() if any("{" + key + "}" in s for s in chosen)}
    chosen += rng.sample(FILLERS, rng.randint(0, 2))
    rng.shuffle(chosen)
    return " ".join(chosen).format(**values), used, fields


def extraction(rng: random.Random) -> list[Exchange]:
    """A note, and questions about single fields or a request for JSON."""
    note, values, fields = write_note(rng)
    while not values:
        note, values, fields = write_note(rng)
    separators = rng.choice([(",", ":"), (",", ":"), (", ", ": ")])
    if rng.random() < 0.4:
        keys = rng.sample(list(values), rng.randint(1, len(values)))
        asked = [(fields[key][1], values[key]) for key in keys]
        return [(f"{note}\n{asked[0][0]}", asked[0][1]), *asked[1:]]
    if rng.random() < 0.5:
        answer = json.dumps(values, separators=separators)
        ask = rng.choice(["Give this as JSON.", "Turn the note into JSON.", "JSON please."])
    else:
        keys = rng.sample(list(fields), rng.randint(1, len(fields)))
        answer = json.dumps({key: values.get(key) for key in keys}, separators=separators)
        ask = rng.choice(["JSON with {}.", "Extract {} as JSON.", "Give me {} in JSON."]).format(
            ", ".join(keys)
        )
    return [(f"{note}\n{ask}" if rng.random() < 0.7 else f"{ask}\n{note}", answer)]
