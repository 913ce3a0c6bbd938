"""A frozen linear layer whose weight is kept in 4 or 8 bits (QLoRA, arXiv 2305.14314, section 3).

    NF4        16 quantiles of N(0, 1), scaled by the largest value of each block of 64     eq. 4, appendix E
    doubled    the scales themselves in 8 bits, in blocks of 256, around their mean         "double quantization"
    forward    y = x W^T + b with W dequantized to the compute dtype                        eq. 5, 6

The arithmetic of the codes is bitsandbytes' own, through its functions. Its layer `Linear4bit` is not used: on CPUs
with AVX512-BF16 one forward pass in evaluation mode repacks its weights, and training after it loses the gradient of
the base path. Its dequantization on a CPU goes by rows and is wrong where a row is not a whole number of blocks, so
a weight is kept and dequantized here as one row.

`fp4` has a sign, two exponent bits and one of mantissa. `int8` is linear: steps of 1/127 of the block's largest value,
with 0.6 times the error of bitsandbytes' default 8-bit code on normal weights.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

BLOCK = 64
"""Values that share a scale."""
SCALE_BLOCK = 256
"""Scales that share a scale of their own under double quantization."""
_CHUNK = 1 << 18
"""Values quantized at once, a whole number of blocks: bounds the float32 and index temporaries to some 5 MB."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the linear layers of a base are stored."""

    form: str
    """nf4, fp4 or int8."""
    double_quant: bool = True


