"""The `constitution` block: rows that a model makes of prompts under written principles (arXiv 2212.08073)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from lora_cli.recipe.section import Conflict, PositiveInt, Section

URL = re.compile(r"(https?)://([^/\s?#@]+)(/[^\s?#]*)?")
"""Scheme, host with its port, path; no user, query or fragment."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LOOPBACK = re.compile(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?")

Price = Annotated[float, Field(ge=0.0, le=1_000_000.0)]


class Critic(Section):
    """Who writes the critiques and the revisions."""

    kind: Literal["self", "local", "endpoint"] = "self"
    """self: the model that answers the prompts; of a win rate its base. local: a model in a folder. endpoint: a server
    that speaks OpenAI's chat completions."""
    folder: str | None = None
    """Model folder of a local one."""
    url: str | None = None
    """Address of an endpoint, e.g. `https://host/v1`; `/chat/completions` is added. It is the one address that is
    connected to; redirects are not followed, proxies not used."""
    model: str | None = None
    """Model that the endpoint is asked for."""
    key_from: str | None = None
    """Environment variable that holds the endpoint's key. The key is written nowhere. null: no key is sent."""
    timeout: Annotated[float, Field(gt=0.0, le=3600.0)] = 60.0
    """Seconds that one request to the endpoint may take."""
    retries: Annotated[int, Field(ge=0, le=100)] = 6
    """Further attempts after a time-out, a cut connection, an answer that is no JSON, 408, 409, 425, 429 or 5xx; the
    waits double from half a second, or are what the endpoint asks for."""
    parallel: Annotated[int, Field(ge=1, le=256)] = 4
    """Requests to the endpoint at the same time."""
    requests_per_minute: PositiveInt | None = None
    """Most requests to the endpoint. null: no bound."""
    tokens_per_minute: PositiveInt | None = None
    """Most tokens of the endpoint, those of prompts and answers. null: no bound."""
    price_in: Price = 0.0
    """What the endpoint takes for a million tokens of prompts, for the cost that is counted."""
    price_out: Price = 0.0
    """What it takes for a million tokens of answers."""
    votes: Annotated[int, Field(ge=1, le=100)] = 8
    """Answers that are drawn of a judge whose endpoint gives no log-probabilities, for each order of a pair."""

    def rules(self, place: str) -> Iterator[Conflict]:
        """Yield every broken rule of the block at `place`."""
        reads = (f"{place}.kind",)
        for key, field in type(self).model_fields.items():
            owner = {"kind": self.kind, "folder": "local"}.get(key, "endpoint")
            if owner != self.kind and getattr(self, key) != field.default:
                message = f"found beside kind {self.kind} (remove it, or set kind: {owner})"
                yield Conflict(f"{place}.{key}", message, reads)
        needed = {"local": ("folder",), "endpoint": ("url", "model")}.get(self.kind, ())
        for key in needed:
            if not getattr(self, key):
                yield Conflict(f"{place}.{key}", f"is missing (kind {self.kind} needs it)", reads)
        if self.kind == "endpoint":
            yield from self._endpoint_rules(place)

    def _endpoint_rules(self, place: str) -> Iterator[Conflict]:
        match = URL.fullmatch(self.url) if self.url else None
        if self.url and match is None:
            yield Conflict(f"{place}.url", "is no address (write https://host/v1, without a query or user)")
        if self.key_from is not None and not _VARIABLE.fullmatch(self.key_from):
            yield Conflict(
                f"{place}.key_from", "is no name of a variable (the key itself has no place in a recipe)"
            )
        elif self.key_from and match and match[1] == "http" and not _LOOPBACK.fullmatch(match[2]):
            message = f"would send the key of {place}.key_from unencrypted (write https)"
            yield Conflict(f"{place}.url", message, (f"{place}.key_from",))


class Judge(Critic):
    """Who says which of two answers is better; the choices are those of the critic."""


class Constitution(Section):
    """What `lora constitution make` makes: critiques and revisions of answers, and judged pairs of them."""

    file: str
    """The principles, a YAML file; see configs/constitutions."""
    prompts: str | list[str] | None = None
    """Prompts, same choices as data.train: rows with `prompt` alone, with `messages` that end with the user's turn, or
    of any format, whose last answer is left out. null: the training rows."""
    max_prompts: PositiveInt | None = None
    """Use only the first so many prompts. null: all."""
    rounds: Annotated[int, Field(ge=0, le=16)] = 1
    """Critiques and revisions of each answer, one after the other, each by a principle that is drawn. What the last one
    leaves goes to sft.jsonl. 0: none."""
    samples: Annotated[int, Field(ge=0, le=16)] = 2
    """Answers that are drawn for each prompt; every two of them are judged by a principle that is drawn, and go to
    pairs.jsonl. 0: none."""
    temperature: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0
    """At which the samples are drawn. All else that a local model writes is greedy."""
    min_margin: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0
    """Leave out pairs whose log-odds of being better, the mean of both orders, are not above this."""
    answer_tokens: Annotated[int, Field(ge=1, le=131_072)] = 256
    """Longest answer, critique or revision."""
    batch_rows: Annotated[int, Field(ge=1, le=65_536)] = 8
    """Prompts that are worked on together. An interrupted run needs the same to go on."""
    critic: Critic = Critic()
    judge: Judge = Judge()

    def conflicts(self) -> Iterator[Conflict]:
        """Yield every broken rule that joins keys of this block."""
        if self.samples == 1:
            yield Conflict("constitution.samples", "found 1, but a pair needs two (use 2, or 0 for no pairs)")
        if self.rounds == self.samples == 0:
            message = "found 0 beside constitution.samples 0: nothing would be made (set one of them)"
            yield Conflict("constitution.rounds", message, reads=("constitution.samples",))
        if self.rounds:
            yield from self.critic.rules("constitution.critic")
        if self.samples:
            yield from self.judge.rules("constitution.judge")
