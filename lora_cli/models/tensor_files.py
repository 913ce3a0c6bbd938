"""Tensors to safetensors files: none that is not finite, and a disk's refusal as an OSError with its number."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lora_cli.errors import DivergedError

_NUMBER = re.compile(r"\(os error (\d+)\)")


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, *, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors, wherever they are, to a safetensors file.

    Raises:
        DivergedError: one holds a value that is not finite; nothing was written.
        OSError: the disk refuses it.
    """
    require_finite(tensors)
    # Cloned where it shares memory with another, which the format does not allow.
    seen: set[int] = set()
    dense = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        dense[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    with disk_errors(path):
        save_file(dense, path, metadata=metadata)


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that hold a NaN or an infinity, before they are written.

    The smallest and the largest value tell: one pass that allocates nothing, where `isfinite` writes a mask.

    Raises:
        DivergedError: with the first of them, and how many there are.
    """
    bad = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if not bad:
        return
    tensor = tensors[bad[0]]
    count = int((~torch.isfinite(tensor)).sum())
    more = f", and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
    raise DivergedError(
        f"tensor {bad[0]}: {count:,} of {tensor.numel():,} values are not finite{more}; nothing was written"
        " (lower train.learning_rate, or look at the weights of the base)"
    )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what safetensors says of a disk's refusal into the OSError that it was.

    Raises:
        OSError: with the number and `path`.
    """
    try:
        yield
    except SafetensorError as error:
        number = _NUMBER.search(str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    """Return how many bytes tensors take in a file."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor.detach())  # both are NaN where any value is
    return bool(torch.isfinite(low) & torch.isfinite(high))
