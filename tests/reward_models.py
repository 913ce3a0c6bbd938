"""A reward run's exports as transformers and PEFT read them, on the rows that the run was scored on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from lora_cli import objectives
from lora_cli.models.load import load_tokenizer
from lora_cli.recipe.schema import Recipe
from lora_cli.stages import prepare
from lora_cli.types import Example, PairExample, Prepared


class InOneProcess:
    """What the prepare stage needs to know of the runtime."""

    def in_main(self, work: object) -> None:
        """Do the work."""
        work()  # type: ignore[operator]


def prepared(recipe: Recipe) -> Prepared:
    """Return the rows of a recipe as they are fed."""
    return prepare.run(
        recipe.data, recipe.train_on(), load_tokenizer(Path(recipe.model.base)), InOneProcess(), lambda line: None,
        consumes=objectives.consumes(recipe.objective),
    )  # fmt: skip


def heldout(recipe: Recipe) -> tuple[list[PairExample], int]:
    """Return the held-out pairs of a recipe, and the token that pads them."""
    found = prepared(recipe)
    assert found.eval is not None
    return [found.eval[row] for row in range(len(found.eval))], found.pad_id  # type: ignore[misc]


def read_by_peft(base: str, folder: Path, pad_id: int) -> torch.nn.Module:
    """Return the classifier of a base with a reward adapter, as the model card says."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=pad_id)
    return PeftModel.from_pretrained(model, folder).eval()


def read_by_transformers(folder: Path) -> torch.nn.Module:
    """Return the classifier in a merged folder, with nothing missing or unexpected."""
    model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(model).__name__.endswith("ForSequenceClassification")
    assert model.config.num_labels == 1
    return model.eval()


@torch.no_grad()
def scores(model: torch.nn.Module, rows: list[PairExample], pad_id: int) -> np.ndarray:
    """Return the scores of both answers of each pair, (P, 2), in one right-padded batch."""
    answers = [answer for pair in rows for answer in pair.answers()]
    ids = torch.nn.utils.rnn.pad_sequence([until_end(one) for one in answers], True, pad_id)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(until_end(one)) for one in answers], True)
    found: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits
    return found.float().view(-1, 2).numpy()


def until_end(row: Example) -> torch.Tensor:
    """Return a row's tokens up to the end of its answer."""
    return torch.from_numpy(row.input_ids[: int(np.nonzero(row.trained)[0][-1]) + 1].astype(np.int64))
