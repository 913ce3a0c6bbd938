"""Stage 5: write what was trained, read it back, compare it with the live model, and only then publish it.

adapter/   PEFT: adapter, tokenizer, chat template, generation config, model card. Stands alone beside its base.
merged/    a plain transformers model with the update in its weights, and the same files beside it.
"""

from __future__ import annotations

import json
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
from lora_cli.models.nf4 import quantized_layers
from lora_cli.publish import published
from lora_cli.recipe.schema import Export
from lora_cli.stages import _merge_base
from lora_cli.types import Example

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest logit difference, absolute, between what was meant to be written and what was read back."""

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
_MORE_TEMPLATES = "additional_chat_templates"
"""Folder of a tokenizer that has several."""


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
    facts: Mapping[str, str],
    settings: Export,
    chat_template: str | None = None,
    sample: Sequence[Example] = (),
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Write each format to its target folder; return the largest logit difference of each after reading it back.

    A method that PEFT cannot hold is written as one that it can, and how far that is from it is logged and said in the
    model card. `card` is the model card's text, `facts` join the manifest. The tokenizer's files come from `base`, byte
    for byte; a `chat_template` takes the place of the base's. On the rows of `sample` it is measured what a quantized
    base is best merged into; the figures are returned as `merge_base`.

    Raises:
        InputError: a target exists.
        GateError: a merged model of a quantized base is farther from the live one than the recipe allows.
        LoraError: what was read back differs from what was meant by more than LIMITS; nothing is published.
    """
    differences: dict[str, Any] = {}
    for form, target in targets.items():
        note = ""
        with published(target, facts=dict(facts)) as staging:
            if form == "peft":
                written, errors = method.as_peft()
                _peft.write(staging, written, base_name=base_name, revision=revision)
                difference, from_live = _reload_adapter(staging, model, written)
                if errors:
                    note = _approximation(written, errors, from_live, model.model.dtype)
                    log(f"export: {note}")
            elif quantized_layers(model.model):
                chosen, figures = _merge_base.choose(settings, model, base, sample, log)
                differences["merge_base"] = {"chosen": chosen, **figures}
                with _merge_base.on_dense_base(chosen, model, base) as dense:
                    difference = _write_merged(staging, dense, settings.max_shard_bytes, log)
            else:
                difference = _write_merged(staging, model, settings.max_shard_bytes, log)
            _check(form, difference, model.model.dtype)
            _add_companions(staging, base, chat_template, stop_ids, f"{card}\n{note}\n" if note else card)
        differences[form] = difference
        log(f"export: {target} ({form}; read back, logits differ by at most {difference:.1e})")
    return differences


def _check(form: str, difference: float, dtype: torch.dtype) -> None:
    limit = LIMITS[dtype]
    if not difference <= limit:
        raise LoraError(
            f"export.{form}: read back, its logits differ from what was written by {difference:.2e}"
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


def _reload_adapter(folder: Path, model: AdaptedModel, written: Method) -> tuple[float, float]:
    """Read the adapter as a user would, around the same frozen base.

    Returns the largest logit differences to what was meant to be written, and to the live model.
    """
    live = sample_logits(model.model)
    with _unwrapped(model):
        for path, layer in written.placed().items():
            replace_module(model.model, path, layer)
        meant = sample_logits(model.model)
        for path, layer in written.placed().items():
            replace_module(model.model, path, layer.base)
        reloaded = adapters.load(folder, model.model)
        read = sample_logits(model.model)
        for path, layer in reloaded.placed().items():
            replace_module(model.model, path, layer.base)
    return float((read - meant).abs().max()), float((read - live).abs().max())


def _approximation(written: Method, errors: Mapping[str, float], from_live: float, dtype: torch.dtype) -> str:
    """Say how far an adapter is from the update it stands for; the logits' difference has rounding in it too."""
    worst = max(errors, key=lambda path: errors[path])
    return (
        f"The update is written as {written.peft_type} of rank {written.disk_config()['r']}: relative error"
        f" {sum(errors.values()) / len(errors):.1e} in the mean, {errors[worst]:.1e} at worst ({worst});"
        f" logits, in {str(dtype).removeprefix('torch.')}, differ from the trained model's by at most {from_live:.1e}"
    )


def _write_merged(
    folder: Path, model: AdaptedModel, max_shard_bytes: int, log: Callable[[str], None]
) -> float:
    """Write the merged model, read it back, return its largest logit difference to the live merged model."""
    live = sample_logits(model.model)
    _untie_adapted_embeddings(model)
    with _merge_base.merged(model):
        merged = sample_logits(model.model)
        with _unwrapped(model), _plain_generation(model.model):
            model.model.save_pretrained(folder, max_shard_size=max_shard_bytes)
    # Another exact attention rounds differently in bfloat16; it is the weights that are compared here.
    attention = model.model.config._attn_implementation
    reread = load_model(folder, dtype=model.model.dtype, device=model.device, attention=attention)
    if model.layers:
        rounding = float((merged - live).abs().max())
        log(f"merge: rounding the update into {model.model.dtype} moves a logit by at most {rounding:.1e}")
    return float((sample_logits(reread) - merged).abs().max())


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


def _untie_adapted_embeddings(model: AdaptedModel) -> None:
    """Give an adapted or separately trained output head weights of its own where it shares the input embedding's."""
    embedding, head = model.model.get_input_embeddings(), model.model.get_output_embeddings()
    shared = _original_weight(embedding)
    if head is None or _original_weight(head) is not shared:
        return
    if isinstance(head, AdapterLinear):
        head.base.weight = nn.Parameter(shared.detach().clone(), requires_grad=False)
    # Merging a TrainedModule parts them.
    if isinstance(head, AdapterLinear) or head.weight is not embedding.weight:
        model.model.config.tie_word_embeddings = False


def _original_weight(module: nn.Module) -> Any:
    return module.base.weight if isinstance(module, AdapterLinear | TrainedModule) else module.weight


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Within it the model has default generation settings; the real ones are written by `_add_companions`."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _add_companions(
    folder: Path, base: Path, chat_template: str | None, stop_ids: Sequence[int], card: str
) -> None:
    for name in _TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    if chat_template is not None:
        _replace_template(folder, chat_template)
    elif (base / _MORE_TEMPLATES).is_dir():
        shutil.copytree(base / _MORE_TEMPLATES, folder / _MORE_TEMPLATES)
    # Its other settings stay as they are: transformers reads some that it refuses to write.
    source = base / "generation_config.json"
    settings = json.loads(source.read_text(encoding="utf-8")) if source.is_file() else {}
    # A reader that stops at another token than the one that was trained would never stop.
    settings["eos_token_id"] = list(stop_ids) if len(stop_ids) > 1 else stop_ids[0]
    (folder / source.name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")


def _replace_template(folder: Path, chat_template: str) -> None:
    """Make a template the only one of an exported tokenizer."""
    (folder / "chat_template.json").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if config.pop("chat_template", None) is not None:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
