"""A prompt that both answers of a pair share is computed once, and nothing else changes."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import ROOT
from contracts.test_adapters import SETTINGS
from hypothesis import given, settings
from hypothesis import strategies as st
from side_by_side.pairs import prepared
from small import make_model
from test_preference import FORMS, objective, pair_examples
from toy import pairs, write_recipe, write_rows

from lora_cli import adapters, pipeline
from lora_cli.models.activations import Recomputation, decoder_layers
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.output_head import OutputHead, find_head
from lora_cli.models.packing import keep_apart
from lora_cli.models.prefixes import own_lengths, unfold
from lora_cli.objectives._answers import answers_of, common_prompt, pair_batches
from lora_cli.recipe.load import load_recipe
from lora_cli.runtime import dist
from lora_cli.types import IGNORED, Example, PairExample, Progress

Gradients = tuple[float, torch.Tensor]


def adapted(method_name: str = "lora", *, head: bool = True, recompute: bool = False) -> AdaptedModel:
    """Return a packing model with a method whose values are away from the start."""
    model = make_model("llama", quantize="nf4" if method_name == "qlora" else None)
    method = adapters.build(SETTINGS[method_name], seed=3)
    method.plan(3)
    method.inject(model)
    trained = method.trainable(model)
    frozen = {} if method.layers else {n: p.detach().clone() for n, p in trained.items()}
    for name, parameter in trained.items():
        generator = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    assert keep_apart(model) is None
    found = find_head(model, packs=True) if head else None
    if recompute:
        Recomputation(decoder_layers(model)).set(2)
    model.train()
    made = AdaptedModel(
        model, method.layers, frozen, packs=True, head=found if isinstance(found, OutputHead) else None
    )
    made.trained = list(trained.values())  # type: ignore[attr-defined]
    return made


def gradients(form: str, model: AdaptedModel, *, share: bool, tokens: int = 10_000) -> Gradients:
    """Return the mean loss of eight pairs and all gradients."""
    model.shares_prompts = share and model.shares_prompts  # type: ignore[misc]
    made, rows = objective(form), list(enumerate(pair_examples(8, seed=2)))
    total = 0.0
    for parameter in model.trained:  # type: ignore[attr-defined]
        parameter.grad = None
    batches = made.micro_batches(model, rows, Progress(0, 1), tokens=tokens)
    assert any(batch.documents is not None and batch.documents.common for batch in batches) is share
    for batch in batches:
        loss, _ = made.loss_sum(model, batch)
        (loss / 8).backward()
        total += float(loss.detach()) / 8
    found = [one.grad.flatten() for one in model.trained if one.grad is not None]  # type: ignore[attr-defined]
    return total, torch.cat(found)


def require_equal(one: Gradients, other: Gradients) -> None:
    """Compare losses and gradients to 1e-6 of their size."""
    assert one[0] == pytest.approx(other[0], rel=1e-6)
    assert float((one[1] - other[1]).norm() / other[1].norm()) <= 1e-6


@pytest.mark.parametrize("tokens", [60, 10_000])
@pytest.mark.parametrize("form", FORMS)
def test_losses_and_gradients_are_those_of_whole_answers(form: str, tokens: int) -> None:
    """For every objective over pairs a shared prompt changes neither loss nor gradient beyond 1e-6, in fp32."""
    require_equal(
        gradients(form, adapted(), share=True, tokens=tokens), gradients(form, adapted(), share=False)
    )


@pytest.mark.parametrize("method", sorted(SETTINGS))
def test_every_method_shares(method: str) -> None:
    """Under every adapter method, NF4 among them, a shared prompt changes neither loss nor gradient beyond 1e-6."""
    require_equal(
        gradients("dpo", adapted(method), share=True), gradients("dpo", adapted(method), share=False)
    )


@pytest.mark.parametrize("head", [True, False])
def test_recomputed_layers_share(head: bool) -> None:
    """With every layer computed again in the backward pass losses and gradients keep their bits; with and without a
    head of its own."""
    kept, again = (gradients("dpo", adapted(head=head, recompute=one), share=True) for one in (False, True))
    assert kept[0] == again[0]
    assert torch.equal(kept[1], again[1])
    require_equal(kept, gradients("dpo", adapted(head=not head), share=False))


def test_answers_are_those_of_each_row_alone() -> None:
    """Sums and counts of shared answers are those of transformers' own loss over each answer with its prompt."""
    model = adapted()
    rows = list(enumerate(pair_examples(8, seed=2)))
    for batch in pair_batches(model, rows, tokens=80, pad_id=0, share=True):
        with model.evaluating():
            answers = answers_of(model, batch)
            expected, counts = [], []
            for index in batch.rows:
                for one in rows[index][1].answers():
                    ids = torch.from_numpy(one.input_ids.astype(np.int64))[None]
                    labels = torch.where(torch.from_numpy(one.trained), ids, IGNORED)
                    counts.append(int(one.trained[1:].sum()))
                    loss = model.model(input_ids=ids, labels=labels, use_cache=False).loss
                    expected.append(-float(loss) * counts[-1])
        assert answers.lengths.tolist() == counts
        expected_logps = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(answers.logps, expected_logps, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("limit", [1, 64, 10_000])
def test_batches_hold_every_pair_once(limit: int) -> None:
    """Each pair is in one batch, its answers unfold to the rows' own, and no more is computed than the bins count."""
    model, rows = adapted(), list(enumerate(pair_examples(20, seed=7)))
    batches = pair_batches(model, rows, tokens=limit, pad_id=0, share=True)
    assert sorted(itertools.chain(*(batch.rows for batch in batches))) == list(range(20))
    for batch in batches:
        assert batch.documents is not None
        lengths, common = batch.documents.lengths, batch.documents.common
        assert batch.input_ids.numel() == sum(own_lengths(lengths, common)) <= max(limit, 64)
        order = torch.from_numpy(unfold(lengths, common))
        ids = batch.input_ids[0][order].split(lengths)
        answers = [one for index in batch.rows for one in rows[index][1].answers()]
        assert [part.tolist() for part in ids[: len(answers)]] == [one.input_ids.tolist() for one in answers]
        trained = [one.input_ids[1:][one.trained[1:]].tolist() for one in answers]
        assert [part.tolist() for part in batch.targets.tokens.split(batch.targets.counts)] == trained
        targets = batch.labels[0][batch.labels[0] != IGNORED]
        assert sorted(targets.tolist()) == sorted(batch.targets.tokens.tolist())


@st.composite
def drawn_pairs(draw: st.DrawFn) -> PairExample:
    """Draw two answers of few kinds of tokens, so that they often begin alike."""
    both = []
    for _ in range(2):
        ids = draw(st.lists(st.integers(1, 2), min_size=1, max_size=12))
        first = draw(st.integers(0, len(ids)))
        both.append(Example(np.array(ids, np.int32), np.arange(len(ids)) >= first))
    return PairExample(both[0], both[1], math.nan)


@given(drawn_pairs())
@settings(deadline=None, max_examples=300)
def test_the_common_prompt_ends_where_answers_differ_or_are_trained(pair: PairExample) -> None:
    """It is the longest beginning that both have, and of which nothing is trained in either."""
    one, other = pair.answers()
    expected = 0
    for place in range(min(one.tokens, other.tokens)):
        if one.input_ids[place] != other.input_ids[place] or one.trained[place] or other.trained[place]:
            break
        expected += 1
    assert common_prompt(pair) == expected


def test_a_prompt_rendered_in_two_ways_is_not_shared() -> None:
    """Pairs whose prompts differ from the first token, or are trained, are computed whole, beside others that share."""
    model = adapted()
    plain = pair_examples(3, seed=4)
    changed = plain[1].chosen
    changed.input_ids[0] = 95 - changed.input_ids[0]
    plain[2].rejected.trained[:] = True
    (batch,) = pair_batches(model, list(enumerate(plain)), tokens=10_000, pad_id=0, share=True)
    assert batch.documents is not None
    prompts = {index: common_prompt(pair) for index, pair in enumerate(plain)}
    assert prompts[0] > 0 == prompts[1] == prompts[2]
    shared = dict(zip(batch.rows, batch.documents.common[1::2], strict=False))
    assert shared == prompts


def test_a_run_that_shares_learns_what_one_that_does_not_learns(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole runs with and without shared prompts have the losses and scores of each other, and the same tokens."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    train, held = (write_rows(tmp_path / f"{name}.jsonl", pairs(n)) for name, n in (("p", 40), ("h", 16)))
    lines = []
    for name in ("shared", "whole"):
        path = write_recipe(
            tmp_path / name, base, objective={"name": "dpo"}, data__train=str(train), data__eval=str(held),
            train__max_steps=6,
        )  # fmt: skip
        if name == "whole":
            monkeypatch.setattr(AdaptedModel, "shares_prompts", False)
        summary = pipeline.train(load_recipe(path))
        text = (tmp_path / name / "run" / "metrics.jsonl").read_text()
        lines.append(([json.loads(line) for line in text.splitlines()], summary["eval"]))
    (one, scores), (other, expected) = lines
    for mine, theirs in zip(one, other, strict=True):
        assert mine["tokens"] == theirs["tokens"]
        for key in {"loss", "reward_margin", "grad_norm"} & mine.keys():
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), (key, mine)
    assert scores["tuned"] == pytest.approx(expected["tuned"], rel=1e-4)


def test_real_pairs_have_fewer_tokens(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of real pairs, whose answers are longer than their prompts, at least 1.35 times fewer tokens are computed."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path))
    train = [
        f"data.train={shared_data / 'dpo_en_demo.json'}",
        "data.eval_fraction=null",
        "data.max_length=8192",
    ]
    recipe = load_recipe(ROOT / "configs" / "dpo.yaml", train)
    with dist.start("cpu") as rt:
        examples = prepared(recipe, rt).train
    assert examples is not None
    every = [examples[index] for index in range(len(examples))]
    both = [common_prompt(pair) for pair in every if isinstance(pair, PairExample)]
    whole = sum(pair.tokens for pair in every)
    assert len(both) == len(every) >= 299
    assert min(both) > 0
    assert whole / (whole - sum(both)) >= 1.35
