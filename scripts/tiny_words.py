"""Words and small draws shared by the generators of the tiny base's corpus (`scripts/tiny_corpus.py`).

Names are mostly invented: a model that has seen only a closed list of names learns the list, one that sees a new name
in every document has to learn to copy. No name of the quickstart's evaluation split is ever drawn.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable

from make_tickets import invent_word, split_of

ANIMALS = "cat dog bird fox horse mouse cow duck frog bear goat fish owl wolf hen rabbit".split()
FOODS = "bread soup cheese rice apple pear cake honey corn bean plum salad pie tea milk egg".split()
PLACES = (
    "house garden school market river forest harbour library station farm kitchen museum park bridge".split()
)
TOOLS = "hammer rope lamp knife ladder bucket needle clock wheel basket key broom mirror brush".split()
JOBS = (
    "teacher baker farmer doctor sailor painter driver nurse tailor miller gardener writer cook pilot".split()
)
COLOURS = "red blue green yellow white black brown grey pink purple orange golden".split()
ADJECTIVES = "big small old new happy sad quick slow bright dark warm cold quiet loud clean heavy".split()
OPPOSITES = {
    "big": "small", "hot": "cold", "old": "new", "happy": "sad", "quick": "slow", "bright": "dark",
    "loud": "quiet", "clean": "dirty", "heavy": "light", "early": "late", "open": "closed", "full": "empty",
    "high": "low", "long": "short", "hard": "soft", "wet": "dry", "strong": "weak", "rich": "poor",
}  # fmt: skip
VERBS = {
    "walk": "walked", "look": "looked", "open": "opened", "find": "found", "take": "took", "see": "saw",
    "bring": "brought", "sell": "sold", "buy": "bought", "make": "made", "clean": "cleaned", "carry": "carried",
    "paint": "painted", "lose": "lost", "keep": "kept", "hold": "held", "build": "built", "send": "sent",
}  # fmt: skip
OFFICE = (
    "invoice password account report update order parcel payment card address screen box label price bill "
    "customer answer team colleague company meeting file page search result error export calendar summary "
    "language keyboard"
).split()
OFFICE_VERBS = "check send open close cancel change pay return update print save lose get add support".split()
OFFICE_STATES = (
    "wrong late missing broken locked ready empty urgent blank open paid important blocked affected".split()
)
GROUPS = {"animal": ANIMALS, "food": FOODS, "place": PLACES, "tool": TOOLS, "job": JOBS, "colour": COLOURS}
NOUNS = ANIMALS + FOODS + PLACES + TOOLS + JOBS
MONTHS = "January February March April May June July August September October November December".split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
COMMON_NAMES = (
    "Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Maria Nina Oscar Paul Rosa Sam Tom".split()
)


# Ordinary words that people write often. The tokenizer's training text repeats them, so that support messages, chats
# and JSON cost about one token a word. Lists and look-ups draw them too: tuning cannot teach a frozen base to write a
# token whose embedding was never trained.
GLOSSARY = (
    "the a an of to and in is it that was for on are as with his her they at be this have from or one had "
    "by but not what all were we when your can said there use each which she do how their if will up "
    "other about out many then them these so some would make like him into time has look two more write "
    "go see number no way could people my than first been call who its now find long down day did get "
    "come made may part over new take only little work know place year live me back give most very after "
    "thing our just name good man think say great where help through much before line right too mean old "
    "any same tell boy follow came want show also around three small set put end does another well large "
    "must big even such because turn here why ask went men read need land home us move try kind hand "
    "picture again change off play spell air away animal house point page letter mother answer found "
    "study still learn should world high every near add food between own below country last school father "
    "keep start city user assistant system product category severity customer due date name title price "
    "status total count type text value key null true false low medium high critical bug billing access "
    "delivery feature question login password account locked unlock reset link invoice charged refund "
    "payment card discount bill amount cancelled tax paid parcel courier address tracking order ordered "
    "arrived shipped box broken missing wrong crashes crash freezes error report export import save saved "
    "search results screen blank printing labels mode dark offline keyboard shortcuts calendar view "
    "languages spreadsheets summaries weekly edit bulk support urgent emergency priority rush wait "
    "happens annoying workaround blocks team losing customers sites stopped everything nobody somebody "
    "please thanks regards hello dear best yours morning deadline latest until solve solved settled done "
    "colleague sign signing log factor since today tomorrow week month hour minute open opened press "
    "update reading sent send shows show desk cloud mini pro sync hub pay mail track board store item "
    "place another half days moved nervous boss issue problem request service website app phone email "
    "message file data computer customer's can't don't it's I'm we're how many does left sold bought "
    "costs boxes each pays cents dollars hours minutes total altogether remaining therefore answer is"
).split()

# The same for words that stand without a space before them: roles, JSON keys and their values.
BARE_WORDS = (
    "user assistant system product category severity customer due date name title price status total "
    "count type text value key null true false low medium high critical bug billing access delivery "
    "feature question answer id age"
).split()
# And with a capital, as at the start of a sentence or in a product's name.
CAPITAL_WORDS = (
    "The A I We It You He She They This That There What When Where Who Why How Which Is Are Do Does Can "
    "Could Would Please Hi Hello Dear Good Thanks Best Regards Yours Yes No Not My Our In On At If Since "
    "From Give Find Write Name Deadline Latest Everything Nobody Whenever Some Desk Cloud Mini Pro Air "
    "Sync Hub Pay Mail Track Board Store All One"
).split()
TICKET_KEYS = ("product", "category", "severity", "customer", "due")
WORDS = [
    word
    for word in dict.fromkeys(NOUNS + ADJECTIVES + OFFICE + [word.lower() for word in GLOSSARY] + BARE_WORDS)
    if word.isalpha() and word not in TICKET_KEYS
]
LABELS = [word for word in BARE_WORDS if word not in TICKET_KEYS]
CAPITALS = [word.capitalize() for word in NOUNS + ADJECTIVES] + 4 * CAPITAL_WORDS


def invent_name(rng: random.Random) -> str:
    """A capitalised name: an invented word, a free run of letters, or now and then a common first name."""
    kind = rng.random()
    if kind < 0.65:
        return invent_word(rng, "train")
    if kind < 0.75:
        return rng.choice(COMMON_NAMES)
    while True:
        word = ""
        for _ in range(rng.randint(2, 4)):
            word += rng.choice("bcdfghjklmnprstvwz") + rng.choice(["", "", rng.choice("lrnsth")])
            word += rng.choice("aeiouy")
        word = word[: rng.randint(3, 9)]
        if split_of(word) == "train":
            return word.capitalize()


def full_name(rng: random.Random) -> str:
    """A first and a last name."""
    return f"{invent_name(rng)} {invent_name(rng)}"


def title(rng: random.Random) -> str:
    """A title of one or two capitalised words, at least one of them invented."""
    name = invent_name(rng)
    other = rng.choice(CAPITALS)
    return rng.choice([name, f"{name} {other}", f"{other} {name}", f"{name} {other}"])


def iso_date(rng: random.Random) -> str:
    """A date such as 2019-07-23."""
    year = rng.randint(2020, 2029) if rng.random() < 0.7 else rng.randint(1900, 2099)
    return f"{year}-{rng.randint(1, 12):02d}-{rng.randint(1, 31):02d}"


def long_date(rng: random.Random) -> str:
    """A date such as 23 July 2019."""
    return f"{rng.randint(1, 31)} {rng.choice(MONTHS)} {rng.randint(1990, 2035)}"


def code(rng: random.Random) -> str:
    """An identifier such as KX-4821."""
    letters = "".join(rng.choices(string.ascii_uppercase, k=rng.randint(1, 3)))
    return f"{letters}{rng.choice(['-', '', '_'])}{rng.randint(10, 9999)}"


def clock_time(rng: random.Random) -> str:
    """A time of day such as 14:35."""
    return f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"


def number(rng: random.Random) -> str:
    """A number of one to five digits."""
    return str(rng.randint(0, 10 ** rng.randint(1, 5)))


def lower_word(rng: random.Random) -> str:
    """An ordinary word, or an invented one in lower case."""
    kind = rng.random()
    return invent_name(rng).lower() if kind < 0.2 else rng.choice(LABELS if kind < 0.4 else WORDS)


# Draws of one kind of value, by the name under which questions ask for it.
VALUES: dict[str, Callable[[random.Random], str]] = {
    "name": invent_name, "person": full_name, "title": title, "date": iso_date, "day": long_date,
    "code": code, "time": clock_time, "number": number, "word": lower_word,
}  # fmt: skip
# Dates weigh more than their share: their repeated digits make them the last thing that copying gets right.
VALUE_KINDS = (
    "name name person person title title date date date date day code time number word word word".split()
)


def draw_value(rng: random.Random, kind: str | None = None) -> str:
    """A value of the given kind, or of a random one."""
    return VALUES[kind or rng.choice(VALUE_KINDS)](rng)
