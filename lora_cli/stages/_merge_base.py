"""What the update of a quantized base is merged into, measured on sample rows against the model that was trained.

full          the base as it is on disk: it never had the quantization's error, which the update learned to live with
dequantized   the very weights that were trained on, so that only rounding is added, in a model that keeps that error

Which is nearer to the live model depends on the base and the update, so neither is assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_cli.adapters._base import AdapterLinear, replace_module
from lora_cli.adapters._lora_rows import grow
from lora_cli.adapters._whole import TrainedModule
from lora_cli.errors import GateError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.load import load_model
from lora_cli.models.nf4 import quantized_layers
from lora_cli.recipe.schema import Export
from lora_cli.targets import Targets
from lora_cli.types import IGNORED, Batch, Example

TOKENS = 256
"""Sample tokens that are compared: their logits are kept, 150 MB at a vocabulary of 150,000."""

Figures = dict[str, float]
"""kl: nats a token, of the merged model from the live one · max_logit_difference · loss, where rows are real."""


def choose(
    settings: Export,
    model: AdaptedModel,
    base: Path,
    rows: Sequence[Example],
    log: Callable[[str], None],
) -> tuple[str, dict[str, Figures]]:
    """Return `full` or `dequantized`, as the recipe says or as is nearer to the live model, and what was measured.

    Without `rows` the comparison is on random tokens, and no loss is given.

    Raises:
        GateError: the divergence is above `export.max_merge_kl`.
    """
    batches = _batches(rows, model)
    live = [_logits(model, batch) for batch in batches]
    forms = ("full", "dequantized") if settings.merge_base == "auto" else (settings.merge_base,)
    figures: dict[str, Figures] = {}
    for form in forms:
        with on_dense_base(form, model, base) as candidate, merged(candidate):
            figures[form] = _compare(live, candidate, batches)
    if rows:
        figures["live"] = {"loss": _loss(live)}
    else:
        for form in forms:
            del figures[form]["loss"]
    chosen = min(forms, key=lambda form: figures[form]["kl"])
    sample = f"{len(batches)} sample rows" if rows else "random tokens (no held-out rows)"
    for form in forms:
        told = ", ".join(f"{name} {value:.3g}" for name, value in figures[form].items())
        log(f"merge: into the {form} base, on {sample}: {told}")
    why = "nearer to the live model" if len(forms) > 1 else "as export.merge_base says"
    log(f"merge: the {chosen} base is taken, {why}")
    limit, kl = settings.max_merge_kl, figures[chosen]["kl"]
    if limit is not None and not kl <= limit:
        raise GateError(
            f"export.max_merge_kl: merged into the {chosen} base the model is {kl:.3g} nats a token from the live one,"
            f" above {limit:g} (nothing was published; export peft, or raise the limit)"
        )
    return chosen, figures


@contextmanager
def on_dense_base(form: str, model: AdaptedModel, base: Path) -> Iterator[AdaptedModel]:
    """Within it the adapter layers stand around dense layers: of the base on disk, or the dequantized ones."""
    if form == "full":
        # Another exact attention rounds differently in bfloat16; it is the weights that are compared.
        attention = model.model.config._attn_implementation
        dense = load_model(base, dtype=model.dtype, device=model.device, attention=attention)
        layers = placed(model)
        embedding: Any = model.model.get_input_embeddings()  # type: ignore[no-untyped-call]
        grow(dense, embedding.weight.shape[0])
        kept = {path: layer.base for path, layer in layers.items()}
        for path, layer in layers.items():
            layer.base = dense.get_submodule(path)  # type: ignore[assignment]
            replace_module(dense, path, layer)
        try:
            yield AdaptedModel(dense, model.layers)
        finally:
            for path, layer in layers.items():
                layer.base = kept[path]
        return
    quantized = quantized_layers(model.model)
    for path, linear in quantized.items():
        replace_module(model.model, path, linear.dense())
    try:
        yield model
    finally:
        for path, linear in quantized.items():
            replace_module(model.model, path, linear)


@contextmanager
def merged(model: AdaptedModel) -> Iterator[None]:
    """Within it the updates stand in the base weights."""
    layers = placed(model).values()
    for layer in layers:
        layer.merge()
    try:
        yield
    finally:
        for layer in layers:
            layer.unmerge()


def placed(model: AdaptedModel) -> dict[str, AdapterLinear | TrainedModule]:
    """Return what the method put into the model, by path."""
    kinds = AdapterLinear | TrainedModule
    return {path: part for path, part in model.layers.items() if isinstance(part, kinds)}


def _batches(rows: Sequence[Example], model: AdaptedModel) -> list[Batch]:
    """Return batches of one row each with at most TOKENS trained tokens in all."""
    batches, left = [], TOKENS
    if not rows:
        embedding: Any = model.model.get_input_embeddings()
        size = embedding.weight.shape[0]
        ids = torch.randint(size, (4, 64), generator=torch.Generator().manual_seed(0))
        pairs = [(row, torch.ones_like(row, dtype=torch.bool)) for row in ids]
    else:
        # Copies: the token cache is mapped, and of types that torch does not take.
        pairs = [
            (torch.from_numpy(row.input_ids.astype(np.int64)), torch.from_numpy(row.trained.astype(np.bool_)))
            for row in rows
        ]
    for index, (ids, trained) in enumerate(pairs):
        trained = trained & (trained.cumsum(0) <= left)
        trained[0] = False  # nothing predicts it
        if left > 0 and bool(trained.any()):
            left -= int(trained.sum())
            labels = torch.where(trained, ids, IGNORED)
            one = [part[None].to(model.device) for part in (ids, torch.ones_like(ids), labels)]
            batches.append(Batch(one[0], one[1], one[2], (index,), targets=Targets.of_rows(one[2])))
    return batches


def _logits(model: AdaptedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    with model.evaluating():
        logits, targets = model.trained_logits(batch)
    return logits.float(), targets


def _compare(live: list[tuple[Tensor, Tensor]], model: AdaptedModel, batches: Sequence[Batch]) -> Figures:
    divergence = difference = loss = 0.0
    count = sum(len(targets) for _, targets in live)
    for (before, targets), batch in zip(live, batches, strict=True):
        after, _ = _logits(model, batch)
        p, q = F.log_softmax(before, -1), F.log_softmax(after, -1)
        divergence += float(F.kl_div(q, p, reduction="sum", log_target=True))
        difference = max(difference, float((after - before).abs().max()))
        loss += float(F.nll_loss(q, targets, reduction="sum"))
    return {"kl": divergence / count, "max_logit_difference": difference, "loss": loss / count}


def _loss(live: list[tuple[Tensor, Tensor]]) -> float:
    total = sum(float(F.cross_entropy(logits, targets, reduction="sum")) for logits, targets in live)
    return total / sum(len(targets) for _, targets in live)
