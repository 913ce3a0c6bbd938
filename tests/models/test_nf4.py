"""Quantized layers: their codes against the paper and bitsandbytes, their gradients against a dense layer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters._low_rank import LoraLinear
from lora_cli.models import nf4
from lora_cli.models.nf4 import Quantization, QuantizedLinear

FORMS = ["nf4", "fp4", "int8"]

NF4_CODES = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
"""The NormalFloat values of arXiv 2305.14314, appendix E."""


def linear(kind: str, *, inputs: int = 96, outputs: int = 40, seed: int = 0) -> nn.Linear | Conv1D:
    """Return a layer of normal weights; `inputs` is no whole number of blocks."""
    torch.manual_seed(seed)
    layer = Conv1D(outputs, inputs) if kind == "conv1d" else nn.Linear(inputs, outputs, bias=kind == "bias")
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    return layer


def packed(weight: torch.Tensor, form: str = "nf4", double_quant: bool = False) -> QuantizedLinear:
    """Return the quantized form of a weight (out, in)."""
    outputs, inputs = weight.shape
    layer = QuantizedLinear(inputs, outputs, Quantization(form, double_quant), dtype=weight.dtype)
    layer.store(weight)
    return layer


def test_the_sixteen_values_are_the_papers() -> None:
    """A weight made of the paper's NF4 values times a scale is kept exactly, and no other value comes out."""
    weight = torch.tensor(NF4_CODES).repeat(4, 4) * 0.5
    assert torch.equal(packed(weight).dequantized(), weight)
    other = packed(torch.randn(8, 64)).dequantized()
    steps = other / other.abs().amax(dim=1, keepdim=True)
    assert float((steps[..., None] - torch.tensor(NF4_CODES)).abs().amin(-1).max()) <= 1e-6


@pytest.mark.parametrize("shape", [(48, 32), (64, 48), (5, 7), (33, 64), (16, 160)])
@pytest.mark.parametrize("form", ["nf4", "fp4"])
def test_blocks_may_cross_rows(form: str, shape: tuple[int, int]) -> None:
    """Each value is its code times its block's scale, also where a row is not a whole number of blocks."""
    weight = torch.randn(shape)
    layer = packed(weight, form)
    codes = torch.stack([layer.packed >> 4, layer.packed & 15], dim=1).flatten()[: weight.numel()].long()
    scales = layer.scales.repeat_interleave(nf4.BLOCK)[: weight.numel()]
    by_hand = bnb.get_4bit_type(form, device="cpu")[codes] * scales
    assert torch.equal(layer.dequantized(), by_hand.view(shape))
    blocks = nn.functional.pad(weight.flatten(), (0, -weight.numel() % nf4.BLOCK)).view(-1, nf4.BLOCK)
    assert torch.equal(layer.scales, blocks.abs().amax(dim=1))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("form", ["nf4", "fp4"])
def test_values_are_bitsandbytes_own(form: str, double_quant: bool) -> None:
    """Where rows are whole blocks, what comes out is bit for bit what bitsandbytes makes of it."""
    weight = torch.randn(96, 128)
    theirs, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=form, compress_statistics=double_quant)
    layer = packed(weight, form, double_quant)
    assert torch.equal(layer.packed, theirs.flatten())
    assert torch.equal(layer.dequantized(), bnb.dequantize_4bit(theirs, state))


