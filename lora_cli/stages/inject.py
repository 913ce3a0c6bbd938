"""Stage 2: load the base, place the adapter method in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from lora_cli import adapters
from lora_cli.adapters import Method
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.load import DTYPES, load_model
from lora_cli.recipe.schema import Adapter
from lora_cli.runtime.dist import Runtime


def run(
    folder: Path,
    dtype: str,
    adapter: Adapter,
    *,
    total_steps: int,
    max_length: int,
    seed: int,
    rt: Runtime,
    log: Callable[[str], None],
) -> tuple[AdaptedModel, Method]:
    """Return the base of `folder` with the method injected, ready to train.

    Raises:
        InputError: the model cannot be loaded, a target matches nothing in it, or a schedule of the method does not
            fit into `total_steps`.
    """
    model = load_model(folder, dtype=DTYPES[dtype], device=rt.device, max_length=max_length)
    method = adapters.build(adapter, seed)
    method.plan(total_steps)
    layers = method.inject(model)
    trainable = method.trainable(model)
    # With no adapter to switch off, the base survives only as a copy of the weights that will change.
    frozen_copy: dict[str, Tensor] = {}
    if not layers:
        frozen_copy = {name: parameter.detach().clone() for name, parameter in trainable.items()}
    in_layers = {
        id(parameter) for part in method.placed().values() for parameter in part.parameters(recurse=False)
    }
    total = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in in_layers)
    trained = sum(parameter.numel() for parameter in trainable.values())
    log(
        f"model: {folder.name}, {total:,} parameters in {dtype} on {rt.device.type}; "
        f"{adapter.method} trains {trained:,} ({trained / total:.2%})"
        + (f" in {len(layers)} layers" if layers else "")
    )
    return AdaptedModel(model, method.placed(), frozen_copy), method
