"""Training state on disk: what a run needs to continue as if it had not been stopped.

    checkpoints/step-40/
      state.json              counts and the best held-out loss; the step is all the randomness there is
      optimizer.safetensors   masters and moments
      method.safetensors      what the adapter method keeps besides
      objective.safetensors   what the objective needs of the steps before, where it needs any
      manifest.json           size and sha256 of each; recipe, data, base, versions

The newest checkpoint is the one with the highest step that verifies, never the one with the latest time. An older one
is deleted only when the newer one stands under its name and was read back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from lora_cli.errors import InputError
from lora_cli.manifest import identities, verify
from lora_cli.models.tensor_files import bytes_of, save_tensors
from lora_cli.publish import published, remove, sweep
from lora_cli.recipe.schema import Train
from lora_cli.runtime._moments import SMALLEST
from lora_cli.runtime.optim import MasterAdamW

_NAME = re.compile(r"step-(\d+)")
OBJECTIVE_FILE = "objective.safetensors"


@dataclass
class State:
    """Where training stands; `seconds` is the time spent in steps, without evaluation and saving."""

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_loss: float | None = None
    evaluations_since_best: int = 0
    evaluated_step: int = 0
    """Step of the last held-out loss: a run that was stopped while it took one makes up for it."""
    micro_batch_tokens: int | None = None
    """Where less fits into memory than the recipe wants: tokens of a forward pass."""
    compiled: bool = False
    """Whether the decoder layers were compiled, which changes the last bits of what they compute."""
    skipped: int = 0
    """Steps that were not applied, as they stood out; `recent_*` are of the last steps that were."""
    skipped_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)
    recent_norms: list[float] = field(default_factory=list)


def exports_best(settings: Train) -> bool:
    """Say whether the weights with the lowest held-out loss are the ones that are evaluated and exported."""
    return settings.final_weights == "best" or (
        settings.final_weights == "auto" and settings.early_stopping is not None
    )


def require_best(settings: Train, total_steps: int) -> None:
    """Refuse a run that is to export its best weights and takes no held-out loss by which to know them.

    Raises:
        InputError: naming the key.
    """
    if exports_best(settings) and (settings.eval_every or 0) > total_steps:
        raise InputError(
            f"train.eval_every: {settings.eval_every} is more than the run's {total_steps} steps, so no weights would"
            " be the best (lower it)"
        )


def expected_bytes(
    trainable: Mapping[str, Tensor],
    method_state: Mapping[str, Tensor],
    *,
    eight_bit: bool,
    keep_masters: bool,
) -> int:
    """Return about how many bytes a checkpoint takes: masters, moments, and what the method keeps now."""
    total = bytes_of(method_state)
    for tensor in trainable.values():
        master = 4 if keep_masters else tensor.element_size()
        moments = 2 if eight_bit and tensor.numel() >= SMALLEST else 8
        total += tensor.numel() * (master + moments)
    return total


class Checkpoints:
    """The checkpoints of one run; `keep` newest ones stay, and the best one by held-out loss.

    What was verified is remembered, so that it is hashed once, however often it is read.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self._verified: dict[int, _Verified] = {}

    def steps(self) -> list[int]:
        """Return the steps there are checkpoints of, newest first."""
        names = [_NAME.fullmatch(path.name) for path in self.folder.glob("step-*")]
        return sorted((int(name[1]) for name in names if name), reverse=True)

    def save(
        self,
        state: State,
        optimizer: MasterAdamW,
        method_state: dict[str, Tensor],
        facts: dict[str, Any],
        objective_state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write a checkpoint of `state.step`, then delete all but the newest ones and the best.

        Those of later steps go too: the run has continued from before them, as they did not verify.

        Raises:
            DivergedError: a tensor is not finite.
            ResourceError: it cannot be written; the checkpoints that there were stay.
        """
        sweep(self.folder)
        target = self.folder / f"step-{state.step}"
        tensors = optimizer.state_dict()
        needed = bytes_of(tensors) + bytes_of(method_state) + bytes_of(objective_state or {})
        with published(target, replace=True, facts={"step": state.step, **facts}, needed=needed) as staging:
            text = json.dumps(asdict(state), indent=2, allow_nan=False)
            (staging / "state.json").write_text(text + "\n", encoding="utf-8")
            save_tensors(tensors, staging / "optimizer.safetensors")
            save_tensors(method_state, staging / "method.safetensors")
            if objective_state:
                save_tensors(objective_state, staging / OBJECTIVE_FILE)
        self.prune(state)

    def prune(self, state: State) -> None:
        """Delete all but the newest ones and the best; a kill right after a save has left one too many.

        Raises:
            ResourceError: one cannot be deleted.
        """
        kept = [step for step in self.steps() if step <= state.step][: self.keep]
        for step in self.steps():
            if step not in kept and step != state.best_step:
                remove(self.folder / f"step-{step}")

    def newest(self, warn: Callable[[str], None]) -> int | None:
        """Return the step of the newest checkpoint that verifies; a damaged one is reported and passed over.

        First, one that a kill left displaced gets its place back.
        """
        sweep(self.folder)
        for step in self.steps():
            try:
                self._verify(step)
            except InputError as error:
                warn(f"warning: checkpoint passed over: {error}")
                continue
            return step
        return None

    def facts(self, step: int) -> dict[str, Any]:
        """Return the manifest of a checkpoint: step, recipe, fingerprints, machine, versions.

        Raises:
            InputError: the checkpoint is missing or damaged.
        """
        return self._verify(step).manifest

    @contextmanager
    def opened(self, step: int) -> Iterator[tuple[State, dict[str, Tensor], dict[str, Tensor]]]:
        """Yield the state, the optimizer's tensors and the method's, which are read when they are used.

        Raises:
            InputError: the checkpoint is missing, damaged, or was changed while it was read.
        """
        folder, verified = self.folder / f"step-{step}", self._verify(step)
        try:
            state = State(**json.loads((folder / "state.json").read_text(encoding="utf-8")))
            yield state, load_file(folder / "optimizer.safetensors"), load_file(folder / "method.safetensors")
        finally:
            # Only now: tensors are pages of the file, and what a page holds is known once it was read.
            verified.require_untouched(folder)

    def method_state(self, step: int) -> dict[str, Tensor]:
        """Return the method's tensors of a checkpoint.

        Raises:
            InputError: the checkpoint is missing, damaged, or was changed while it was read.
        """
        with self.opened(step) as (_, _, method):
            return {name: tensor.clone() for name, tensor in method.items()}

    def objective_state(self, step: int) -> dict[str, Tensor]:
        """Return the objective's tensors of a checkpoint; empty where it needed none.

        Raises:
            InputError: the checkpoint is missing, damaged, or was changed while it was read.
        """
        path = self.folder / f"step-{step}" / OBJECTIVE_FILE
        with self.opened(step):
            if not path.is_file():
                return {}
            return {name: tensor.clone() for name, tensor in load_file(path).items()}

    def _verify(self, step: int) -> _Verified:
        """Compare a checkpoint with its manifest, unless that was done and no file was touched since.

        Raises:
            InputError: it is missing, damaged, or another one than was verified before.
        """
        folder = self.folder / f"step-{step}"
        before, files = self._verified.get(step), identities(folder)
        if before is None or before.files != files:
            now = _Verified(verify(folder), files)
            if now.manifest.get("step") != step:
                raise InputError(f"{folder}: is not the checkpoint of step {step}, as its name says")
            if before is not None and before.manifest != now.manifest:
                raise InputError(f"{folder}: is another checkpoint than a moment ago (start again)")
            self._verified[step] = now
        return self._verified[step]


@dataclass(frozen=True)
class _Verified:
    """The manifest that a checkpoint agreed with, and the files of which that was found."""

    manifest: dict[str, Any]
    files: dict[str, tuple[int, ...]]

    def require_untouched(self, folder: Path) -> None:
        """Refuse what was read where any file was touched since it was verified.

        Raises:
            InputError: naming the folder.
        """
        if identities(folder) != self.files:
            raise InputError(f"{folder}: was changed while it was read (start again)")
