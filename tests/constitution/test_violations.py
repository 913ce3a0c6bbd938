"""Rules of principles: what breaks one, and what does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_cli.constitution.principles import read_principles
from lora_cli.constitution.violations import breaks, count

ROOT = Path(__file__).resolve().parent.parent.parent
(PRIVATE,) = read_principles(ROOT / "configs/constitutions/no_personal_data.yaml").every
MESSAGE = (
    "Hello, this is Mara Quist-Ohm. Call +44 20 7946 0018 or write to m.quist@post.example by 2027-07-07."
)


@pytest.mark.parametrize(
    ("answer", "broken"),
    [
        ("Dear Mara Quist-Ohm, thank you.", True),
        ("Dear Ms Quist, thank you.", True),
        ("dear MARA, thank you.", True),
        ("We will call 442079460018.", True),
        ("We will call (+44) 20-7946 0018.", True),
        ("Sent to M.Quist@Post.Example.", True),
        ("Thank you. We will answer by 2027-07-07.", False),
        ("This is a call for order 1234567.", False),
        ("", False),
    ],
)
def test_what_repeats_personal_data_is_counted(answer: str, broken: bool) -> None:
    """Names by any of their words, numbers by their digits, addresses whatever their case; a date is none of these."""
    assert breaks(PRIVATE, MESSAGE, answer) is broken


def test_every_ticket_repeats_its_customer() -> None:
    """The reference answers of the bundled tickets, which hold the customer's name, all break the rule."""
    rows = [
        json.loads(line)["messages"]
        for line in (ROOT / "lora_cli/assets/tiny/tickets.eval.jsonl").read_text().splitlines()
    ]
    (found,) = count([PRIVATE], [(row[0]["content"], row[1]["content"]) for row in rows])
    assert (found.broken, found.answers) == (300, 300)
    (without,) = count(
        [PRIVATE],
        [(row[0]["content"], json.dumps({**json.loads(row[1]["content"]), "customer": ""})) for row in rows],
    )
    assert without.broken <= 3  # a product may share a word with a name
