"""The decoder layers are compiled before the first step, on rows that are the same wherever a run goes on from.

The code that a compiler chooses may depend on the first batch that it sees, and with it the last bits of what it
computes. So it sees rows that a function of the data alone names, and a resumed run has the code of one in one piece.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from lora_cli.models import norms
from lora_cli.models.activations import decoder_layers
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.compiled import CompiledLayers, missing_compiler
from lora_cli.models.nf4 import QuantizedLinear
from lora_cli.objectives import Objective
from lora_cli.types import Examples, Item, Progress

_TOKENS = 64
"""Longest row that is compiled on."""


def compile_layers(
    model: AdaptedModel,
    objective: Objective,
    examples: Examples,
    forget: Callable[[], None],
    log: Callable[[str], None],
) -> bool:
    """Compile the decoder layers, tell how long it took, and return True; else tell why not and return False.

    `forget` drops the gradients that compiling makes.
    """
    layers = decoder_layers(model.model)
    reason = missing_compiler(model.device)
    if reason is None and len(layers) < 2:
        reason = f"{model.model.config.model_type} has no layers that follow each other"
    if reason is None:
        began = time.perf_counter()
        reason = _compile(model, layers, objective, examples)
        forget()
    if reason is not None:
        log(f"train.compile: off: {reason}")
        return False
    log(f"compiled: the decoder layers but the first, in {time.perf_counter() - began:.0f} s")
    return True


def _compile(
    model: AdaptedModel, layers: list[nn.Module], objective: Objective, examples: Examples
) -> str | None:
    from torch._dynamo.exc import TorchDynamoException

    within = [module for layer in layers[1:] for module in layer.modules()]
    placed = {id(module) for module in model.layers.values()}
    opaque = [
        one for one in within if id(one) in placed or isinstance(one, QuantizedLinear) or norms.is_fast(one)
    ]
    compiled = CompiledLayers(layers, opaque)
    gpus = [model.device] if model.device.type == "cuda" else []
    model.model.train()
    try:
        with torch.random.fork_rng(gpus):
            for rows in _canonical_rows(examples, packs=model.packs):
                tokens = sum(row.tokens for row in rows) + len(rows) * _TOKENS
                for batch in objective.trial_batches(
                    model, list(enumerate(rows)), Progress(0, 1), tokens=tokens
                ):
                    loss, _ = objective.loss_sum(model, batch)
                    loss.backward()
    except TorchDynamoException as error:
        compiled.remove()
        return f"torch cannot compile these layers ({str(error).strip().splitlines()[0]})"
    return None


def _canonical_rows(examples: Examples, *, packs: bool) -> list[list[Item]]:
    """Return the rows of each pass that is a case of its own to the compiler: packed, alone, equally long, padded."""
    longest = examples[int(np.argmax(examples.lengths))]
    row, shorter = longest.head(_TOKENS), longest.head(min(_TOKENS, longest.tokens) - 1)
    if packs or longest.tokens < 3:
        return [[row]]
    return [[row], [row, row], [row, shorter]]
