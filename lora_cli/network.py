"""Whether this process may open a connection: only to fetch a hub id that the user gave, or to an endpoint they named.

transformers, huggingface_hub and datasets ask the hub for files that a folder lacks, for code that a config names, for
kernels that a layer would like, and to count their users. `closed` makes all of that fail at once instead; `reachable`
lifts it for the one call that fetches a base or a data set by its id. An HF_HUB_OFFLINE of the user's stays in force.
The endpoint of a critic or judge is asked by a client of its own (`constitution/endpoint.py`), which knows no other
address.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_OFFLINE = "HF_HUB_OFFLINE"
_ASKED = "LORA_CLI_HUB_OFFLINE"
"""What the user wants, for processes that are started while HF_HUB_OFFLINE is ours."""


def silence() -> None:
    """Turn off telemetry and kernels from the hub, before the libraries read these variables at their import."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"
    os.environ["USE_HUB_KERNELS"] = "NO"


@contextmanager
def closed() -> Iterator[None]:
    """Within it neither this process nor one that it starts reaches the hub, but for `reachable`."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, {name: os.environ.get(name) for name in (_OFFLINE, _ASKED)}
    os.environ.setdefault(_ASKED, str(int(constants.HF_HUB_OFFLINE)))
    os.environ[_OFFLINE] = "1"
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, variables = before
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def reachable() -> Iterator[None]:
    """Within it the hub may be asked, unless the user forbade it."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = os.environ.get(_ASKED, str(int(before))) != "0"
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
