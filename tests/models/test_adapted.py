"""Scoring and generation against transformers' own, row by row and without padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small import make_model, make_rows

from lora_cli.models.adapted import AdaptedModel
from lora_cli.objectives.sft import Sft
from lora_cli.types import Progress


def test_batched_generation_is_one_by_one(architecture: str) -> None:
    """Greedy answers of a left-padded batch equal those of each prompt alone, without cache and padding."""
    model = make_model(architecture)
    prompts = [np.arange(3, 3 + length, dtype=np.int32) for length in (2, 9, 5, 17)]
    together = AdaptedModel(model, {}).generate(prompts, max_new_tokens=12, stop_ids=[7, 8], pad_id=0)
    for prompt, answer in zip(prompts, together, strict=True):
        ids = [int(token) for token in prompt]
        expected: list[int] = []
        for _ in range(12):
            with torch.no_grad():
                token = int(
                    model(input_ids=torch.tensor([ids + expected]), use_cache=False).logits[0, -1].argmax()
                )
            if token in (7, 8):
                break
            expected.append(token)
        assert answer == expected


def test_generation_ignores_the_models_own_settings() -> None:
    """Sampling and a repetition penalty in the model's generation config do not enter, and are there afterwards."""
    model = make_model("llama")
    prompts = [np.arange(3, 12, dtype=np.int32)]
    plain = AdaptedModel(model, {}).generate(prompts, max_new_tokens=20, stop_ids=[1], pad_id=0)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    assert AdaptedModel(model, {}).generate(prompts, max_new_tokens=20, stop_ids=[1], pad_id=0) == plain
    assert model.generation_config.repetition_penalty == 5.0


@pytest.mark.parametrize("tokens", [40, 90, 10_000])
def test_the_loss_is_transformers_own(architecture: str, tokens: int) -> None:
    """The summed loss over padded batches equals transformers' loss of each row alone, to 1e-5 relative."""
    model, rows = make_model(architecture), make_rows(9, seed=4)
    adapted, objective = AdaptedModel(model, {}), Sft(pad_id=0)
    batches = objective.micro_batches(adapted, list(enumerate(rows)), Progress(0, 1), tokens=tokens)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(9))
    with torch.no_grad():
        ours = sum(float(objective.loss_sum(adapted, batch)[0]) for batch in batches)
        theirs = 0.0
        for row in rows:
            ids = torch.from_numpy(row.input_ids).long()[None]
            labels = torch.where(torch.from_numpy(row.trained)[None], ids, -100)
            theirs += float(model(input_ids=ids, labels=labels).loss) * int(row.trained[1:].sum())
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert sum(map(objective.units, batches)) == sum(int(row.trained[1:].sum()) for row in rows)


def test_a_pad_that_equals_the_terminator_is_trained_inside_and_not_outside() -> None:
    """With pad id = terminator id the terminator inside a row is a target, and no padded position is."""
    rows = make_rows(4, seed=1)
    for row in rows:
        row.input_ids[-1] = 2
        row.trained[-1] = True
    objective = Sft(pad_id=2)
    model = AdaptedModel(make_model("llama"), {})
    (batch,) = objective.micro_batches(model, list(enumerate(rows)), Progress(0, 1), tokens=9999)
    assert int((batch.labels == 2).sum()) >= 4
    assert bool((batch.labels[batch.attention_mask == 0] == -100).all())
