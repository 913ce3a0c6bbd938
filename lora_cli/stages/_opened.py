"""What a recipe and a target name, opened: adapter and base, tokenizer, the adapter that a run starts from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli import adapters, objectives
from lora_cli.adapters import Method, Start, _peft
from lora_cli.adapters._base import replace_module
from lora_cli.data.chosen_tokens import add_tokens, token_ids
from lora_cli.errors import InputError
from lora_cli.manifest import MANIFEST, verify
from lora_cli.models.adapted import values_of
from lora_cli.models.load import DTYPES, base_fingerprint, base_folder, load_model, load_tokenizer
from lora_cli.models.nf4 import Quantization
from lora_cli.models.safety import check_tokenizer
from lora_cli.models.score_head import read_weight
from lora_cli.models.weight_files import read_json
from lora_cli.objectives import Objective, Surroundings
from lora_cli.recipe.schema import Recipe
from lora_cli.runtime.dist import Runtime
from lora_cli.runtime.run_folder import RunFolder
from lora_cli.stages._scorer import RewardScorer
from lora_cli.types import Prepared


def base(recipe: Recipe, log: Callable[[str], None]) -> Path:
    """Return the folder of the recipe's base, compared with its manifest where it has one; say where its code will run.

    Raises:
        InputError: the base cannot be used, or is damaged.
    """
    folder = _model_folder(recipe.model.base, recipe.model.revision, recipe, log)
    _require_sound(folder)
    return folder


def _model_folder(name: str, revision: str | None, recipe: Recipe, log: Callable[[str], None]) -> Path:
    runs_code = recipe.model.trust_remote_code
    folder = base_folder(name, revision, runs_code=runs_code)
    if runs_code and name != "tiny":
        log(f"warning: model.trust_remote_code: Python code in {folder} will run")
    return folder


def objective(recipe: Recipe, prepared: Prepared, rt: Runtime, log: Callable[[str], None]) -> Objective:
    """Return the recipe's objective, told of what surrounds it.

    Raises:
        InputError: Python code that it names may not run, or cannot be loaded; or a reward model is none, or does not
            fit.
    """

    def decode(ids: Sequence[int], keep_special: bool) -> str:
        text: str = prepared.tokenizer.decode(list(ids), skip_special_tokens=not keep_special)
        return text.strip()

    found = objectives.build(recipe.objective, pad_id=prepared.pad_id)
    found.begin(
        Surroundings(
            decode, prepared.stop_ids, recipe.run.seed, recipe.run.allow_code, rt.sum, lambda: rt.stopping,
            rt.gather_bytes, rt.rank, lambda name: RewardScorer(name, recipe, prepared, rt.device, log),
        )
    )  # fmt: skip
    return found


def require_score_head(folder: Path) -> Tensor:
    """Return the head of the reward model in a folder, (1, H).

    Raises:
        InputError: it has none.
    """
    found = read_weight(folder)
    if found is None:
        raise InputError(
            f"{folder}: holds no reward model (its score head is missing; was it trained with objective.name: reward?)"
        )
    return found


def begin_from(start: Start, objective: Objective) -> None:
    """Have a reward model begin with the head of the one that it starts from, if that is one.

    Raises:
        InputError: it is one, and the objective makes no reward model.
    """
    weight = read_weight(start.folder)
    if weight is None:
        return
    if not objective.has_score_head:
        raise InputError(
            f"adapter.init_from: {start.folder} is a reward model, from which only objective.name: reward can start"
            " (choose another init_from)"
        )
    objective.take_score_head(weight)


def locate(target: Path, recipe: Recipe, log: Callable[[str], None]) -> tuple[Path | None, Path]:
    """Return the adapter folder, if any, and the folder of the model it stands on; both are compared with their
    manifests, where they have one, as an export of a run must."""
    if not target.is_dir():
        raise InputError(f"{target}: no such folder (give a run, a PEFT adapter or a model folder)")
    run = RunFolder(target)
    if run.is_run():
        target = run.exported()
        run.verify(target)
    else:
        _require_sound(target)
    if (target / _peft.CONFIG_FILE).is_file():
        return target, base(recipe, log)
    return None, _model_folder(str(target), None, recipe, log)


def _require_sound(folder: Path) -> None:
    """Refuse a damaged folder of ours; one from elsewhere has no manifest to be compared with."""
    if (folder / MANIFEST).is_file():
        verify(folder)


def settle_start(recipe: Recipe, base: Path | None) -> tuple[Recipe, Start | None]:
    """Return the recipe with what the adapter that it starts from settles, and that adapter; it must fit the base."""
    name = recipe.init_from()
    if name is None:
        return recipe, None
    run = RunFolder(Path(name).expanduser())
    folder = run.adapter()
    if run.is_run():
        run.verify(folder)
    else:
        _require_sound(folder)
    start = adapters.open_start(folder, recipe.adapter.method)
    if base is not None:
        _require_base_of(folder, base)
    return recipe.model_copy(update={"adapter": start.settle(recipe.adapter)}), start


def model(
    recipe: Recipe,
    adapter: Path | None,
    base: Path,
    device: torch.device,
    *,
    dtype: str | None = None,
    attention: str | None = None,
) -> tuple[PreTrainedModel, Method | None]:
    """Return the base as the recipe has it, or in `dtype`, and the method of the adapter injected into it, if any.

    Raises:
        InputError: the base cannot be loaded, or the adapter is one of ours that was trained on another.
    """
    loaded = load_model(
        base,
        dtype=DTYPES[dtype or recipe.model.dtype],
        device=device,
        attention=attention,
        quantization=quantization(recipe),
        headless=adapter is None,
    )
    if adapter is None:
        return loaded, None
    _require_base_of(adapter, base)
    return loaded, adapters.load(adapter, loaded)


def start_values(
    recipe: Recipe, base: Path, model: PreTrainedModel, method: Method
) -> dict[str, dict[str, nn.Parameter]]:
    """Return the values that a run's training began with, by path and name; none where it began as its base.

    `method` is placed in the model with what the run has become. AdaLoRA's layers had other ranks when it began.

    Raises:
        InputError: the adapter that the run started from is no longer there, or no longer the same.
    """
    _, start = settle_start(recipe, base)
    if start is None:
        return {}
    placed = method.placed()
    for path, layer in placed.items():
        replace_module(model, path, layer.base)
    before = adapters.load(start.folder, model).placed()
    for path, layer in before.items():
        replace_module(model, path, layer.base)
    for path, layer in placed.items():
        replace_module(model, path, layer)
    return values_of(before)


def _require_base_of(adapter: Path, base: Path) -> None:
    manifest = adapter / MANIFEST
    trained_on = read_json(manifest).get("model.base") if manifest.is_file() else None
    if trained_on not in (None, base_fingerprint(base)):
        raise InputError(f"{adapter}: was trained on another base than {base}: config or weights differ")


def tokenizer_for(recipe: Recipe, base: Path) -> Any:
    """Return the base's tokenizer with the new tokens of the recipe, which must know all tokens that are trained."""
    tokenizer = load_tokenizer(base)
    add_tokens(tokenizer, recipe.chosen_tokens()[1])
    token_ids(tokenizer, named_tokens(recipe))
    return tokenizer


def tokenizer_of(adapter: Path | None, base: Path) -> tuple[Any, bool]:
    """Return the tokenizer that an adapter was trained with, and whether it knows tokens that the base's does not."""
    known = load_tokenizer(base)
    if adapter is None or not (adapter / "tokenizer.json").is_file():
        return known, False
    chosen = _peft.read_config(adapter).get("trainable_token_indices")
    if not chosen:
        return known, False
    check_tokenizer(adapter)
    own = load_tokenizer(adapter)
    return (own, True) if len(own) > len(known) else (known, False)


def named_tokens(recipe: Recipe) -> list[str]:
    known, new = recipe.chosen_tokens()
    return [*known, *new]


def quantization(recipe: Recipe) -> Quantization | None:
    form = recipe.quantization()
    return None if form == "none" else Quantization(form, recipe.model.double_quant)


def chat_template(own: Any, used: Any) -> str | None:
    """Return the chat template that takes the place of the base's in what is exported; None: the base's own."""
    return None if used.chat_template == own.chat_template else str(used.chat_template)
