"""Stage 5: write what was trained, read it back, compare it with the live model, and only then publish it.

adapter/   PEFT: adapter, tokenizer, chat template, generation config, model card. Stands alone beside its base.
portable/  the same, but whatever the method a plain LoRA of one rank, for vLLM, llama.cpp and their like.
merged/    a plain transformers model with the update in its weights, and the same files beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from lora_cli import adapters
from lora_cli.adapters import Method, _peft, _portable
from lora_cli.adapters._base import AdapterLinear, replace_module
from lora_cli.adapters._whole import TrainedModule
from lora_cli.errors import LoraError
from lora_cli.models import remote_code, score_head
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.load import load_model
from lora_cli.models.nf4 import quantized_layers
from lora_cli.models.score_head import ScoreHead
from lora_cli.models.tensor_files import disk_errors, require_finite
from lora_cli.publish import published
from lora_cli.recipe.schema import Export
from lora_cli.stages import _lossy, _merge_base, _reward_model, _space
from lora_cli.stages._companions import Companions
from lora_cli.types import Example

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest logit difference, absolute, between what was meant to be written and what was read back."""


def run(
    targets: Mapping[str, Path],
    model: AdaptedModel,
    method: Method,
    beside: Companions,
    *,
    settings: Export,
    sample: Sequence[Example] = (),
    merge_with: str = "lora-merge TARGET --output DIR",
    score: ScoreHead | None = None,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Write each format to its target folder; return the largest logit difference of each after reading it back.

    With a head `score` it is a sequence classifier that is written, whose scores are compared in the place of logits.
    A method that a format cannot hold is written as one that it can, and how far that is from it is logged and said in
    the model card, as is a note of the method's own. `beside` is what each folder gets besides. On the rows of `sample`
    it is measured what a quantized base is best merged into. Those figures are returned as `merge_base`, those of a
    portable adapter as `portable_update`; `merge_with` is the command to use where it is refused.

    Raises:
        InputError: a target exists, or a portable adapter cannot hold what was trained.
        GateError: a merged model of a quantized base, or a portable adapter, is farther from the live model than the
            recipe allows; the portable one is written last.
        DivergedError: a tensor to be written is not finite.
        ResourceError: a format does not fit on the disk.
        LoraError: what was read back differs from what was meant by more than LIMITS; nothing is published.
    """
    differences: dict[str, Any] = {}
    require_expressible(targets, model, method, scores=score is not None)
    for form, target in sorted(targets.items(), key=lambda item: item[0] == "portable"):
        notes: list[str] = []
        needed = _space.export_bytes([form], settings, beside.base, model, method)
        with published(target, facts=dict(beside.facts), needed=needed) as staging:
            if form == "merged":
                remote_code.settle(staging, runs_code=remote_code.may_run(beside.base))
                difference, measured = _export_merged(
                    staging, model, beside.base, settings, sample, score, log
                )
                differences |= measured
            else:
                written, errors = _as_adapter(form, method, settings, merge_with)
                difference, from_live = _export_adapter(staging, model, written, beside, score)
                notes = [method.note()] if method.note() else []
                notes += [_new_tokens(model)] if beside.tokenizer is not None else []
                if errors:
                    notes += _lossy.describe(form, written, errors, from_live, model.dtype)
                if form == "portable":
                    rank = written.disk_config()["r"]
                    differences["portable_update"] = _lossy.figures(rank, errors, from_live)
            _check(form, difference, model.dtype, score)
            if score is not None:
                notes.append(_reward_model.verify(staging, form, score))
            for note in notes:
                log(f"export: {note}")
            beside.write(staging, notes)
        differences[form] = difference
        log(f"export: {target} ({form}; read back, {_compared(score)} differ by at most {difference:.1e})")
    return differences


def require_expressible(
    forms: Collection[str], model: AdaptedModel, method: Method, *, scores: bool = False
) -> None:
    """Refuse formats that cannot hold what the injected method trains; no training is needed to know it.

    `scores`: it is a reward model that is to be written.

    Raises:
        InputError: with what it is.
    """
    if scores:
        _reward_model.require_expressible(forms, model, method)
    if "portable" in forms:
        _portable.require_expressible(method, model.model)


def _as_adapter(
    form: str, method: Method, settings: Export, merge_with: str
) -> tuple[Method, dict[str, float]]:
    """Return what is written in an adapter's place, and each layer's relative error; empty: the method itself."""
    if form == "peft":
        return method.as_peft()
    plain, errors = _portable.plain_lora(method, settings.portable_rank)
    _lossy.require_near(errors, plain.rank, settings.max_portable_error, merge_with)
    return plain, errors


def _export_merged(
    folder: Path,
    model: AdaptedModel,
    base: Path,
    settings: Export,
    sample: Sequence[Example],
    score: ScoreHead | None,
    log: Callable[[str], None],
) -> tuple[float, dict[str, Any]]:
    """Write the merged model; return its largest logit difference read back, and what a quantized base measured."""
    if not quantized_layers(model.model):
        return _write_merged(folder, model, settings.max_shard_bytes, score, log), {}
    chosen, figures = _merge_base.choose(settings, model, base, sample, log)
    with _merge_base.on_dense_base(chosen, model, base) as dense:
        difference = _write_merged(folder, dense, settings.max_shard_bytes, score, log)
    return difference, {"merge_base": {"chosen": chosen, **figures}}


def _check(form: str, difference: float, dtype: torch.dtype, score: ScoreHead | None) -> None:
    limit = LIMITS[dtype]
    if not difference <= limit:
        raise LoraError(
            f"export.{form}: read back, its {_compared(score)} differ from what was written by {difference:.2e}"
            f" (the limit is {limit:g} in {str(dtype).removeprefix('torch.')}; nothing was published)"
        )


def _compared(score: ScoreHead | None) -> str:
    return "logits" if score is None else "scores"


def _new_tokens(model: AdaptedModel) -> str:
    """Say what a reader other than ours must do before it loads an adapter with tokens that the base lacks."""
    embedding: Any = model.model.get_input_embeddings()  # type: ignore[no-untyped-call]
    rows = embedding.weight.shape[0]
    return (
        "The tokenizer beside this adapter has tokens that the base's has not. For PEFT, load it from here and call"
        f" `model.resize_token_embeddings({rows})` on the base before it loads the adapter."
    )


@torch.no_grad()
def sample_logits(model: PreTrainedModel, score: ScoreHead | None = None) -> Tensor:
    """Return the logits (2, 32, V) float32 of two fixed rows of tokens drawn from the whole vocabulary.

    With a head it is the score at each token, (2, 32).
    """
    generator = torch.Generator().manual_seed(0)
    embedding: Any = model.get_input_embeddings()
    ids = torch.randint(embedding.weight.shape[0], (2, 32), generator=generator)
    training = model.training
    model.eval()
    if score is not None:
        logits = score_head.scores(model, ids, score.weight)
    else:
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits.float()
    model.train(training)
    return logits


def _export_adapter(
    folder: Path, model: AdaptedModel, written: Method, beside: Companions, score: ScoreHead | None
) -> tuple[float, float]:
    """Write the adapter, and read it as a user would, around the same frozen base.

    Returns the largest logit differences to what was meant to be written, and to the live model.
    """
    head = None if score is None else score.weight
    _peft.write(folder, written, base_name=beside.base_name, revision=beside.revision, score=head)
    live = sample_logits(model.model, score)
    with _unwrapped(model):
        for path, layer in written.placed().items():
            replace_module(model.model, path, layer)
        meant = sample_logits(model.model, score)
        for path, layer in written.placed().items():
            replace_module(model.model, path, layer.base)
        reloaded = adapters.load(folder, model.model)
        read = sample_logits(model.model, score)
        for path, layer in reloaded.placed().items():
            replace_module(model.model, path, layer.base)
    return float((read - meant).abs().max()), float((read - live).abs().max())


def _write_merged(
    folder: Path,
    model: AdaptedModel,
    max_shard_bytes: int,
    score: ScoreHead | None,
    log: Callable[[str], None],
) -> float:
    """Write the merged model, read it back, return its largest logit difference to the live merged model."""
    live = sample_logits(model.model, score)
    shared = _tied(model.model)
    with _merge_base.merged(model):
        merged = sample_logits(model.model, score)
        with _unwrapped(model), _plain_generation(model.model):
            if shared and not _tied(model.model):
                model.model.config.tie_word_embeddings = False
            written = model.model if score is None else score_head.classifier(model.model, score)
            require_finite(written.state_dict())
            with disk_errors(folder):
                written.save_pretrained(folder, max_shard_size=max_shard_bytes)
    # Another exact attention rounds differently in bfloat16; it is the weights that are compared here.
    attention = model.model.config._attn_implementation
    reread = load_model(
        folder, dtype=model.dtype, device=model.device, attention=attention, headless=score is not None
    )
    if model.layers:
        what, rounding = "logit" if score is None else "score", float((merged - live).abs().max())
        log(f"merge: rounding the update into {model.dtype} moves a {what} by at most {rounding:.1e}")
    return float((sample_logits(reread, score) - merged).abs().max())


@contextmanager
def _unwrapped(model: AdaptedModel) -> Iterator[None]:
    """Within it the transformers model holds its plain linear layers again."""
    layers = _merge_base.placed(model)
    for path, layer in layers.items():
        replace_module(model.model, path, layer.base)
    try:
        yield
    finally:
        for path, layer in layers.items():
            replace_module(model.model, path, layer)


def _tied(model: PreTrainedModel) -> bool:
    """Say whether head and input embedding have one weight: merging parts them where only one of them was trained."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    weights = [_original_weight(module) for module in (embedding, head) if module is not None]
    return len(weights) == 2 and (weights[0] is weights[1] or torch.equal(*weights))


def _original_weight(module: nn.Module) -> Any:
    return module.base.weight if isinstance(module, AdapterLinear | TrainedModule) else module.weight


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Within it the model has default generation settings; the real ones are written by `Companions`."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
