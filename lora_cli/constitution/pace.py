"""How long a request has to wait, so that an endpoint is asked no more often than the recipe allows.

Requests are spread evenly: each moves the earliest moment of the next one by its own share of a minute, so that no
minute holds more than is allowed, whenever it begins.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Pace:
    """The moments at which requests may start; None for a bound that there is not. `now` tells seconds."""

    def __init__(
        self,
        requests_per_minute: int | None,
        tokens_per_minute: int | None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._per_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self._per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._now = now
        self._next = now()
        self._lock = threading.Lock()

    def reserve(self, tokens: int) -> float:
        """Return the seconds to wait before a request of about so many tokens, prompt and answer."""
        with self._lock:
            now = self._now()
            start = max(now, self._next)
            self._next = start + max(self._per_request, tokens * self._per_token)
            return start - now

    def settle(self, reserved: int, used: int) -> None:
        """Correct what was reserved by what a request did use."""
        if self._per_token:
            with self._lock:
                self._next += (used - reserved) * self._per_token
