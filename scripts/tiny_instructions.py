"""Short instructions and arithmetic for the tiny base's corpus: each function draws one (question, answer).

Arithmetic answers come in three forms: the bare number, the equation, and worked steps that end in `#### number`,
the form of GSM8K, so that fine-tuning and reinforcement on small arithmetic start from something.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tiny_words import (
    ADJECTIVES,
    FOODS,
    GROUPS,
    JOBS,
    NOUNS,
    OPPOSITES,
    PLACES,
    TOOLS,
    VERBS,
    draw_value,
    full_name,
    invent_name,
    iso_date,
    lower_word,
)

Exchange = tuple[str, str]


def addition(rng: random.Random) -> Exchange:
    """A sum, difference or product of small numbers."""
    a, b, sign = rng.randint(0, 50), rng.randint(0, 50), rng.choice("++-*")
    if sign == "*":
        a, b = a % 13, b % 13
    elif sign == "-":
        a, b = max(a, b), min(a, b)
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    ask = rng.choice(["What is {}?", "{} = ?", "Compute {}.", "Calculate {}", "{}"]).format(f"{a} {sign} {b}")
    form = rng.choice(["{r}", "{r}", "{q} = {r}", "{q} = {r}\n#### {r}", "The answer is {r}."])
    return ask, form.format(q=f"{a} {sign} {b}", r=result)


def word_problem(rng: random.Random) -> Exchange:
    """A story with one or two steps, worked out and closed by `#### number`."""
    who, friend, thing = invent_name(rng), invent_name(rng), rng.choice(FOODS + TOOLS) + "s"
    a, b, c = rng.randint(2, 40), rng.randint(1, 20), rng.randint(2, 5)
    kind = rng.randrange(4)
    if kind == 0:
        ask = f"{who} has {a} {thing}. {friend} gives {who} {b} more. How many {thing} does {who} have now?"
        return ask, f"{who} has {a} + {b} = {a + b} {thing}.\n#### {a + b}"
    if kind == 1:
        ask = f"{who} had {a + b} {thing} and sold {b} of them. How many {thing} are left?"
        return ask, f"There are {a + b} - {b} = {a} {thing} left.\n#### {a}"
    if kind == 2:
        ask = f"{who} buys {b} {thing}. Each costs ${c}. How much does {who} pay?"
        return ask, f"{who} pays {b} * {c} = ${b * c}.\n#### {b * c}"
    total = b * c + a
    ask = (
        f"{who} has {c} boxes with {b} {thing} each and finds {a} more. How many {thing} are there in total?"
    )
    return (
        ask,
        f"The boxes hold {c} * {b} = {b * c} {thing}.\nIn total {b * c} + {a} = {total}.\n#### {total}",
    )


def repeat(rng: random.Random) -> Exchange:
    """Say something again, word for word."""
    text = rng.choice(
        [sentence(rng), full_name(rng), draw_value(rng), f"{lower_word(rng)} {draw_value(rng)}"]
    )
    ask = rng.choice(
        ["Repeat: {}", "Say this again: {}", "Copy this text.\n{}", "Echo {}", "Repeat after me: {}"]
    )
    return ask.format(text), text


def sentence(rng: random.Random) -> str:
    """One plain English sentence."""
    verb = rng.choice(list(VERBS.values()))
    subject = rng.choice([invent_name(rng), f"The {rng.choice(ADJECTIVES)} {rng.choice(JOBS)}"])
    return f"{subject} {verb} the {rng.choice(NOUNS)} near the {rng.choice(PLACES)}."


def words_of(rng: random.Random) -> list[str]:
    """Three to six distinct words."""
    return list(dict.fromkeys(lower_word(rng) for _ in range(rng.randint(3, 6))))


def order_words(rng: random.Random) -> Exchange:
    """Reverse, sort, or pick from a list of words."""
    words = words_of(rng)
    listed = ", ".join(words)
    ask, answer = rng.choice(
        [
            ("Reverse the list", ", ".join(reversed(words))),
            ("Sort these words", ", ".join(sorted(words))),
            ("Give the first word", words[0]),
            ("Give the last word", words[-1]),
            ("How many words are there", str(len(words))),
            ("Write these words as a JSON list", '["' + '","'.join(words) + '"]'),
            ("Write one word per line", "\n".join(words)),
        ]
    )
    return f"{ask}: {listed}", answer


def order_numbers(rng: random.Random) -> Exchange:
    """Sort numbers or find the largest or smallest."""
    numbers = rng.sample(range(100), rng.randint(2, 5))
    listed = ", ".join(map(str, numbers))
    ask, answer = rng.choice(
        [
            ("Which is the largest", str(max(numbers))),
            ("Which is the smallest", str(min(numbers))),
            ("Sort from small to large", ", ".join(map(str, sorted(numbers)))),
        ]
    )
    return f"{ask}: {listed}", answer


def letters(rng: random.Random) -> Exchange:
    """Change or spell the letters of a word."""
    word = lower_word(rng)
    ask, answer = rng.choice(
        [
            ("Write in capital letters", word.upper()),
            ("Spell", "-".join(word)),
            ("First letter of", word[0]),
            ("How many letters has", str(len(word))),
            ("Start with a capital", word.capitalize()),
        ]
    )
    return f"{ask}: {word}", answer


def word_knowledge(rng: random.Random) -> Exchange:
    """Opposites, past tenses, and which group a word belongs to."""
    kind = rng.randrange(4)
    if kind == 0:
        word, other = rng.choice(list(OPPOSITES.items()))
        if rng.random() < 0.5:
            word, other = other, word
        return f"What is the opposite of {word}?", other
    if kind == 1:
        verb, past = rng.choice(list(VERBS.items()))
        return f"Past tense of {verb}?", past
    group = rng.choice(list(GROUPS))
    if kind == 2:
        return f"What kind of thing is {rng.choice(GROUPS[group])}?", group
    return f"Name three examples of {group}.", ", ".join(rng.sample(GROUPS[group], 3))


def feeling(rng: random.Random) -> Exchange:
    """Whether a remark is positive or negative."""
    subject = f"{rng.choice(['The', 'This', 'Our'])} {rng.choice(NOUNS)}"
    good = ["is wonderful", "made me smile", "works very well", "was a great help", "is the best I have seen"]
    bad = [
        "is terrible",
        "made me angry",
        "broke at once",
        "was a waste of money",
        "is the worst I have seen",
    ]
    positive = rng.random() < 0.5
    remark = f"{subject} {rng.choice(good if positive else bad)}."
    ask = rng.choice(
        ["Is this positive or negative? {}", "Feeling of the remark: {}", "{}\nPositive or negative?"]
    )
    return ask.format(remark), "positive" if positive else "negative"


def yes_or_no(rng: random.Random) -> Exchange:
    """A question about a list or two numbers, answered with yes or no."""
    if rng.random() < 0.5:
        a, b = rng.sample(range(100), 2)
        return f"Is {a} larger than {b}?", "Yes." if a > b else "No."
    words = words_of(rng)
    asked = rng.choice(words) if rng.random() < 0.5 else lower_word(rng)
    return f"Is {asked} in this list: {', '.join(words)}?", "Yes." if asked in words else "No."


def date_form(rng: random.Random) -> Exchange:
    """Take a date apart or copy it out of a sentence."""
    date = iso_date(rng)
    year, month, day = date.split("-")
    ask, answer = rng.choice(
        [
            (f"What is the year of {date}?", year),
            (f"What is the month of {date}?", month),
            (f"What is the day of {date}?", day),
            (f"{sentence(rng)} It was on {date}. Which date?", date),
            (f"Join year {year}, month {month}, day {day}.", date),
            (f"Between {date} and {iso_date(rng)}: which date comes first in this question?", date),
        ]
    )
    return ask, answer


def explanation(rng: random.Random) -> Exchange:
    """A short how-to or a polite answer."""
    thing, place, food = rng.choice(TOOLS), rng.choice(PLACES), rng.choice(FOODS)
    return rng.choice(
        [
            (f"What is a {thing}?", f"A {thing} is a tool. People use it at home or at work."),
            (f"Who works in the {place}?", f"A {rng.choice(JOBS)} may work in the {place}."),
            (
                f"How do I get to the {place}?",
                f"Walk straight on and turn left. The {place} is near the bridge.",
            ),
            (
                f"How do I make {food} better?",
                f"1. Use fresh {food}.\n2. Add a little salt.\n3. Serve it warm.",
            ),
            (f"Write a sentence about a {thing}.", f"The {thing} is {rng.choice(ADJECTIVES)}."),
            ("Hello!", "Hello! How can I help you?"),
            ("Thank you.", "You are welcome."),
            (f"My name is {(who := invent_name(rng))}.", f"Nice to meet you, {who}."),
            (f"Say hello to {(who := invent_name(rng))}.", f"Hello, {who}!"),
            (f"Make this polite: Give me the {thing}.", f"Could you please give me the {thing}?"),
        ]
    )


INSTRUCTIONS: list[Callable[[random.Random], Exchange]] = [
    addition, addition, addition, word_problem, word_problem, repeat, repeat, order_words, order_words, order_numbers,
    letters, word_knowledge, feeling, yes_or_no, date_form, date_form, explanation, explanation,
]  # fmt: skip
