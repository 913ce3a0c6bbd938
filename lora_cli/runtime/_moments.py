"""AdamW's two moments of one weight: in float32, or in 8 bits a value (arXiv 2110.02861).

    blocks of 256 values share a float32 scale, their largest magnitude                section 2.1; 2048 there
    x / scale -> the nearest of 256 "dynamic" codes, seven decades wide                section 2.2
    exp_avg: the signed codes; exp_avg_sq, which has no sign: twice as fine            section 2.2

The codes and their reading are bitsandbytes'. The nearest code is found here, by a table over the leading bits of a
float: bitsandbytes' own search on a CPU is blind below 3e-5 of a block's largest value, which is most of the range of a
second moment. So CPU and GPU store the same.

One departure: a second moment above zero is never stored as zero. What is left in it after a block's scale has grown
would otherwise vanish while the first moment stays, and the update divide by nearly nothing; with the smallest code
instead it comes out too small.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_cli.models.nf4 import bitsandbytes_functions

BLOCK = 256
"""Values that share a scale."""
SMALLEST = 4096
"""Values from which on a weight's moments are kept in 8 bits: smaller ones are few, and often odd (norms, biases)."""
_SHIFT = 12
"""Trailing bits of a float32 that the table leaves out: a code's border is met to 2^-11 of itself, in 1 MB."""
_ALL = slice(None)


class Moments:
    """The moments in float32, of the weight's shape, and the number of updates as the fused kernel wants it."""

    def __init__(self, weight: Tensor) -> None:
        self.step = torch.zeros((), device=weight.device)
        self.exp_avg = torch.zeros_like(weight, dtype=torch.float32)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)

    def read(self, part: slice = _ALL) -> tuple[Tensor, Tensor]:
        """Return both moments of a part of the flat weight, float32; here they are the stored ones."""
        return self.exp_avg.view(-1)[part], self.exp_avg_sq.view(-1)[part]

    def write(self, exp_avg: Tensor, exp_avg_sq: Tensor, part: slice = _ALL) -> None:
        """Store what `read` gave for the part and was then changed."""

    def tensors(self) -> dict[str, Tensor]:
        """Return all that is stored, by name."""
        return {"step": self.step, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}


class EightBitMoments(Moments):
    """The moments as uint8 codes and a float32 scale for each block of them; a part must begin with a block."""

    def __init__(self, weight: Tensor) -> None:
        size, device = weight.numel(), weight.device
        self.step = torch.zeros((), device=device)
        self.exp_avg = torch.full((size,), _zero(signed=True), dtype=torch.uint8, device=device)
        self.exp_avg_sq = torch.full((size,), _zero(signed=False), dtype=torch.uint8, device=device)
        self.exp_avg_scale = torch.zeros(-(-size // BLOCK), device=device)
        self.exp_avg_sq_scale = torch.zeros_like(self.exp_avg_scale)

    def read(self, part: slice = _ALL) -> tuple[Tensor, Tensor]:
        """Return both moments of a part of the flat weight, float32, made anew at each call."""
        blocks = _blocks(part)
        return (
            dequantize(self.exp_avg[part], self.exp_avg_scale[blocks], signed=True),
            dequantize(self.exp_avg_sq[part], self.exp_avg_sq_scale[blocks], signed=False),
        )

    def write(self, exp_avg: Tensor, exp_avg_sq: Tensor, part: slice = _ALL) -> None:
        """Quantize both moments of the part."""
        blocks = _blocks(part)
        self.exp_avg[part], self.exp_avg_scale[blocks] = quantize(exp_avg, signed=True)
        self.exp_avg_sq[part], self.exp_avg_sq_scale[blocks] = quantize(exp_avg_sq, signed=False)

    def tensors(self) -> dict[str, Tensor]:
        """Return all that is stored, by name."""
        scales = {"exp_avg_scale": self.exp_avg_scale, "exp_avg_sq_scale": self.exp_avg_sq_scale}
        return super().tensors() | scales


def quantize(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Return the uint8 codes (n,) of float32 values (n,), and the scale of each block."""
    size = values.numel()
    blocks = F.pad(values.reshape(-1), (0, -size % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    # A block of zeros would be divided by zero.
    scaled = blocks / scales[:, None].clamp(min=torch.finfo(torch.float32).tiny)
    index = (scaled.view(torch.int32) >> _SHIFT).bitwise_and_((1 << (32 - _SHIFT)) - 1)
    return _table(signed, values.device).index_select(0, index.view(-1))[:size], scales


def dequantize(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """Return the float32 values (n,) that codes and scales stand for."""
    values: Tensor = bitsandbytes_functions().dequantize_blockwise(
        codes, absmax=scales, code=code_values(signed, codes.device), blocksize=BLOCK
    )
    return values


@functools.cache
def code_values(signed: bool, device: torch.device) -> Tensor:
    """Return the value of each of the 256 codes, ascending, float32."""
    values: Tensor = bitsandbytes_functions().create_dynamic_map(signed=signed)
    return values.to(device)


@functools.cache
def _table(signed: bool, device: torch.device) -> Tensor:
    """Return the nearest code of every float32 in [-1, 1] by its leading bits, (2^20,) uint8."""
    values = code_values(signed, torch.device("cpu"))
    middle = (torch.arange(1 << (32 - _SHIFT)) << _SHIFT) + (1 << (_SHIFT - 1))
    floats = torch.where(middle >= 1 << 31, middle - (1 << 32), middle).to(torch.int32).view(torch.float32)
    codes = torch.bucketize(floats.nan_to_num(), (values[1:] + values[:-1]) / 2).to(torch.uint8)
    if not signed:
        codes[1:].clamp_(min=1)  # only the first entry is zero
    return codes.to(device)


@functools.cache
def _zero(signed: bool) -> int:
    return int((code_values(signed, torch.device("cpu")) == 0).nonzero())


def _blocks(part: slice) -> slice:
    if part == _ALL:
        return _ALL
    assert part.start % BLOCK == 0
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))