def test_int8_is_linear() -> None:
    """int8 is within half a step of 1/127 of its block (ties either way), nearer than bitsandbytes' default code."""
    weight = torch.randn(64, 256)
    error = packed(weight, "int8").dequantized() - weight
    step = weight.view(-1, 64).abs().amax(dim=1) / 127
    assert bool((error.view(-1, 64).abs() <= step[:, None] * 0.505).all())
    default = bnb.dequantize_blockwise(*bnb.quantize_blockwise(weight, blocksize=64)) - weight
    assert float(error.square().mean().sqrt()) < 0.7 * float(default.square().mean().sqrt())


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_quantized_in_parts_is_the_same(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large weights are quantized in parts to bound memory; the parts join to the bits of the whole."""
    weight = torch.randn(30, 50)
    whole = packed(weight, form, double_quant=True).state_dict()
    monkeypatch.setattr(nf4, "_CHUNK", 128)
    parts = packed(weight, form, double_quant=True).state_dict()
    assert all(torch.equal(parts[key], value) for key, value in whole.items())


def test_bytes() -> None:
    """Codes, scales and their scales take at most 0.27 of the bytes of the weight in bfloat16."""
    layer = packed(torch.randn(192, 576), double_quant=True)
    assert layer.weight_bytes() <= 0.27 * 2 * 192 * 576
    assert sum(value.nbytes for value in layer.state_dict().values()) == layer.weight_bytes()
    assert list(layer.parameters()) == []


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_state_goes_through_safetensors(tmp_path: Path, form: str, double_quant: bool) -> None:
    """What the layer holds is plain tensors: saved and read back they give the same weight bit for bit."""
    layer = QuantizedLinear.of(linear("bias"), Quantization(form, double_quant))
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = QuantizedLinear.shaped_like(linear("bias"), layer.quantization, dtype=torch.float32)
    other.bias = torch.empty(40)
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(other.dequantized(), layer.dequantized())
    x = torch.randn(3, 96)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("kind", ["plain", "bias", "conv1d"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_after_evaluating_are_the_dense_layers(form: str, kind: str) -> None:
    """Trained, evaluated and trained again, input and adapter gradients are those of a dense layer, to 1e-6 in fp32."""
    base = QuantizedLinear.of(linear(kind), Quantization(form))
    layers = [LoraLinear(part, rank=4, alpha=8.0) for part in (base, base.dense())]
    for layer in layers:
        layer.reset(3)
        nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(5))
    data = torch.randn(2, 7, 96, generator=torch.Generator().manual_seed(1))
    for mode in ("train", "eval", "train"):
        gradients = []
        for layer in layers:
            layer.train(mode == "train")
            layer.zero_grad()
            x = data.clone().requires_grad_()
            with torch.set_grad_enabled(mode == "train"):
                y = layer(x)
            if mode == "train":
                y.square().sum().backward()
                gradients.append([y.detach(), x.grad, layer.lora_A.grad, layer.lora_B.grad])
            else:
                gradients.append([y])
        for ours, dense in zip(*gradients, strict=True):
            assert ours is not None
            assert dense is not None
            assert float((ours - dense).norm()) <= 1e-6 * float(dense.norm())


def test_no_dense_weight_outlives_the_forward_pass() -> None:
    """What autograd keeps for the backward pass of an adapted layer holds no tensor of the weight's size."""
    layer = LoraLinear(QuantizedLinear.of(linear("bias"), Quantization("nf4")), rank=4, alpha=8.0)
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(3, 96, requires_grad=True))
    assert kept
    assert max(kept) < 96 * 40


def test_it_computes_in_its_own_dtype() -> None:
    """A bfloat16 layer answers bfloat16 from bfloat16, and refuses float32 as a dense one does."""
    layer = QuantizedLinear.of(linear("bias").to(torch.bfloat16), Quantization("nf4"))
    x = torch.randn(3, 96)
    assert layer.dequantized().dtype == layer(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(layer(x.bfloat16()), layer.dense()(x.bfloat16()))
    with pytest.raises(RuntimeError):
        layer(x)


def test_bitsandbytes_is_imported_late_and_in_silence() -> None:
    """Only a weight to quantize imports it; it says nothing, fetches nothing, and its other warnings stay audible."""
    script = """
import logging, sys, torch
from lora_cli.models.nf4 import Quantization, QuantizedLinear
assert "bitsandbytes" not in sys.modules
sys.modules["kernels"] = "another package's"
QuantizedLinear.of(torch.nn.Linear(64, 64), Quantization("nf4"))
assert sys.modules["kernels"] == "another package's"
print("done")
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward")
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.stdout == "done\n"
    assert result.stderr.strip() == "Failed to load CPU gemm_4bit_forward"