class QuantizedLinear(nn.Module):
    """A frozen linear layer of packed buffers: (..., in) -> (..., out), computed in `dtype`.

    `conv1d` says that it stands for a transformers Conv1D, whose weight is stored (in, out) on disk.
    """

    packed: Tensor
    """Codes of the (out, in) weight in row order, uint8: two to a byte in 4 bits, the first in the high half."""
    scales: Tensor
    """Largest value of each block: float32, or uint8 codes under double quantization."""
    scales_scale: Tensor | None
    """Under double quantization: largest value of each block of scales less their mean, float32."""
    scales_mean: Tensor | None
    """Under double quantization: the mean of the scales, 0-d float32."""
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        quantization: Quantization,
        *,
        dtype: torch.dtype,
        conv1d: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.quantization, self.dtype, self.conv1d = quantization, dtype, conv1d
        size, doubled = in_features * out_features, quantization.double_quant
        blocks, per_byte = -(-size // BLOCK), 1 if quantization.form == "int8" else 2
        # Made before any weight is read: kept memory that lies between temporaries keeps theirs from being given back.
        self.register_buffer("packed", torch.empty(-(-size // per_byte), dtype=torch.uint8, device=device))
        kind = torch.uint8 if doubled else torch.float32
        self.register_buffer("scales", torch.empty(blocks, dtype=kind, device=device))
        doubles = torch.empty(-(-blocks // SCALE_BLOCK), device=device) if doubled else None
        self.register_buffer("scales_scale", doubles)
        self.register_buffer("scales_mean", torch.empty((), device=device) if doubled else None)
        self.register_buffer("bias", None)

    @classmethod
    def of(cls, linear: nn.Linear | Conv1D, quantization: Quantization) -> QuantizedLinear:
        """Return the quantized form of a layer that is in memory."""
        weight = linear.weight
        layer = cls.shaped_like(linear, quantization, dtype=weight.dtype, device=weight.device)
        layer.store(weight.T if layer.conv1d else weight)
        layer.bias = None if linear.bias is None else linear.bias.detach().clone()
        return layer

    @classmethod
    def shaped_like(
        cls,
        linear: nn.Linear | Conv1D,
        quantization: Quantization,
        *,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> QuantizedLinear:
        """Return a layer with the sizes of `linear`, which may be on the meta device, and nothing stored yet."""
        conv1d = isinstance(linear, Conv1D)
        rows, columns = linear.weight.shape
        inputs, outputs = (rows, columns) if conv1d else (columns, rows)
        return cls(inputs, outputs, quantization, dtype=dtype, conv1d=conv1d, device=device)

    @torch.no_grad()
    def store(self, weight: Tensor) -> None:
        """Quantize a weight, (out, in) of any float type, in place of the stored one."""
        assert weight.shape == (self.out_features, self.in_features)
        flat = weight.detach().reshape(-1)
        scales = torch.empty(len(self.scales), device=flat.device)
        per_byte = 1 if self.quantization.form == "int8" else 2
        for first, part in zip(range(0, len(flat), _CHUNK), flat.split(_CHUNK), strict=True):
            codes, largest = self._encode(part)
            self.packed[first // per_byte :][: len(codes)] = codes
            scales[first // BLOCK :][: len(largest)] = largest
        if self.scales_scale is None or self.scales_mean is None:
            self.scales.copy_(scales)
            return
        self.scales_mean.copy_(scales.mean())
        codes, state = bitsandbytes_functions().quantize_blockwise(
            scales - self.scales_mean, blocksize=SCALE_BLOCK
        )
        self.scales.copy_(codes)
        self.scales_scale.copy_(state.absmax)

    @torch.no_grad()
    def dequantized(self) -> Tensor:
        """Return the weight that the layer computes with, (out, in) in the compute dtype."""
        functions = bitsandbytes_functions()
        packed, scales, size = self.packed, self.scales, self.out_features * self.in_features
        if self.scales_scale is not None:
            # The default code, by its cached table; float32 as no state says otherwise.
            scales = functions.dequantize_blockwise(scales, absmax=self.scales_scale, blocksize=SCALE_BLOCK)
            scales += self.scales_mean
        if self.quantization.form == "int8":
            code = _linear_code(packed.device)
            state = functions.QuantState(scales, blocksize=BLOCK, code=code, dtype=self.dtype)
            flat = functions.dequantize_blockwise(packed, state)
        else:
            # An odd number of values has half a byte to spare; bitsandbytes would compile a kernel to leave it out.
            shape, form = (1, size + size % 2), self.quantization.form
            state = functions.QuantState(
                scales, shape=shape, blocksize=BLOCK, quant_type=form, dtype=self.dtype
            )
            flat = functions.dequantize_4bit(packed, state)
        weight: Tensor = flat.flatten()[:size].view(self.out_features, self.in_features)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Apply the dequantized weight and the bias: (..., in) -> (..., out)."""
        y: Tensor = _FrozenMatmul.apply(x, self)
        return y

    def dense(self, weight: Tensor | None = None) -> nn.Linear | Conv1D:
        """Return the frozen layer this one stands for, with `weight` (out, in), by default the dequantized one."""
        weight = self.dequantized() if weight is None else weight.to(self.dtype)
        layer: nn.Linear | Conv1D
        with torch.device("meta"):
            if self.conv1d:
                layer = Conv1D(self.out_features, self.in_features)
            else:
                layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        layer.weight = nn.Parameter(weight.T.contiguous() if self.conv1d else weight, requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias, requires_grad=False)
        return layer.train(self.training)

    def weight_bytes(self) -> int:
        """Return the bytes of the stored weight: codes and scales, without the bias."""
        state = (self.packed, self.scales, self.scales_scale, self.scales_mean)
        return sum(part.nbytes for part in state if part is not None)

    def extra_repr(self) -> str:
        """Describe the layer as `print(model)` shows it."""
        form, doubled = self.quantization.form, self.quantization.double_quant
        return f"{self.in_features}, {self.out_features}, form={form}, double_quant={doubled}, {self.dtype}"

    def _encode(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        functions = bitsandbytes_functions()
        if self.quantization.form == "int8":
            codes, state = functions.quantize_blockwise(
                flat.contiguous(), code=_linear_code(flat.device), blocksize=BLOCK
            )
        else:
            codes, state = functions.quantize_4bit(
                flat.contiguous(), blocksize=BLOCK, quant_type=self.quantization.form
            )
        return codes.reshape(-1), state.absmax


class _FrozenMatmul(torch.autograd.Function):
    """y = x W^T + b; the backward pass dequantizes again, so that no dense weight outlives a layer's forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantized(), layer.bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, None]:
        return (grad_y @ ctx.layer.dequantized()) if ctx.needs_input_grad[0] else None, None


def quantizable(model: PreTrainedModel) -> dict[str, nn.Linear | Conv1D]:
    """Return the linear layers to quantize by path: all but the output head and those that share their weight."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    named = [parameter for _, parameter in model.named_parameters(remove_duplicate=False)]
    uses = {id(parameter): 0 for parameter in named}
    for parameter in named:
        uses[id(parameter)] += 1
    return {
        path: module
        for path, module in model.named_modules()
        # A subclass may compute something else with its weight, and stays as it is.
        if type(module) in (nn.Linear, Conv1D) and module is not head and uses[id(module.weight)] == 1
    }


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Return the quantized layers of a model by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}


@functools.cache
def bitsandbytes_functions() -> Any:
    """Return `bitsandbytes.functional`, imported at first use: it takes a second, and needs watching.

    Where a package `kernels` is installed, the import would fetch compiled code from the hub and run it, for a product
    that is not used here; it is kept from that, and its warning that it found none is kept from the user.
    """
    with _without_hub_kernels():
        import bitsandbytes.functional
    return bitsandbytes.functional


@contextmanager
def _without_hub_kernels() -> Iterator[None]:
    logger, missing = logging.getLogger("bitsandbytes.backends.cpu.ops"), object()

    def other_than_the_kernel(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")

    before = sys.modules.get("kernels", missing)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    logger.addFilter(other_than_the_kernel)
    try:
        yield
    finally:
        logger.removeFilter(other_than_the_kernel)
        del sys.modules["kernels"]
        if before is not missing:
            sys.modules["kernels"] = before  # type: ignore[assignment]


@functools.cache
def _linear_code(device: torch.device) -> Tensor:
    code: Tensor = bitsandbytes_functions().create_linear_map(signed=True, total_bits=8)
    return code.to(device)
