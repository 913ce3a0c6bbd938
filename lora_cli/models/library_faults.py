"""What transformers, tokenizers and safetensors raise for files they cannot use, as one line that names the folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from lora_cli.errors import InputError, LoraError

_FAULTS = (
    OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, ImportError,
    StrictDataclassError, SafetensorError,
)  # fmt: skip


@contextmanager
def reading(folder: Path, fault: str) -> Iterator[None]:
    """Within it a library reads the files of `folder`; `fault` says what it means that it cannot.

    Raises:
        InputError: the library cannot use them.
    """
    try:
        yield
    except (LoraError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "can't allocate memory" in str(error):
            raise
        # tokenizers raises nothing but `Exception` itself.
        if not isinstance(error, _FAULTS) and type(error) is not Exception:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = reason if len(reason) <= 300 else f"{reason[:300]}..."
        raise InputError(f"{folder}: {fault} ({reason})") from error
