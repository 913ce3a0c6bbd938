"""What is asked of a reward model before, while and after it is exported, and what its reader is told."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from lora_cli.adapters import Method
from lora_cli.errors import InputError, LoraError
from lora_cli.models import score_head
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.score_head import ScoreHead

_LOAD = "AutoModelForSequenceClassification.from_pretrained"


def require_expressible(forms: Collection[str], model: AdaptedModel, method: Method) -> None:
    """Refuse a reward model that no sequence classifier of transformers could hold.

    Raises:
        InputError: with what it is.
    """
    if "portable" in forms:
        raise InputError("a reward model's head has no place in a portable adapter (use peft or merged)")
    score_head.require_classifier(model.model)
    output: Any = model.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    for path, placed in method.placed().items():
        if placed is output:
            raise InputError(
                f"adapter: {path} is the output head, which a reward model has not (take it out of adapter.targets and"
                " adapter.train_also; tokens are learned by an objective before)"
            )


def verify(folder: Path, form: str, score: ScoreHead) -> str:
    """Compare the head in an exported folder with the one that was to be written, and return a note on its use.

    Raises:
        LoraError: they differ.
    """
    found = score_head.read_weight(folder)
    if found is None or not torch.equal(found, score.weight):
        raise LoraError(
            f"export.{form}: read back, its score head is not what was written (nothing was published)"
        )
    way = f"`{_LOAD}(FOLDER)`"
    if form == "peft":
        base = f"`{_LOAD}(BASE, num_labels=1, pad_token_id={score.pad_id})`"
        way = f"{base}, then `PeftModel.from_pretrained(model, FOLDER)`"
    return (
        f"It is a reward model: {way}. The score of a text is that of its last token other than token {score.pad_id},"
        " so let the text end with the terminator of the answer."
    )
