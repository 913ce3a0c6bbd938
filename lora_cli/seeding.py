"""Randomness as a function: every random stream is named by the run's seed and where it is used.

`stream_seed(seed, "order", epoch)` is the same on every machine and in every process, so a resumed run needs one
integer (its step) to continue exactly, and the row order does not depend on the number of processes.
"""

from __future__ import annotations

import hashlib


def stream_seed(seed: int, *keys: str | int) -> int:
    """Return a 63-bit seed for the stream that `keys` name; different keys give unrelated streams."""
    text = "\x1f".join(str(key) for key in (seed, *keys))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
