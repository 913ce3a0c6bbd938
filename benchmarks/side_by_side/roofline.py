"""The rate of plain matrix products at the model's shapes: what the machine could do if nothing else were to be done.

A step's products of one decoder layer and of the head are made by `torch.mm` as training makes them: X W' forward and
G W backward (LoRA's frozen weights have no gradient; full fine-tuning has G' X besides). The rate is all their
operations by all their seconds, so that each shape counts by its share of the work.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from side_by_side.records import Job, Recorder, measure
from side_by_side.shapes import linear_shapes, sizes

ROWS = 2048
"""Tokens of a product."""
REPEATS = 5


def run(job: Job, recorder: Recorder) -> None:
    """Measure bfloat16 and float32; recorded as the numbers `bfloat16` and `float32`, in operations a second."""
    config = sizes(Path(job.model))
    layer, head = linear_shapes(config)
    counted = [(shape, config["num_hidden_layers"]) for shape in layer] + [(head, 1)]
    for dtype in (torch.bfloat16, torch.float32):
        operations = seconds = 0.0
        for (inputs, outputs), count in counted:
            operations += count * 4.0 * ROWS * inputs * outputs
            seconds += count * _seconds(inputs, outputs, dtype, job.device)
        recorder.numbers[str(dtype).removeprefix("torch.")] = operations / seconds


def _seconds(inputs: int, outputs: int, dtype: torch.dtype, device: str) -> float:
    """Return the median seconds of a forward and a backward product, (ROWS, in) by (out, in)."""
    x = torch.randn(ROWS, inputs, device=device).to(dtype)
    weight = torch.randn(outputs, inputs, device=device).to(dtype)
    gradient = torch.randn(ROWS, outputs, device=device).to(dtype)
    laps = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        torch.mm(x, weight.T)
        torch.mm(gradient, weight)
        if device == "cuda":
            torch.cuda.synchronize()
        laps.append(time.perf_counter() - began)
    return statistics.median(laps[1:])


def useful_operations(config: dict[str, Any], lengths: list[int], labelled: int, *, full: bool) -> float:
    """Return the operations that a step needs: products with the weights, the head at labelled tokens, attention.

    Recomputation, padding and the adapters' own products are not useful work. A token costs 4 operations a weight (6
    where the weight has a gradient); causal attention 6 T^2 H D a document and layer, forward and backward.
    """
    layer, head = linear_shapes(config)
    each = 6.0 if full else 4.0
    weights = config["num_hidden_layers"] * sum(inputs * outputs for inputs, outputs in layer)
    width = layer[0][1]  # H D
    attention = config["num_hidden_layers"] * 6.0 * width * sum(length**2 for length in lengths)
    return each * (weights * sum(lengths) + head[0] * head[1] * labelled) + attention


if __name__ == "__main__":
    measure(run)
