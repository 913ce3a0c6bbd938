"""Imports without garbage collection: of the objects that they make none is garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Within it nothing is collected, and what there is at its end never is.

    Importing torch and transformers makes about a million objects, which the collector would go through again and
    again: a seventh of their import's time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
