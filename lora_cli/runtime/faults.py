"""Faults of the machine, turned into one line that says what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lora_cli import disk
from lora_cli.errors import LoraError, ResourceError


@contextmanager
def resource_faults() -> Iterator[None]:
    """Turn what the machine has too little of, memory or disk, into a ResourceError."""
    try:
        yield
    except LoraError:  # some of them are OSErrors as well
        raise
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"out of GPU memory: {_first_line(error)} (lower train.micro_batch_tokens)"
        ) from error
    except MemoryError as error:
        raise ResourceError("out of memory (lower train.micro_batch_tokens)") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise ResourceError(
            f"out of memory: {_first_line(error)} (lower train.micro_batch_tokens)"
        ) from error
    except OSError as error:
        if error.errno not in disk.NUMBERS:
            raise
        raise disk.fault(error) from error


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]
