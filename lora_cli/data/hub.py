"""Data sets of the hub, through the `datasets` library, imported only when one is used.

An id is `owner/name`, or `owner/name:configuration` where the data set has several (`openai/gsm8k:main`).
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from lora_cli.errors import InputError
from lora_cli.network import reachable

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")

_READERS = ("json", "csv", "parquet", "text", "arrow", "cache")
"""The library's readers that are used, the last for what one of them has read before. Its `pandas` unpickled what it
found, before 5.2 (CVE-2026-57845)."""


@lru_cache(maxsize=4)
def load_hub(name: str, split: str, revision: str | None = None) -> Any:
    """Load one split of a hub data set as a `datasets.Dataset`.

    Raises:
        InputError: if it cannot be found or read.
    """
    assert HUB_ID.fullmatch(name), name
    import datasets
    from huggingface_hub import is_offline_mode

    repository, _, configuration = name.partition(":")
    try:
        with reachable():
            datasets.config.HF_HUB_OFFLINE = is_offline_mode()  # read once, when it is imported
            kind = _reader_of(repository, configuration or None, revision)
            if kind in _READERS:
                return datasets.load_dataset(
                    repository, configuration or None, split=split, revision=revision
                )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"{name}: the hub data set cannot be loaded (split {split}): {reason}") from error
    raise InputError(
        f"{name}: the datasets library reads its files as {kind!r} (only {', '.join(_READERS[:-1])} are known to run"
        " nothing: use another data set, or save its rows as a file)"
    )


def _reader_of(repository: str, configuration: str | None, revision: str | None) -> str:
    """Return the name of the library's reader for a data set's files; none of them is read for it."""
    import datasets

    builder = datasets.load_dataset_builder(repository, configuration, revision=revision)
    return type(builder).__module__.rpartition(".")[2]
