"""Reward models: their loss, where they look, their calibration, and their gradients whatever the batches."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from contracts.test_adapters import SETTINGS
from small import CONFIGS, make_model
from transformers import AutoModelForSequenceClassification
from trl.trainer.reward_trainer import RewardTrainer

from lora_cli import adapters, objectives
from lora_cli.errors import InputError
from lora_cli.models import score_head
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.packing import keep_apart
from lora_cli.models.score_head import ScoreHead, last_places
from lora_cli.objectives._base import pad_rows
from lora_cli.objectives._packing import pack_rows
from lora_cli.objectives.reward import BINS, Reward, calibration_gaps, reward_losses
from lora_cli.recipe import objective_blocks as blocks
from lora_cli.types import Example, PairExample, Progress


def trl_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, margins: torch.Tensor | None, centre: float | None
) -> float:
    """Return the mean loss that TRL's trainer has for scores of pairs, (P,) each."""
    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(training=False), args=SimpleNamespace(center_rewards_coefficient=centre),
        accelerator=SimpleNamespace(gather=lambda value: value, gather_for_metrics=lambda value: value),
        _metrics={"eval": defaultdict(list)}, _total_train_tokens=0,
    )  # fmt: skip
    output = SimpleNamespace(logits=torch.cat([chosen, rejected])[:, None])
    inputs = {} if margins is None else {"margin": margins}
    return float(RewardTrainer.compute_loss(trainer, lambda **_: output, inputs))


@pytest.mark.parametrize("centre", [0.0, 0.01])
@pytest.mark.parametrize("with_margin", [False, True])
def test_it_is_trls(centre: float, with_margin: bool) -> None:
    """On random scores the mean loss is that of TRL's trainer, with and without margins and centring."""
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, margins = 3 * torch.randn(3, 40, generator=generator, dtype=torch.float64)
    leads = margins if with_margin else torch.zeros_like(margins)
    mine = reward_losses(chosen, rejected, leads, center_rewards_coefficient=centre).mean()
    theirs = trl_loss(chosen, rejected, margins if with_margin else None, centre or None)
    assert float(mine) == pytest.approx(theirs, abs=1e-12)


def test_by_hand() -> None:
    """Scores 2 and 0.5, a margin of 1, a weight of 0.1: log(1 + exp(-0.5)) + 0.625."""
    found = reward_losses(
        torch.tensor([2.0]), torch.tensor([0.5]), torch.tensor([1.0]), center_rewards_coefficient=0.1
    )
    assert float(found) == pytest.approx(math.log1p(math.exp(-0.5)) + 0.1 * 2.5**2, abs=1e-6)


def test_calibration_by_hand() -> None:
    """Three of four right at a probability of 3/4 are calibrated; one of two at 9/10 misses by 0.4; ties do not."""
    third, ninth = math.log(3), math.log(9)
    margins = torch.tensor([third, third, third, -third, ninth, -ninth, 0.0, 0.0], dtype=torch.float64)
    gaps = calibration_gaps(margins)
    assert len(gaps) == BINS
    assert float(gaps.abs().sum() / len(margins)) == pytest.approx(2 * 0.4 / 8, abs=1e-12)


def pair_examples(number: int, seed: int = 0, pad: int = 0) -> list[PairExample]:
    """Return pairs with a prompt in common; some answers end in a pad token, or have one behind them."""
    draw = np.random.Generator(np.random.PCG64(seed))
    made = []
    for place in range(number):
        prompt = draw.integers(1, 96, int(draw.integers(2, 12)))
        both = []
        for _ in range(2):
            ids = np.concatenate([prompt, draw.integers(1, 96, int(draw.integers(1, 20)))])
            ids = np.concatenate([ids, [pad] * (place % 3)])
            trained = np.arange(len(ids)) >= len(prompt)
            trained[len(ids) - place % 2 :] = False  # what stands behind an answer is not read
            both.append(Example(ids.astype(np.int32), trained))
        made.append(PairExample(both[0], both[1], float(draw.normal())))
    return made


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_it_looks_where_transformers_does(name: str) -> None:
    """Padded and packed, rows that end in the pad token or not have the scores of transformers' classifier, to 1e-5."""
    model = make_model(name)
    weight = torch.randn(
        1, model.config.get_text_config().hidden_size, generator=torch.Generator().manual_seed(2)
    )
    theirs = score_head.classifier(model, ScoreHead(weight, 0)).eval()
    assert isinstance(theirs, AutoModelForSequenceClassification._model_mapping[type(model.config)])
    rows = [(place, answer) for place, pair in enumerate(pair_examples(6)) for answer in pair.answers()]
    ends = [int(np.nonzero(row.trained)[0][-1]) + 1 for _, row in rows]
    cut = [
        torch.from_numpy(row.input_ids[:end].astype(np.int64))
        for (_, row), end in zip(rows, ends, strict=True)
    ]
    ids = torch.nn.utils.rnn.pad_sequence(cut, batch_first=True)
    with torch.no_grad():
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in cut], batch_first=True)
        expected = theirs(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
        batches = [(AdaptedModel(model, {}), pad_rows(rows, 0, model.device))]
        if keep_apart(model) is None:
            batches.append((AdaptedModel(model, {}, packs=True), pack_rows(rows, 4096, model.device)))
        for adapted, batch in batches:
            found = adapted.states_at(batch, last_places(batch, 0)) @ weight.T
            torch.testing.assert_close(found.squeeze(-1), expected, atol=1e-5, rtol=0)
    assert len(batches) == 2


def gradients(tokens: int, *, packs: bool, start: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the mean loss of six pairs, and every gradient, in passes of at most so many tokens."""
    model = make_model("llama")
    method = adapters.build(SETTINGS["lora"], seed=3)
    method.inject(model)
    settings = blocks.RewardObjective(use_margin=True, center_rewards_coefficient=0.05)
    made = objectives.build(settings, pad_id=0)
    made.take_score_head(start)
    if packs:
        assert keep_apart(model) is None
    adapted = AdaptedModel(model, method.layers, packs=packs)
    trained = {**method.trainable(model), **made.trainable(adapted)}
    model.train()
    batches = made.micro_batches(adapted, list(enumerate(pair_examples(6))), Progress(0, 1), tokens=tokens)
    assert sorted(itertools.chain.from_iterable(batch.rows for batch in batches)) == list(range(6))
    total = 0.0
    for batch in batches:
        loss, _ = made.loss_sum(adapted, batch)
        (loss / 6).backward()
        total += float(loss.detach()) / 6
    return total, {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}


def test_the_gradient_does_not_depend_on_the_batches() -> None:
    """One pair a pass, all in one, padded and packed: loss and gradients, also of the head, agree to 1e-5."""
    start = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    loss, expected = gradients(10_000, packs=False, start=start)
    assert "score.weight" in expected
    for tokens, packs in ((1, False), (1, True), (10_000, True), (90, True)):
        other, found = gradients(tokens, packs=packs, start=start)
        assert other == pytest.approx(loss, rel=1e-5)
        for name, value in expected.items():
            assert float((found[name] - value).norm()) <= 1e-5 * float(value.norm()) + 1e-9, (name, tokens)


def test_a_head_of_another_size_is_refused() -> None:
    """A head that does not fit the base's hidden states is one line."""
    made = objectives.build(blocks.RewardObjective(), pad_id=0)
    assert isinstance(made, Reward)
    made.take_score_head(torch.zeros(1, 33))
    with pytest.raises(InputError, match="is for 33 hidden units, the base has 32"):
        made.trainable(AdaptedModel(make_model("llama"), {}))
