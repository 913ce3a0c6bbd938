"""Starting a run from an adapter that exists: the folder settles the layout, the recipe how it is trained on.

    adapter: {method: lora, init_from: runs/first}          rank, alpha, targets and their kin are those of runs/first

A key of the layout that the recipe writes besides has to agree. `rank: 8` is compared as it stands; but `all-linear`
and a list of names may mean the same modules, so `targets` and the like are compared by what they come to on the model.
What is of training alone (dropout, the rate of B, AdaLoRA's schedule, ...) the folder does not decide.

The base stays what it is: the adapter's values are the start, not a new base. What preference and online objectives
compare with is the base with that adapter (`AdaptedModel.as_it_began`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import PreTrainedModel

from lora_cli.adapters import _peft
from lora_cli.adapters._base import Method
from lora_cli.errors import InputError
from lora_cli.manifest import sha256_of
from lora_cli.recipe.section import Conflict, Section

_ADVICE = "(remove the key, or choose another init_from)"


@dataclass(frozen=True, slots=True)
class Start:
    """A PEFT adapter on disk, of the method that the run has."""

    folder: Path
    kind: type[Method]
    config: Mapping[str, Any]

    def fingerprint(self) -> str:
        """Return a sha256 of the settings and the tensors.

        Raises:
            InputError: one of the files cannot be read.
        """
        files = [self.folder / name for name in (_peft.CONFIG_FILE, _peft.TENSOR_FILE)]
        try:
            return hashlib.sha256(" ".join(map(sha256_of, files)).encode()).hexdigest()
        except OSError as error:
            raise InputError(f"adapter.init_from: {error.filename}: {error.strerror}") from error

    def settle(self, settings: Section) -> Section:
        """Return the recipe's `adapter` block with the keys that it does not write taken from the folder.

        Raises:
            InputError: the folder's settings are not sound, or keys that are written contradict them; a line for each.
        """
        held, written = self._held(settings), settings.model_fields_set
        problems = [
            f"adapter.{key}: the adapter in {self.folder} has {_shown(value)}, the recipe"
            f" {_shown(getattr(settings, key))} {_ADVICE}"
            for key, value in held.items()
            if self.kind.start_keys[key] == "value" and key in written and getattr(settings, key) != value
        ]
        if problems:
            raise InputError(problems)
        filled = {key: value for key, value in held.items() if key not in written}
        conflicts: list[Conflict] = []
        try:
            settled = type(settings).model_validate(dict(settings) | filled, context=conflicts)
        except ValidationError as error:
            raise InputError(
                f"adapter.{fault['loc'][0]}: the adapter in {self.folder} has {_shown(fault['input'])}, which no recipe"
                f" can have: {fault['msg']} (choose another init_from)"
                for fault in error.errors()
            ) from None
        if conflicts:
            raise InputError(f"{conflict.key}: {conflict.message}" for conflict in conflicts)
        return settled

    def build(self, settings: Section, seed: int) -> Method:
        """Return the method: its layout from the folder, all else from settled settings; `seed` as in a new adapter."""
        of_training = {
            key: value
            for key, value in _arguments(settings).items()
            if self.kind.start_keys.get(key, "free") == "free"
        }
        return _peft.method_of(self.kind, self.config, self.folder, **of_training, seed=seed)

    def inject(self, method: Method, settings: Section, model: PreTrainedModel) -> str:
        """Place the method of `build` in the model with the folder's values; return a line for the log.

        Raises:
            InputError: the adapter does not fit this model exactly, or a setting names other modules than it has.
        """
        self._compare_modules(method, settings, model)
        layers = method.inject(model)
        _peft.fill(self.folder, method)
        method.continue_training()
        values = dict(settings)
        rank = f"rank {values.get('initial_rank') or values['rank']}"
        if self.config.get("rank_pattern"):
            rank += " with a rank pattern"
        return f"adapter: starts from {self.folder} ({values['method']}, {rank}, {len(layers)} layers)"

    def _held(self, settings: Section) -> dict[str, Any]:
        """Return what the folder says of the keys it settles; what its file leaves out is the method's default."""
        found = self.kind.disk_settings(self.config, str(self.folder / _peft.CONFIG_FILE))
        fields = type(settings).model_fields
        return {key: found.get(key, fields[key].get_default()) for key in self.kind.start_keys}

    def _compare_modules(self, method: Method, settings: Section, model: PreTrainedModel) -> None:
        """Refuse settings that name other modules than the folder has, or other values for them."""
        by_modules = {
            key: self._held(settings)[key] for key, how in self.kind.start_keys.items() if how == "modules"
        }
        differing = [key for key, value in by_modules.items() if getattr(settings, key) != value]
        if not differing:
            return
        # A pattern of PEFT's may match nothing; ours must not. One that the recipe has from the folder is left out.
        agreed = by_modules.keys() - {*differing, "targets", "layers"}
        make: Callable[..., Method] = self.kind
        asked = make(
            **{key: value for key, value in _arguments(settings).items() if key not in agreed}
        ).layout(model)
        held, problems = method.layout(model), []
        for key in differing:
            paths = [path for path in held[key] | asked[key] if held[key].get(path) != asked[key].get(path)]
            if paths:
                theirs, ours = (side[key].get(paths[0], "nothing") for side in (held, asked))
                found = f"the adapter in {self.folder} has {theirs} at {paths[0]}, the recipe {ours}"
                problems.append(f"adapter.{key}: {found} {_ADVICE}")
        if problems:
            raise InputError(problems)


def _arguments(settings: Section) -> dict[str, Any]:
    """Return what of a recipe's block the method's constructor takes."""
    return {key: value for key, value in settings if key not in ("method", "init_from")}


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
