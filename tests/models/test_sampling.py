"""Sampling against transformers' greedy search and its cuts, and what a draw does not depend on."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from small import make_model
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lora_cli.errors import InputError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.sampling import Completion, Draw, choose, sample

PROMPTS = [np.arange(3, 3 + length, dtype=np.int32) for length in (2, 9, 9, 5, 17, 1)]
SEEDS = [11, 12, 13, 14, 15, 16]


def drawn(
    architecture: str, draw: Draw, *, tokens: int = 10_000, order: list[int] | None = None
) -> list[Completion]:
    """Return the completions of PROMPTS, drawn in some order and given back in theirs."""
    order = order or list(range(len(PROMPTS)))
    found = sample(
        AdaptedModel(make_model(architecture), {}),
        [PROMPTS[index] for index in order],
        [SEEDS[index] for index in order],
        draw,
        pad_id=0,
        tokens=tokens,
    )
    return [found[order.index(index)] for index in range(len(order))]


@pytest.mark.parametrize("tokens", [1, 60, 10_000])
def test_at_temperature_0_it_is_transformers_greedy_search(architecture: str, tokens: int) -> None:
    """Without a temperature the answers are those of transformers' generate, in batches of any size."""
    adapted = AdaptedModel(make_model(architecture), {})
    expected = adapted.generate(PROMPTS, max_new_tokens=12, stop_ids=[7, 8], pad_id=0)
    found = drawn(architecture, Draw(12, (7, 8), temperature=0.0), tokens=tokens)
    assert [one.answer() for one in found] == expected
    for one in found:
        assert one.ended == (int(one.ids[-1]) in (7, 8))
        assert one.ended or len(one.ids) == 12


@pytest.mark.parametrize(
    ("tokens", "order"), [(1, None), (90, None), (90, [5, 3, 1, 0, 4, 2]), (10_000, [4, 2, 0, 1, 3, 5])]
)
def test_a_draw_depends_on_its_seed_and_prompt_alone(
    architecture: str, tokens: int, order: list[int] | None
) -> None:
    """Tokens are the same however prompts are split into batches, ordered and padded; other seeds give others."""
    draw = Draw(25, tuple(range(60, 75)))
    whole = drawn(architecture, draw)
    split = drawn(architecture, draw, tokens=tokens, order=order)
    for one, other in zip(whole, split, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.logps == pytest.approx(other.logps, abs=1e-5)
        assert one.entropies == pytest.approx(other.entropies, abs=1e-5)
    assert whole[1].ids.tolist() != whole[2].ids.tolist()  # one prompt, two seeds
    assert any(one.ended for one in whole)
    assert len({len(one.ids) for one in whole}) > 2  # so that ended rows were left out on the way


def test_a_longer_limit_only_adds_tokens() -> None:
    """The draws of a completion are a stream: with a higher limit it begins with the same tokens."""
    short, long = (drawn("llama", Draw(limit, ())) for limit in (6, 20))
    for one, other in zip(short, long, strict=True):
        assert other.ids[:6].tolist() == one.ids.tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logps_are_the_models_at_temperature_1(architecture: str, temperature: float) -> None:
    """Log-probabilities and entropies equal those of one forward pass without a cache, to 1e-5, at any temperature."""
    model = make_model(architecture)
    for prompt, one in zip(PROMPTS, drawn(architecture, Draw(20, (7,), temperature, top_p=0.9)), strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, one.ids]).astype(np.int64))[None]
        with torch.no_grad():
            logps = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logps[torch.arange(len(one.ids)), torch.from_numpy(one.ids.astype(np.int64))]
        assert one.logps == pytest.approx(expected.numpy(), abs=1e-5)
        entropies = torch.distributions.Categorical(logits=logps).entropy()
        assert one.entropies == pytest.approx(entropies.numpy(), abs=1e-5)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, 1.0), (0.7, None, 1.0), (1.0, 5, 1.0), (1.0, None, 0.8), (1.3, 7, 0.6), (1.0, 1, 1.0)],
)
def test_tokens_are_as_likely_as_transformers_says(
    temperature: float, top_k: int | None, top_p: float
) -> None:
    """Over a fine grid of numbers each token comes as often as transformers' warpers make it likely, to 1e-4."""
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(3)) * 2
    warped = TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1 else logits
    warped = TopKLogitsWarper(top_k)(None, warped) if top_k else warped
    warped = TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped
    grid = (torch.arange(50_000, dtype=torch.float64) + 0.5) / 50_000
    tokens = choose(logits.expand(len(grid), -1), grid, Draw(1, (), temperature, top_p, top_k))
    found = torch.bincount(tokens, minlength=40) / len(grid)
    assert float((found - warped.softmax(-1)[0]).abs().max()) <= 1e-4


def test_no_token_without_probability_is_drawn() -> None:
    """The ends of the interval give the first and the last token that has a probability."""
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).repeat(2, 1)
    ends = torch.tensor([0.0, float(np.nextafter(1.0, 0.0))], dtype=torch.float64)
    assert choose(logits, ends, Draw(1, ())).tolist() == [1, 2]


def test_equal_prompts_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight completions of one prompt cost one row of prompt."""
    model = make_model("llama")
    shapes: list[tuple[int, ...]] = []
    forward = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        # the signature is what the sampler asks for
        functools.wraps(forward)(
            lambda **given: (shapes.append(tuple(given["input_ids"].shape)), forward(**given))[1]
        ),
    )
    sample(AdaptedModel(model, {}), [PROMPTS[4]] * 8, list(range(8)), Draw(3, ()), pad_id=0, tokens=10_000)
    assert shapes == [(1, 17), (8, 1), (8, 1)]


@pytest.mark.parametrize("tokens", [1, 10_000])
def test_it_stops_before_the_next_token(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """From when it is told to stop no pass is made any more, and nothing is returned."""
    model = make_model("llama")
    passes: list[bool] = []
    forward = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        functools.wraps(forward)(lambda **given: (passes.append(len(passes) > 4), forward(**given))[1]),
    )
    found = sample(
        AdaptedModel(model, {}), PROMPTS, SEEDS, Draw(20, ()), pad_id=0, tokens=tokens,
        stopping=lambda: len(passes) == 4,
    )  # fmt: skip
    assert found == []
    assert len(passes) == 4


def test_a_model_without_a_cache_is_refused() -> None:
    """A model whose forward takes no cache cannot be sampled from, and a line says so."""
    model = make_model("llama")
    model.forward = lambda input_ids: None  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"model.base: a llama model takes no past_key_values"):
        sample(AdaptedModel(model, {}), PROMPTS, SEEDS, Draw(3, ()), pad_id=0, tokens=100)
