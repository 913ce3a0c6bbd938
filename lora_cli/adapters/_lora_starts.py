"""Starts that a layer and its seed do not decide: by the run's rows (EVA), or by the weight on disk (LoftQ)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli.adapters import _lora_eva, _lora_init
from lora_cli.adapters._base import StartSource
from lora_cli.errors import InputError

LOFTQ_NOTE = (
    "The adapter holds a correction of the base's quantization (LoftQ): use it on the base quantized as the recipe"
    " says, not in full precision"
)


@dataclass(frozen=True)
class Starts:
    """What was prepared for layers that are yet to be made."""

    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """A and B by path; none where the checkpoint has all of it."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Rank of every target, 0 included, where EVA has shared them out."""
    lines: list[str] = field(default_factory=list)
    """What is told of it."""


def prepare(
    init: str,
    model: PreTrainedModel,
    ranks: dict[str, int],
    scales: Mapping[str, float],
    source: StartSource,
    *,
    rho: float,
    tokens: int,
) -> Starts:
    """Return the starts of layers that will have these `ranks` and `scales`, by path; EVA changes the ranks.

    Raises:
        InputError: a rank is more than a layer can have, or there is nothing to start from.
    """
    for path in ranks:
        if isinstance(model.get_submodule(path), nn.Embedding):
            raise InputError(f"adapter.init: {init} is not there for an embedding {remedy(path)}")
    resumed = source.resumed()
    if init == "loftq":
        if resumed is not None:
            return Starts()
        starts, line = _lora_init.loftq_starts(model, ranks, scales, source.full_weight)
        source.agree([factor for start in starts.values() for factor in start])
        return Starts(starts, lines=[line])
    if resumed is not None and len(resumed.get("eva_ranks", ())) == len(ranks):
        return Starts(ranks=dict(zip(ranks, resumed["eva_ranks"].tolist(), strict=True)))
    shared, vectors, line = _lora_eva.start(model, ranks, rho=rho, limit=tokens, source=source)
    zero = {path: (a, torch.zeros((), device=a.device)) for path, a in vectors.items()}
    return Starts(zero, shared, [line])


def remedy(path: str) -> str:
    """Return what to do about an embedding that a key is not there for."""
    return f"(take {path} out of adapter.targets, or remove the key)"
