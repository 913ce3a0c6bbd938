"""Our speed and memory against sequence length, batch, rank and width: LoRA on dense rows, one process each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from side_by_side.shapes import SMOLLM

STEP_TOKENS = 8192


@dataclass(frozen=True)
class Point:
    """One setting; the rest is the dense case's."""

    along: str
    value: int
    rows: int = 4
    length: int = 512
    rank: int = 16
    width: int | None = None

    @property
    def name(self) -> str:
        """A name for files."""
        return f"{self.along.replace(' ', '-')}-{self.value}"


def points() -> list[Point]:
    """Return all settings, along one axis after the other."""
    found = [
        Point("sequence length", length, rows=STEP_TOKENS // length, length=length)
        for length in (256, 512, 1024, 2048, 4096, 8192)
    ]
    found += [Point("rows of a step", rows, rows=rows) for rows in (1, 2, 4, 8, 16)]
    found += [Point("rank", rank, rank=rank) for rank in (4, 16, 64, 256)]
    return found + [Point("width", width, width=width) for width in (256, 512, 1024, 2048)]


def shape_of(width: int) -> dict[str, Any]:
    """Return a llama of 8 layers with this hidden size, heads of 64, and 3 queries to a key where they divide."""
    heads = width // 64
    return SMOLLM | {
        "hidden_size": width,
        "intermediate_size": 64 * round(width * 8 / 3 / 64),
        "num_hidden_layers": 8,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
    }
