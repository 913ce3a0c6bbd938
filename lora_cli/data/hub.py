"""Data sets of the hub, through the `datasets` library, imported only when one is used.

An id is `owner/name`, or `owner/name:configuration` where the data set has several (`openai/gsm8k:main`).
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from lora_cli.errors import InputError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")


@lru_cache(maxsize=4)
def load_hub(name: str, split: str, revision: str | None = None) -> Any:
    """Load one split of a hub data set as a `datasets.Dataset`.

    Raises:
        InputError: if it cannot be found or read.
    """
    assert HUB_ID.fullmatch(name), name
    import datasets

    repository, _, configuration = name.partition(":")
    try:
        return datasets.load_dataset(repository, configuration or None, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"{name}: the hub data set cannot be loaded (split {split}): {reason}") from error
