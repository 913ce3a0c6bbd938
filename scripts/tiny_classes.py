"""Classification for the tiny base's corpus: messages whose sentences each reveal one attribute of a small set.

A label often hangs on one or two words somewhere in a message. Which words, and under which name, differs from task to
task; that one looks for them at all is what a base has to bring along, and what these documents train.
"""

from __future__ import annotations

import json
import random

from tiny_words import LABELS, OFFICE, TOOLS, WORDS, invent_name, iso_date, title
from tiny_words import full_name as draw_person

Exchange = tuple[str, str]  # a user message and its answer

# attribute -> label -> sentences; {n} is a name or title.
ATTRIBUTES: dict[str, dict[str, list[str]]] = {
    "topic": {
        "money": [
            "{n} took too much from my card.", "The amount I paid for {n} is too high.", "Send the money for {n} back.",
            "The bill from {n} came a second time.", "I want a lower price for {n}.", "{n} has not been paid yet.",
            "My bank asks about the tax on {n}.", "There was no discount on {n}.",
        ],
        "post": [
            "The box from {n} was open.", "The letter to {n} got lost.", "{n} came to another house.",
            "The driver did not find {n}.", "I still wait for the parcel from {n}.", "{n} was in the mail for weeks.",
            "Two things in the box of {n} are missing.", "The sender of {n} put a wrong street on it.",
        ],
        "computer": [
            "The program {n} shows nothing.", "{n} does not start any more.", "There is an error in {n}.",
            "{n} forgot what I wrote.", "After a new version {n} stops all the time.", "The file from {n} has no text.",
            "{n} finds the wrong pages.", "The printer cannot read {n}.",
        ],
        "safety": [
            "I forgot the password of {n}.", "Someone locked the door of {n}.", "{n} does not let me in.",
            "The key for {n} is gone.", "My account at {n} is closed.", "I have no way to sign in to {n}.",
            "{n} asks for a code that I do not have.", "Who may enter {n}?",
        ],
        "wish": [
            "It would be nice if {n} had more colours.", "I would like a bigger {n}.", "Could {n} also sing?",
            "Please add a clock to {n}.", "A second door would make {n} better.", "We hope {n} gets a view of the sea.",
            "Can you make {n} read to us?", "I wish that {n} could speak.",
        ],
        "sport": [
            "{n} won the race.", "We ran with {n} to the lake.", "The team of {n} lost the match.",
            "{n} throws the ball far.", "They swim at {n} each week.", "{n} scored twice.",
        ],
        "music": [
            "{n} plays the drum.", "We sang a song by {n}.", "The concert of {n} was loud.",
            "{n} wrote a new tune.", "The guitar of {n} is old.", "Listen to the band {n}.",
        ],
        "food": [
            "The soup at {n} was cold.", "{n} baked fresh bread.", "We ate cake with {n}.",
            "There is salt in the tea of {n}.", "{n} cooks rice and beans.", "The kitchen of {n} smells good.",
        ],
    },
    "hurry": {
        "none": [
            "Take your time.", "There is no hurry at all.", "We can wait for weeks.", "It is not important.",
            "Any day is fine.", "Do it when you are free.", "It is a minor thing.",
        ],
        "some": [
            "Soon would be good.", "It is a bit annoying.", "We found another way for now.", "It hurts now and then.",
            "A few of us mind.", "It makes us a little slower.", "This should not stay so.",
        ],
        "much": [
            "Be quick, please.", "My team has to wait for this.", "We lose time every hour.", "It is very important.",
            "This is a priority for us.", "I am getting nervous.", "Our boss is angry about it.",
        ],
        "extreme": [
            "All work has stopped!", "Help, at once!", "Nothing works at any site!", "We lose everything right now!",
            "It is a disaster!", "The whole company is down!", "Danger, call now!",
        ],
    },
    "mood": {
        "happy": ["I am so glad.", "What a lovely day!", "This made me smile.", "We laughed a lot.", "Great news!"],
        "sad": ["I have to cry.", "We miss you so much.", "It breaks my heart.", "I feel alone.", "What a pity."],
        "angry": ["I am furious.", "How dare you!", "This is not acceptable.", "Never do that again!", "I hate this."],
        "calm": ["I feel at peace.", "All is quiet here.", "We sit by the fire.", "Nothing troubles me.", "I slept."],
    },
    "weather": {
        "sunny": ["The sun burns.", "There is not a cloud in the sky.", "It is bright and warm."],
        "rain": ["It pours.", "Take an umbrella.", "Our shoes are wet.", "Drops fall on the roof."],
        "snow": ["The hills are white.", "The children build a snowman.", "The road is icy."],
        "wind": ["My hat flew away.", "The trees bend.", "A storm shakes the house."],
    },
    "cost": {
        "cheap": ["It cost almost nothing.", "I got it for a penny.", "It was a bargain."],
        "fair": ["The price was fine.", "It cost what it is worth.", "We paid the usual price."],
        "dear": ["It cost a fortune.", "Only rich people can buy it.", "I had to sell my car for it."],
    },
    "age": {
        "child": ["I go to first grade.", "My mother brings me to school.", "I am five years old."],
        "adult": ["I work all day.", "I have two small children.", "I drive to the office."],
        "senior": ["I have been retired for years.", "My grandchildren visit me.", "I was born long before the war."],
    },
    "place": {
        "city": ["The streets are full of cars.", "We live on the tenth floor.", "The subway is near."],
        "village": ["The cows pass our door.", "There is only one shop.", "Everybody knows everybody here."],
        "sea": ["The waves are high.", "Our boat lies in the harbour.", "I can smell the salt water."],
        "mountain": ["The path is steep.", "The air is thin up here.", "We climb to the top."],
    },
}  # fmt: skip
SIGNED = [
    "Signed {}.",
    "{} speaking.",
    "Yours, {}",
    "It is {} who writes.",
    "{}",
    "I am {}, by the way.",
    "Hello from {}.",
]
DATED = ["Written on {}.", "The day was {}.", "Today is {}.", "We meet on {}.", "Come by {}."]
SINGLE = ["What is the {}?", "{}?", "Name the {}.", "Which {} fits?", "Give the {} in one word."]


