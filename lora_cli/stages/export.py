"""Stage 5: write what was trained, read it back, compare it with the live model, and only then publish it.

adapter/   PEFT: adapter, tokenizer, chat template, generation config, model card. Stands alone beside its base.
merged/    a plain transformers model with the update in its weights, and the same files beside it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from lora_cli import adapters
from lora_cli.adapters import Method, _peft
from lora_cli.adapters._base import AdapterLinear, replace_module
from lora_cli.adapters._whole import TrainedModule
from lora_cli.errors import LoraError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.load import load_model
from lora_cli.publish import published

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest logit difference, absolute, between what was written and the live model."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


def run(
    targets: Mapping[str, Path],
    model: AdaptedModel,
    method: Method,
    *,
    base: Path,
    base_name: str,
    revision: str | None,
    stop_ids: Sequence[int],
    card: str,
    max_shard_bytes: int,
    log: Callable[[str], None],
) -> dict[str, float]:
    """Write each format to its target folder; return the largest logit difference of each after reading it back.

    `card` is the model card's text. The tokenizer's files are copied from `base` byte for byte.

    Raises:
        InputError: a target exists.
        LoraError: what was read back differs from the live model by more than LIMITS; nothing is published.
    """
    differences = {}
    for form, target in targets.items():
        with published(target) as staging:
            if form == "peft":
                _peft.write(staging, method, base_name=base_name, revision=revision)
                difference = _reload_adapter(staging, model)
            else:
                difference = _write_merged(staging, model, max_shard_bytes, log)
            _check(form, difference, model.model.dtype)
            _add_companions(staging, base, model.model, stop_ids, card)
        differences[form] = difference
        log(f"export: {target} ({form}; read back, logits differ by at most {difference:.1e})")
    return differences


def _check(form: str, difference: float, dtype: torch.dtype) -> None:
    limit = LIMITS[dtype]
    if not difference <= limit:
        raise LoraError(
            f"export.{form}: read back, its logits differ from the live model's by {difference:.2e}"
            f" (the limit is {limit:g} in {str(dtype).removeprefix('torch.')}; nothing was published)"
        )


@torch.no_grad()
def sample_logits(model: PreTrainedModel) -> Tensor:
    """Return the logits (2, 32, V) float32 of two fixed rows of tokens drawn from the whole vocabulary."""
    generator = torch.Generator().manual_seed(0)
    embedding: Any = model.get_input_embeddings()
    ids = torch.randint(embedding.weight.shape[0], (2, 32), generator=generator)
    training = model.training
    model.eval()
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits.float()
    model.train(training)
    return logits


def _reload_adapter(folder: Path, model: AdaptedModel) -> float:
    """Read the adapter as a user would, around the same frozen base; return the largest logit difference."""
    live = sample_logits(model.model)
    with _unwrapped(model):
        reloaded = adapters.load(folder, model.model)
        difference = float((sample_logits(model.model) - live).abs().max())
        for path, layer in reloaded.placed().items():
            replace_module(model.model, path, layer.base)
    return difference


def _write_merged(
    folder: Path, model: AdaptedModel, max_shard_bytes: int, log: Callable[[str], None]
) -> float:
    """Write the merged model, read it back, return its largest logit difference to the live merged model."""
    live = sample_logits(model.model)
    _untie_adapted_embeddings(model)
    layers = [layer for layer in model.layers.values() if isinstance(layer, AdapterLinear | TrainedModule)]
    for layer in layers:
        layer.merge()
    merged = sample_logits(model.model)
    with _unwrapped(model):
        model.model.save_pretrained(folder, max_shard_size=max_shard_bytes)
    for layer in layers:
        layer.unmerge()
    reread = load_model(folder, dtype=model.model.dtype, device=model.device)
    # Another exact attention rounds differently in bfloat16; it is the weights that are compared here.
    reread.set_attn_implementation(model.model.config._attn_implementation)
    if layers:
        rounding = float((merged - live).abs().max())
        log(f"merge: rounding the update into {model.model.dtype} moves a logit by at most {rounding:.1e}")
    return float((sample_logits(reread) - merged).abs().max())


@contextmanager
def _unwrapped(model: AdaptedModel) -> Iterator[None]:
    """Within it the transformers model holds its plain linear layers again."""
    layers = {
        p: layer for p, layer in model.layers.items() if isinstance(layer, AdapterLinear | TrainedModule)
    }
    for path, layer in layers.items():
        replace_module(model.model, path, layer.base)
    try:
        yield
    finally:
        for path, layer in layers.items():
            replace_module(model.model, path, layer)


def _untie_adapted_embeddings(model: AdaptedModel) -> None:
    """Give an adapted or separately trained output head weights of its own where it shares the input embedding's."""
    embedding, head = model.model.get_input_embeddings(), model.model.get_output_embeddings()
    shared = _original_weight(embedding)
    if head is None or _original_weight(head) is not shared:
        return
    if isinstance(head, AdapterLinear):
        head.base.weight = nn.Parameter(shared.detach().clone(), requires_grad=False)
    if (
        isinstance(head, AdapterLinear) or head.weight is not embedding.weight
    ):  # merging a TrainedModule parts them
        model.model.config.tie_word_embeddings = False


def _original_weight(module: nn.Module) -> Any:
    return module.base.weight if isinstance(module, AdapterLinear | TrainedModule) else module.weight


def _add_companions(
    folder: Path, base: Path, model: PreTrainedModel, stop_ids: Sequence[int], card: str
) -> None:
    for name in _TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    settings = GenerationConfig(**model.generation_config.to_diff_dict()) if model.generation_config else None
    settings = settings or GenerationConfig()
    # A reader that stops at another token than the one that was trained would never stop.
    settings.eos_token_id = list(stop_ids) if len(stop_ids) > 1 else stop_ids[0]
    settings.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
