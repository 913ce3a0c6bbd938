"""An injected model exported as the last stage does, beside the files of a base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lora_cli.adapters import Method
from lora_cli.models.adapted import AdaptedModel
from lora_cli.recipe import schema
from lora_cli.stages import export
from lora_cli.stages._companions import Companions
from lora_cli.types import Example


def write(
    targets: Mapping[str, Path],
    model: PreTrainedModel,
    method: Method,
    base: Path,
    settings: schema.Export | None = None,
    *,
    sample: Sequence[Example] = (),
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Export each format to its folder and return what was measured."""
    beside = Companions(base=base, base_name="some/base", revision=None, stop_ids=[2], card="# card\n")
    return export.run(
        targets, AdaptedModel(model, method.placed()), method, beside,
        settings=settings or schema.Export(), sample=sample, log=log,
    )  # fmt: skip
