"""Whether what will be written fits on the disk: told before the first step, not after the last."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from lora_cli import disk
from lora_cli.adapters import Method, _portable
from lora_cli.errors import ResourceError
from lora_cli.models import remote_code
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.safety import check_model_folder
from lora_cli.recipe.schema import Export, Recipe
from lora_cli.runtime.checkpoint import Checkpoints, expected_bytes, exports_best
from lora_cli.runtime.run_folder import CHECKPOINTS, RunFolder


def require_for_run(
    recipe: Recipe, folder: RunFolder, base: Path, model: AdaptedModel, method: Method, total_steps: int,
    *, goes_on: bool,
) -> None:  # fmt: skip
    """Refuse a run whose checkpoints and exports do not fit; what it will delete first counts as free.

    Raises:
        ResourceError: with both numbers.
    """
    trainable = method.trainable(model.model)
    one = expected_bytes(
        trainable,
        method.state_dict(),
        eight_bit=recipe.train.optimizer == "adamw_8bit",
        keep_masters=method.keep_masters,
    )
    written = Checkpoints(folder.path / CHECKPOINTS, keep=recipe.train.keep_checkpoints).steps()
    count = _checkpoints(recipe, total_steps, written if goes_on else [])
    exports = export_bytes(recipe.export_formats(), recipe.export, base, model, method)
    freed = sum(disk.size_of(folder.path / name) for name in folder.given_up(fresh=not goes_on))
    needed, free = count * one + exports, disk.free_bytes(folder.path) + freed
    if needed > free:
        raise ResourceError(
            f"run.output: {folder.path}: about {needed:,} bytes are needed ({count} checkpoints of {one:,} at a time,"
            f" {exports:,} for the export), {free:,} are free (free some space, lower train.keep_checkpoints, or choose"
            " another run.output)"
        )


def require_for_export(
    form: str, settings: Export, target: Path, base: Path, model: AdaptedModel, method: Method
) -> None:
    """Refuse an export that does not fit where `target` will be.

    Raises:
        ResourceError: with both numbers.
    """
    needed, free = export_bytes([form], settings, base, model, method), disk.free_bytes(target)
    if needed > free:
        raise ResourceError(
            f"{target}: about {needed:,} bytes are needed, {free:,} are free (free some space, or choose another"
            " folder)"
        )


def export_bytes(
    forms: Collection[str], settings: Export, base: Path, model: AdaptedModel, method: Method
) -> int:
    """Return about how many bytes these formats take together, tokenizers and cards among them."""
    runs_code = remote_code.may_run(base)
    sizes = {
        "peft": method.disk_bytes,
        "portable": lambda: _portable.expected_bytes(method, settings.portable_rank),
        "merged": lambda: check_model_folder(base, runs_code=runs_code).parameters * model.dtype.itemsize,
    }
    beside = sum(
        disk.size_of(path) for path in base.iterdir() if path.is_file() and path.suffix != ".safetensors"
    )
    return sum(sizes[form]() + beside for form in forms)


def _checkpoints(recipe: Recipe, total_steps: int, there: list[int]) -> int:
    """Return how many checkpoints a run writes before it deletes one, besides those that are there, newest first."""
    plan = recipe.train
    if there and there[0] >= total_steps:
        return 0
    saves = -(-total_steps // (plan.save_every or total_steps))
    most = plan.keep_checkpoints + 1  # an old one goes when the new one was read back
    if exports_best(plan):
        saves, most = max(saves, most + 1), most + 1
    return max(1, min(saves, most) - len(there))
