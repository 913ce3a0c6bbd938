"""The model of the recipe, its critic and its judge, opened; and what identifies them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lora_cli.adapters import Start
from lora_cli.constitution.endpoint import require_key
from lora_cli.constitution.ledger import Ledger
from lora_cli.constitution.local import REMEDY, LocalVoice, Voices, letters
from lora_cli.constitution.remote import EndpointVoice
from lora_cli.constitution.voice import Voice
from lora_cli.data.templates import with_template
from lora_cli.errors import InputError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.load import DTYPES, base_fingerprint, base_folder, load_model, load_tokenizer
from lora_cli.recipe.schema import Constitution, Critic, Judge, Recipe
from lora_cli.stages import _opened as opened
from lora_cli.stages._conversation import Conversations


def identities(recipe: Recipe, settings: Constitution, base: Path, start: Start | None) -> dict[str, Any]:
    """Return what the rows depend on of the models: fingerprints of folders, names of what is behind endpoints."""
    facts = {
        "model.base": base_fingerprint(base), "model.dtype": recipe.model.dtype,
        "model.quantize": recipe.quantization(), "model.double_quant": recipe.model.double_quant,
        "data.template": recipe.data.template,
        "adapter.init_from": start.fingerprint() if start is not None else None,
    }  # fmt: skip
    if settings.rounds:
        facts["constitution.critic"] = _identity(settings.critic)
    if settings.samples:
        facts["constitution.judge"] = _identity(settings.judge)
    return facts


def _identity(settings: Critic | Judge) -> list[Any]:
    if settings.kind == "local":
        return ["local", base_fingerprint(folder_of(settings))]
    if settings.kind == "endpoint":
        return ["endpoint", settings.url, settings.model, settings.votes]
    return ["self"]


def open_voices(
    recipe: Recipe,
    settings: Constitution,
    base: Path,
    start: Start | None,
    ledger: Callable[[], Ledger],
    device: torch.device,
    log: Callable[[str], None],
) -> Voices:
    """Return who answers, criticises and judges; a folder that two of them name is loaded once.

    `ledger` opens the answers of endpoints, where one is used.

    Raises:
        InputError: a model cannot be loaded, or an endpoint's key is not there.
    """
    adapter = start.folder if start is not None else None
    own, _ = opened.tokenizer_of(adapter, base)
    tokenizer = with_template(own, recipe.data.template, adapter)
    loaded, method = opened.model(recipe, adapter, base, device)
    tokens = settings.answer_tokens
    judges = settings.samples > 0 and settings.judge.kind == "self"
    model = local_voice(
        AdaptedModel(loaded, method.placed() if method else {}), tokenizer, recipe.data.template, tokens,
        judges=judges,
    )  # fmt: skip
    others: dict[Path, LocalVoice] = {}

    def voice(block: Critic | Judge, name: str) -> Voice:
        if block.kind == "self":
            return model
        if block.kind == "endpoint":
            place = f"constitution.{name}"
            key = require_key(block.key_from, os.environ, place)
            log(f"{place}: {block.url}, {block.model}")
            return EndpointVoice(block, key, ledger(), place=place, answer_tokens=tokens, log=log)
        folder = folder_of(block)
        if folder not in others:
            log(f"constitution.{name}: {folder}")
            other = AdaptedModel(load_model(folder, dtype=DTYPES[recipe.model.dtype], device=device), {})
            judges = settings.samples > 0 and settings.judge.folder == block.folder
            others[folder] = local_voice(other, load_tokenizer(folder), "auto", tokens, judges=judges)
        return others[folder]

    return Voices(
        model,
        voice(settings.critic, "critic") if settings.rounds else None,
        voice(settings.judge, "judge") if settings.samples else None,
    )


def local_voice(
    model: AdaptedModel,
    tokenizer: Any,
    template: str,
    answer_tokens: int,
    *,
    judges: bool,
    remedy: str = REMEDY,
) -> LocalVoice:
    """Return a model in this process as a voice; `template` is the recipe's data.template, which the tokenizer has.

    Raises:
        InputError: it is to judge, and its tokenizer has no token for a letter.
    """
    talk = Conversations(tokenizer, template)
    return LocalVoice(
        model, talk.encode, talk.decode, letter_ids=letters(tokenizer) if judges else {},
        stop_ids=talk.stop_ids, pad_id=talk.pad_id, answer_tokens=answer_tokens, remedy=remedy,
    )  # fmt: skip


def folder_of(settings: Critic) -> Path:
    """Return the model folder of a local critic or judge.

    Raises:
        InputError: there is none, or it cannot be used.
    """
    folder = Path(settings.folder or "").expanduser()
    if not folder.is_dir():  # a name would be looked for on the hub
        raise InputError(f"{settings.folder}: no such folder (give a model folder)")
    return base_folder(str(folder))
