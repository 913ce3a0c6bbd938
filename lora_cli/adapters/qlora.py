"""QLoRA: LoRA on a base whose linear layers are stored in 4 bits (arXiv 2305.14314, eq. 5).

    y = dequantize(W) x + (alpha / r) B A x

The quantization belongs to the base (`model.quantize`, `models/nf4.py`), so that every method can stand on it. The
name is kept for what it asks for: LoRA, with NF4 as the default of `model.quantize`. Of the paper's three parts its
paged optimizer is left out; the moments of an adapter are small.
"""

from __future__ import annotations

from lora_cli.adapters.lora import Lora

METHOD = Lora
