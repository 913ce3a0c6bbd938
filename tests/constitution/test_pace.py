"""The pace of requests, by a clock of the test's own."""

from __future__ import annotations

import random

import pytest

from lora_cli.constitution.pace import Pace


@pytest.mark.parametrize(("requests", "tokens"), [(30, None), (None, 600), (30, 600), (None, None)])
def test_no_minute_holds_more_than_is_allowed(requests: int | None, tokens: int | None) -> None:
    """Wherever a minute begins, requests and tokens that start in it stay within the bounds, up to one request."""
    draw, clock = random.Random(0), [0.0]
    pace = Pace(requests, tokens, now=lambda: clock[0])
    started = []
    for _ in range(200):
        used = draw.randrange(1, 60)
        started.append((clock[0] + pace.reserve(used), used))
        clock[0] += draw.random()
    for begin, _ in started:
        within = [used for moment, used in started if begin <= moment < begin + 60]
        assert requests is None or len(within) <= requests + 1
        assert tokens is None or sum(within) <= tokens + 60
    if requests is None and tokens is None:
        assert started[-1][0] <= clock[0]


def test_what_was_not_used_is_given_back() -> None:
    """A request that reserved too much lets the next one start earlier."""
    pace = Pace(None, 60, now=lambda: 0.0)
    assert pace.reserve(30) == 0
    pace.settle(30, 10)
    assert pace.reserve(1) == pytest.approx(10)
