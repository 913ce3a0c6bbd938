"""Stage 2: load the base, place the adapter method in it, and see that the two can work on the prepared rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli import adapters
from lora_cli.adapters import Method, Start
from lora_cli.data.chosen_tokens import token_ids
from lora_cli.errors import InputError
from lora_cli.models import norms
from lora_cli.models.adapted import AdaptedModel, values_of
from lora_cli.models.load import DTYPES, fastest_attention, load_model
from lora_cli.models.nf4 import Quantization
from lora_cli.models.output_head import OutputHead, find_head
from lora_cli.models.packing import keep_apart
from lora_cli.recipe.schema import Adapter
from lora_cli.runtime.dist import Runtime
from lora_cli.stages._base_size import BaseSize
from lora_cli.stages._start_source import StartSource
from lora_cli.types import Prepared

_POSITION_TABLE = re.compile(r"(wpe|embed_positions|position_embeddings?)(\.base)?$")


def run(
    folder: Path,
    dtype: str,
    adapter: Adapter,
    prepared: Prepared,
    *,
    start: Start | None,
    keeps_start: bool,
    quantization: Quantization | None,
    packing: bool | Literal["auto"],
    total_steps: int,
    max_length: int,
    max_generated: int,
    batch_size: int,
    seed: int,
    resumed: Callable[[], Mapping[str, Tensor] | None],
    rt: Runtime,
    log: Callable[[str], None],
) -> tuple[AdaptedModel, Method]:
    """Return the base of `folder` with the method injected, ready to train on the prepared rows.

    With `start` the method begins at that adapter's values, and `adapter` has been settled by it; `keeps_start` says
    that the objective compares with them. `resumed` gives the method's state in the checkpoint that the run goes on
    from, for a start that must not change.

    Raises:
        InputError: the model cannot be loaded or cannot take these rows, a target matches nothing in it or cannot be
            adapted, `start` does not fit it, a schedule of the method does not fit into `total_steps`, or the model
            does not pack.
    """
    attention = fastest_attention(rt.device, max_length)
    model = load_model(
        folder, dtype=DTYPES[dtype], device=rt.device, attention=attention, quantization=quantization
    )
    size = BaseSize.of(model)
    method = start.build(adapter, seed) if start else adapters.build(adapter, seed)
    method.learn_tokens(partial(token_ids, prepared.tokenizer))
    method.plan(total_steps)
    if start:
        log(start.inject(method, adapter, model))
    else:
        source = StartSource(folder, prepared, batch_size=batch_size, seed=seed, resumed=resumed, rt=rt)
        for line in method.prepare(model, source):
            log(line)
        method.inject(model)
    # Only now, since new tokens may have made the embedding grow.
    check_rows_fit(model, prepared, max_generated=max_generated)
    _check_forward(model)
    packs = settle_packing(model, packing, log)
    head = settle_head(model, packs, log)
    norms.speed_up(model)
    # With no adapter to switch off, the base survives only as a copy of the weights that will change.
    changing = {} if method.layers else method.trainable(model)
    frozen_copy = {name: parameter.detach().clone() for name, parameter in changing.items()}
    # Before a checkpoint is restored, so that a run that goes on compares with the same.
    began = values_of(method.placed()) if start and keeps_start else {}
    for line in size.lines(model, method, folder.name, adapter.method, dtype, quantization):
        log(line)
    return AdaptedModel(model, method.placed(), frozen_copy, began=began, packs=packs, head=head), method


def settle_packing(
    model: PreTrainedModel, packing: bool | Literal["auto"], log: Callable[[str], None]
) -> bool:
    """Make the model ready for packed rows where the recipe wants it, and return whether it is.

    Raises:
        InputError: packing is asked for, and the model does not keep packed rows apart.
    """
    if packing is False:
        return False
    reason = keep_apart(model)
    if reason is None:
        return True
    fault = f"{model.config.model_type} does not keep rows apart in one sequence: {reason}"
    if packing is True:
        raise InputError(f"data.packing: found true, but {fault} (use auto or false)")
    log(f"packing: off, rows are padded; {fault}")
    return False


def settle_head(model: PreTrainedModel, packs: bool, log: Callable[[str], None]) -> OutputHead | None:
    """Return what makes the model's losses without all its logits; None, said in the log, where its code forbids it."""
    head = find_head(model, packs=packs)
    if isinstance(head, OutputHead):
        return head
    log(f"losses: from all logits of a pass, which takes more memory; {model.config.model_type}: {head}")
    return None


def check_rows_fit(model: PreTrainedModel, prepared: Prepared, *, max_generated: int) -> None:
    """Refuse rows with tokens or positions that the model has no embedding for.

    `max_generated` is the most tokens that evaluation will need for a prompt and its answer.

    Raises:
        InputError: a token id is beyond the embedding, or a row beyond a table of learned positions.
    """
    embedding: Any = model.get_input_embeddings()
    limit = _learned_positions(model)
    sampled = (
        0 if prepared.eval is not None else max_generated
    )  # of training rows, where an objective samples
    for split, examples, needed in (
        ("train", prepared.train, sampled),
        ("eval", prepared.eval, max_generated),
    ):
        if examples is None:
            continue
        if examples.max_token >= embedding.num_embeddings:
            raise InputError(
                f"data.{split}: holds token {examples.max_token}, but the model's embedding ends at"
                f" {embedding.num_embeddings - 1} (is this the model's own tokenizer?)"
            )
        longest = max(int(examples.lengths.max()), needed)
        if limit is not None and longest > limit:
            raise InputError(
                f"data.{split}: the longest row needs {longest} positions, but the model has {limit}"
                " (lower data.max_length, or evaluate.max_new_tokens or what an objective samples)"
            )


def _learned_positions(model: PreTrainedModel) -> int | None:
    """Return how many positions the model has a learned embedding for; None where positions are computed."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _POSITION_TABLE.search(name):
            # OPT's table begins with rows that stand for no position.
            return module.num_embeddings - int(getattr(module, "offset", 0))
    return None


@torch.no_grad()
def _check_forward(model: PreTrainedModel) -> None:
    """Run two tokens through the injected model, as in evaluation and as in training: the code may differ.

    Raises:
        InputError: the model's code reaches past a wrapped layer into its weight, so an adapter would do nothing.
    """
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    try:
        for training in (True, False):
            model.train(training)(input_ids=ids, use_cache=False)
    except AttributeError as error:
        raise InputError(
            f"adapter.targets: this model's code does not call one of the layers but reads its parts ({error});"
            " an adapter would have no effect there (choose other targets)"
        ) from error
