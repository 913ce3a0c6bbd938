"""AdamW's moments in 8 bits: the codes, their scales, and what may never be stored."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional
from torch import Tensor

from lora_cli.runtime._moments import BLOCK, EightBitMoments, Moments, code_values, dequantize, quantize

CPU = torch.device("cpu")


def moment(signed: bool, size: int) -> Tensor:
    """Return values of very unlike size, as the moments of a weight are."""
    generator = torch.Generator().manual_seed(size)
    values = torch.randn(size, generator=generator) * 10.0 ** torch.randint(
        -7, 1, (size,), generator=generator
    )
    return values if signed else values.square()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("size", [1, 255, 256, 5000])
def test_every_value_gets_the_nearest_code(signed: bool, size: int) -> None:
    """By bitsandbytes' table no code is nearer to value / largest than the stored one, to 2^-11 of the value."""
    table = functional.create_dynamic_map(signed=signed)
    values = moment(signed, size)
    codes, scales = quantize(values, signed=signed)
    padded = torch.cat([values, values.new_zeros(-size % BLOCK)]).view(-1, BLOCK)
    assert torch.equal(scales, padded.abs().amax(dim=1))
    scaled = (padded / scales[:, None]).flatten()[:size]
    chosen = (scaled - table[codes.long()]).abs()
    candidates = table if signed else table[1:]  # zero is kept for what is zero
    nearest = (scaled[:, None] - candidates).abs().amin(dim=1)
    assert bool((chosen <= nearest + 2.0**-11 * scaled.abs()).all())
    assert torch.equal(
        dequantize(codes, scales, signed=signed), table[codes.long()] * scales.repeat_interleave(BLOCK)[:size]
    )


@pytest.mark.parametrize("signed", [True, False])
def test_bitsandbytes_reads_the_same(signed: bool) -> None:
    """Where its own search sees (from 1e-3 of the largest value on), bitsandbytes picks the same codes but for ties."""
    values, table = moment(signed, 4096), functional.create_dynamic_map(signed=signed)
    codes, scales = quantize(values, signed=signed)
    theirs, state = functional.quantize_blockwise(values, code=table, blocksize=BLOCK)
    assert torch.equal(state.absmax, scales)
    scaled = (values.view(-1, BLOCK) / scales[:, None]).flatten().abs()
    seen = scaled >= 1e-3
    assert int(seen.sum()) > 500
    away = (codes.int() - theirs.int()).abs()[seen]
    assert int(away.max()) <= 1
    assert float((away > 0).float().mean()) < 0.05


def test_a_second_moment_never_vanishes() -> None:
    """Next to a value 10^12 times as large a positive second moment is stored as a positive number; zero stays zero."""
    values = torch.full((BLOCK,), 1e-12)
    values[0], values[1] = 1.0, 0.0
    stored = dequantize(*quantize(values, signed=False), signed=False)
    assert bool((stored[2:] > 0).all())
    assert float(stored[1]) == 0.0
    assert float(stored[0]) == 1.0
    for signed in (True, False):
        codes, scales = quantize(torch.zeros(1000), signed=signed)
        assert not dequantize(codes, scales, signed=signed).any()


def test_fresh_moments_are_zero_and_small() -> None:
    """A new 8-bit state reads as zeros and takes at most 0.27 of the bytes of the float32 one."""
    weight = torch.empty(512, 300)
    small, large = EightBitMoments(weight), Moments(weight)
    assert all(not value.any() for value in small.read())
    sizes = [sum(value.nbytes for value in each.tensors().values()) for each in (small, large)]
    assert sizes[0] <= 0.27 * sizes[1]


def test_parts_are_the_whole() -> None:
    """Written and read in parts, each a whole number of blocks but the last, the state is the same."""
    first, second = moment(True, 5000), moment(False, 5000)
    whole, parts = EightBitMoments(first), EightBitMoments(first)
    whole.write(first, second)
    for begin in range(0, 5000, 2 * BLOCK):
        part = slice(begin, min(begin + 2 * BLOCK, 5000))
        parts.write(first[part], second[part], part)
        assert all(map(torch.equal, parts.read(part), (value[part] for value in whole.read())))
    assert all(map(torch.equal, parts.tensors().values(), whole.tensors().values()))
    assert code_values(True, CPU).numel() == 256
