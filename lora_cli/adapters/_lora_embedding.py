"""LoRA beside an embedding: a low-rank update of its table, of which a row is looked up as in the table itself.

    e(t) = W[t] + scale (A[:, t]^T B^T)        A (r, vocabulary), B (dim, r)

A starts at zero and B normal, as in PEFT, so that the model is unchanged at injection; every token's column of A gets
its own direction from the first step on. There is no dropout, as there is none in PEFT: the input is a token.

Where the module itself scales its output (Gemma), the update is scaled with it. An output head that shares the table
keeps the base's: only the lookup is adapted, and merging parts the two. A table's row for padding is trained like any
other, for many models pad with the token that ends an answer; torch's own embedding would leave it out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_cli.adapters._base import AdapterLinear
from lora_cli.adapters._targets import embedding_scale


class LoraEmbedding(AdapterLinear):
    """An embedding with a rank-r update: token ids (...) -> (..., out)."""

    def __init__(self, base: nn.Embedding, *, rank: int, alpha: float, rslora: bool = False) -> None:
        super().__init__(base)
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.output_scale = embedding_scale(base) or 1.0
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, self.in_features, device=self.device))
        self.lora_embedding_B = nn.Parameter(torch.zeros(self.out_features, rank, device=self.device))

    def __getattr__(self, name: str) -> Any:
        """Look up in the base what is not here: model code may ask an embedding for its weight or its size."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Draw B from N(0, 1) and set A to zero; equal on every device for equal `seed`."""
        generator = torch.Generator().manual_seed(seed)
        self.lora_embedding_A.zero_()
        self.lora_embedding_B.copy_(torch.randn(self.lora_embedding_B.shape, generator=generator))

    def train_bias(self) -> bool:
        """Return that there is none."""
        return False

    def adapt(self, x: Tensor) -> Tensor:
        """Return the rows looked up and their scaled update: ids (...) -> (..., out)."""
        y: Tensor = self.base(x)
        h = F.embedding(x, self.lora_embedding_A.T)  # (..., r)
        update = F.linear(h * self.scale, self.lora_embedding_B) * self.output_scale
        return y + update.to(y.dtype)

    def merged_weight(self) -> Tensor:
        """Return W + scale B A, (out, in) float32, without the module's own scale."""
        return self.base_weight().float() + self.scale * (self.lora_embedding_B @ self.lora_embedding_A)

    def disk_tensors(self) -> dict[str, Tensor]:
        """Return A (r, in) and B (out, r) by PEFT's names."""
        return {"lora_embedding_A": self.lora_embedding_A, "lora_embedding_B": self.lora_embedding_B}

    def plain_factors(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) float32 whose product B A is the whole update, the scale in B."""
        return self.lora_embedding_A.detach(), self.lora_embedding_B.detach() * self.scale
