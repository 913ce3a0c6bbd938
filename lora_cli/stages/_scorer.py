"""A reward model that scores the completions of another run: base, adapter and head, frozen, as it was trained.

What can be known without a weight is checked when it is opened; it is loaded when it first scores. Both models must
have one tokenizer and chat template, since what is scored are the very tokens that the other one was given and drew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_cli import adapters
from lora_cli.adapters import _peft
from lora_cli.errors import InputError, ResourceError
from lora_cli.manifest import MANIFEST, sha256_of, verify
from lora_cli.models import score_head
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.load import DTYPES, base_fingerprint, base_folder, load_model, load_tokenizer
from lora_cli.models.memory import attempt, forget
from lora_cli.models.nf4 import Quantization
from lora_cli.models.weight_files import read_json
from lora_cli.objectives._base import pad_batches
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.schema import Recipe
from lora_cli.runtime.run_folder import RECIPE_FILE, RunFolder
from lora_cli.types import Example, Prepared

PASS_TOKENS = {"cpu": 8192, "cuda": 65536}
"""Padded tokens that are scored together, at most."""
_KEY = "objective.rewards: reward_model"


class RewardScorer:
    """The reward model in a folder; see `objectives._base.Scorer`."""

    def __init__(
        self, name: str, recipe: Recipe, prepared: Prepared, device: torch.device, log: Callable[[str], None]
    ) -> None:
        """Find it and see that it fits `prepared`; `recipe` is that of the run whose completions are scored.

        Raises:
            InputError: it is no reward model, damaged, or one of another tokenizer or chat template.
        """
        self.name, self.device, self.pad_id, self.log = name, device, prepared.pad_id, log
        folder = Path(name).expanduser()
        run = RunFolder(folder)
        if run.is_run():
            self.folder, self.recipe = run.exported(), load_recipe(folder / RECIPE_FILE)
            run.verify(self.folder)
        else:
            self.folder, self.recipe = folder, recipe
            if (folder / MANIFEST).is_file():
                verify(folder)
        weight = score_head.read_weight(self.folder)
        if weight is None:
            raise InputError(
                f"{_KEY}: {name}: holds no reward model (give the folder of a run with objective.name: reward)"
            )
        self.weight: Tensor = weight
        self.is_adapter = (self.folder / _peft.CONFIG_FILE).is_file()
        own, used = load_tokenizer(self._tokenizer_folder()), prepared.tokenizer
        if own.get_vocab() != used.get_vocab():
            raise InputError(
                f"{_KEY}: {name}: has another tokenizer than this run (train it on a model of its kind)"
            )
        if prepared.template != "plain" and own.chat_template != used.chat_template:
            raise InputError(
                f"{_KEY}: {name}: was trained under another chat template (use one data.template for both runs)"
            )
        self._model: AdaptedModel | None = None

    @property
    def fingerprint(self) -> str:
        """A sha256 of the folder's manifest, or of its files where it has none."""
        files = [self.folder / MANIFEST]
        if not files[0].is_file():
            names = (_peft.CONFIG_FILE, "config.json")
            files = sorted([*self.folder.glob("*.safetensors"), *map(self.folder.joinpath, names)])
        sums = [sha256_of(file) for file in files if file.is_file()]
        return hashlib.sha256(" ".join(sums).encode()).hexdigest()

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Return the score of each row, in smaller passes where one does not fit into memory.

        Raises:
            InputError: the model cannot be loaded.
            ResourceError: one row does not fit.
        """
        if self._model is None:
            self._model = self._load()
        longest = max(map(len, rows), default=1)
        tokens = min(PASS_TOKENS[self.device.type], len(rows) * longest)
        while True:
            with attempt() as tried:
                return self._scores(self._model, rows, tokens)
            assert tried.failed
            forget(self.device)
            if tokens <= longest:
                raise ResourceError(
                    f"{_KEY}: out of memory: one completion with its prompt does not fit beside the model that is"
                    " trained (lower objective.sampling.max_new_tokens, or set model.quantize: nf4)"
                )
            tokens //= 2

    def _scores(self, model: AdaptedModel, rows: Sequence[Sequence[int]], tokens: int) -> list[float]:
        examples = [
            (place, Example(np.asarray(row, dtype=np.int32), np.ones(len(row), dtype=np.bool_)))
            for place, row in enumerate(rows)
        ]
        found = torch.zeros(len(rows))
        with model.evaluating():
            for batch in pad_batches(examples, tokens=tokens, pad_id=self.pad_id, device=self.device):
                states = model.states_at(batch, score_head.last_places(batch, self.pad_id))
                found[list(batch.rows)] = F.linear(states.float(), self.weight.to(states.device))[:, 0].cpu()
        values: list[float] = found.tolist()
        return values

    def _load(self) -> AdaptedModel:
        self.log(f"rewards: the reward model in {self.folder}")
        form = self.recipe.quantization() if self.is_adapter else "none"
        base = self._base()
        model = load_model(
            base,
            dtype=DTYPES[self.recipe.model.dtype],
            device=self.device,
            quantization=None if form == "none" else Quantization(form, self.recipe.model.double_quant),
            headless=not self.is_adapter,
        )
        placed: Any = {}
        if self.is_adapter:
            manifest = self.folder / MANIFEST
            trained_on = read_json(manifest).get("model.base") if manifest.is_file() else None
            if trained_on not in (None, base_fingerprint(base)):
                raise InputError(f"{_KEY}: {self.name}: was trained on another base than {base}")
            placed = adapters.load(self.folder, model).placed()
        if self.weight.shape[1] != model.config.get_text_config().hidden_size:
            raise InputError(f"{_KEY}: {self.name}: its score head does not fit {base}")
        model.requires_grad_(False)
        return AdaptedModel(model, placed)

    def _base(self) -> Path:
        """Return the model's folder; no code in it runs, whatever the recipe of a run that was handed over says."""
        if not self.is_adapter:
            return base_folder(str(self.folder))
        return base_folder(self.recipe.model.base, self.recipe.model.revision)

    def _tokenizer_folder(self) -> Path:
        own = (self.folder / "tokenizer.json").is_file()
        return self.folder if own else self._base()