def classification(rng: random.Random) -> list[Exchange]:
    """A message with one sentence for each of one to four attributes; single questions about them, or JSON."""
    # The topic has the most labels and sentences, so it is learned last and comes most often.
    pool = list(
        dict.fromkeys(rng.choices(list(ATTRIBUTES), weights=[10, 3, 2, 1, 1, 1, 1], k=rng.randint(1, 4)))
    )
    values, sentences = {}, []
    name = (
        rng.choice([invent_name, title])(rng) if rng.random() < 0.8 else f"the {rng.choice(OFFICE + TOOLS)}"
    )
    for attribute in pool:
        values[attribute] = rng.choice(list(ATTRIBUTES[attribute]))
        sentence = rng.choice(ATTRIBUTES[attribute][values[attribute]]).format(n=name)
        sentences.append(sentence[0].upper() + sentence[1:])
    if rng.random() < 0.4:
        values["writer"] = draw_person(rng)
        sentences.append(rng.choice(SIGNED).format(values["writer"]))
    if rng.random() < 0.4:
        values["day"] = iso_date(rng)
        sentences.append(rng.choice(DATED).format(values["day"]))
    rng.shuffle(sentences)
    message = " ".join(sentences)
    if rng.random() < 0.4:
        asked = rng.sample(list(values), min(len(values), rng.randint(1, 3)))
        chat = [(rng.choice(SINGLE).format(key), values[key]) for key in asked]
        return [(f"{message}\n{chat[0][0]}", chat[0][1]), *chat[1:]]
    keys = rng.sample(list(values), len(values))
    answer = json.dumps({key: values[key] for key in keys}, separators=rng.choice([(",", ":"), (", ", ": ")]))
    return [(f"{message}\nJSON with {', '.join(keys)}.", answer)]


def copied_labels(rng: random.Random) -> list[Exchange]:
    """Words as they stand behind a quote or at a line's start, to be written again or looked up.

    Every word that may become a label of some later task has to be an answer here: a small model's head cannot tell
    words apart that it never had to write, and an adapter leaves the head as it is.
    """
    labels = rng.sample(LABELS, rng.randint(2, 7))
    quoted = '["' + '","'.join(labels) + '"]'
    table = {invent_name(rng): label for label in labels}
    text = json.dumps(table, separators=(",", ":"))
    name = rng.choice(list(table))
    return rng.choice(
        [
            [("Copy: " + "\n".join(labels), "\n".join(labels))],
            [("JSON list: " + ", ".join(labels), quoted)],
            [(f"Copy: {quoted}", quoted)],
            [("\n".join(f"{key}: {label}" for key, label in table.items()) + "\nWrite this as JSON.", text)],
            [(f"{text}\n{key}?", table[key]) for key in [name]],
            [(f"Which of {', '.join(labels)} begins with {labels[0][:2]}?", labels[0])],
        ]
    )


def groups(rng: random.Random) -> list[Exchange]:
    """Labels with the words that belong to each, and a sentence whose one word decides: rules given in the context."""
    labels = rng.sample(LABELS, rng.randint(2, 5))
    words = rng.sample(WORDS, 3 * len(labels))
    members = {label: words[3 * i : 3 * i + 3] for i, label in enumerate(labels)}
    rules = rng.choice(["\n", "; "]).join(f"{label}: {', '.join(own)}" for label, own in members.items())
    chat = []
    for label in rng.sample(labels, rng.randint(1, len(labels))):
        word, name = rng.choice(members[label]), invent_name(rng)
        question = rng.choice(["{w}?", "{n} has the {w}.", "Where does {w} belong?", "We saw {w} and {n}."])
        answer = rng.choice([label, label, json.dumps({"label": label, "word": word}, separators=(",", ":"))])
        chat.append((question.format(w=word, n=name) + (" JSON." if answer != label else ""), answer))
    return [(f"{rules}\n{chat[0][0]}", chat[0][1]), *chat[1:]]
