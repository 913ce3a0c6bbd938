"""Bins lose nothing and are near the fewest possible; packed micro-batches hold the rows and train the same tokens."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import make_model, make_rows

from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.load import load_tokenizer
from lora_cli.models.packing import keep_apart
from lora_cli.models.safety import TINY
from lora_cli.objectives._packing import bins, pack_batches
from lora_cli.objectives.sft import Sft
from lora_cli.types import IGNORED, Example, Progress

CPU = torch.device("cpu")


def make_example(length: int) -> Example:
    """Return a row of so many tokens, of which all are trained."""
    return Example(np.ones(length, np.int32), np.ones(length, np.bool_))


def fewest(lengths: tuple[int, ...], capacity: int) -> int:
    """Return the fewest bins there can be, by trying every assignment."""
    for count in itertools.count(1):
        loads = {(0,) * count}
        for length in lengths:
            loads = {
                tuple(sorted((*load[:place], load[place] + length, *load[place + 1 :])))
                for load in loads
                for place in range(count)
                if load[place] + length <= capacity
            }
        if loads:
            return count
    raise AssertionError


def first_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Return first-fit-decreasing as it is told in textbooks: look through all bins each time."""
    found: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        for members in found:
            if sum(lengths[member] for member in members) + lengths[index] <= capacity:
                members.append(index)
                break
        else:
            found.append([index])
    return found


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 50))
@settings(deadline=None, max_examples=200)
def test_bins_are_first_fit_decreasing(lengths: list[int], capacity: int) -> None:
    """Every row is in one bin, none is over its capacity but one that holds a single longer row, and order is fixed."""
    found = bins(lengths, capacity)
    assert sorted(itertools.chain(*found)) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in members) <= capacity or len(members) == 1 for members in found)
    assert found == first_fit(lengths, capacity)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.integers(12, 20))
@settings(deadline=None, max_examples=100)
def test_bins_are_near_the_fewest(lengths: list[int], capacity: int) -> None:
    """There are at most 11/9 of the fewest possible bins, and one."""
    assert len(bins(lengths, capacity)) <= 11 / 9 * fewest(tuple(lengths), capacity) + 1


def test_a_hundred_thousand_rows_take_less_than_a_second() -> None:
    """100,000 rows of 1 to 2,048 tokens are put into bins in less than a second of this process."""
    lengths = np.random.Generator(np.random.PCG64(0)).integers(1, 2049, 100_000).tolist()
    started = time.process_time()
    found = bins(lengths, 2048)
    assert time.process_time() - started < 1.0
    assert sum(lengths) / (2048 * len(found)) > 0.98


def test_real_rows_fill_their_bins(shared_data: Path) -> None:
    """The rows of GSM8K fill bins of 2,048 tokens to at least 98 %."""
    tokenizer = load_tokenizer(TINY)
    rows = [json.loads(line) for line in (shared_data / "gsm8k.train.jsonl").read_text().splitlines()]
    texts = [f"{row['question']}\n{row['answer']}" for row in rows]
    lengths = [len(encoding.ids) for encoding in tokenizer.backend_tokenizer.encode_batch(texts)]
    found = bins(lengths, 2048)
    assert sum(lengths) / (2048 * len(found)) >= 0.98


@pytest.mark.parametrize("limit", [90, 128, 100_000])
def test_packed_sequences_hold_the_rows(limit: int) -> None:
    """Each row stands once, whole, at positions from 0, nothing between them; its first token is no target."""
    rows = [(index, example) for index, example in enumerate(make_rows(20, seed=7))]
    for _, example in rows[:5]:
        example.trained[0] = True  # it must not be predicted from the row before
    batches = pack_batches(rows, tokens=limit, device=CPU)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(20))
    for batch in batches:
        assert batch.attention_mask is None
        assert batch.documents is not None
        assert batch.position_ids is not None
        lengths = batch.documents.lengths
        assert batch.input_ids.shape == (1, sum(lengths))
        assert sum(lengths) <= limit
        assert batch.documents.offsets.tolist() == [0, *itertools.accumulate(lengths)]
        parts = list(
            zip(
                *(tensor[0].split(lengths) for tensor in (batch.input_ids, batch.labels, batch.position_ids)),
                strict=True,
            )
        )
        for row, (ids, labels, places) in zip(batch.rows, parts[: len(batch.rows)], strict=True):
            example = rows[row][1]
            assert ids.tolist() == example.input_ids.tolist()
            assert places.tolist() == list(range(len(ids)))
            assert labels[0] == IGNORED
            wanted = np.where(example.trained, example.input_ids, IGNORED)[1:]
            assert labels[1:].tolist() == wanted.tolist()
        for _, labels, places in parts[len(batch.rows) :]:
            assert (labels == IGNORED).all()
            assert places.tolist() == list(range(len(places)))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=30), st.integers(64, 1024))
@settings(deadline=None, max_examples=100)
def test_sequences_have_few_lengths(lengths: list[int], limit: int) -> None:
    """On a CPU a sequence is as long as a multiple of 64 or as a pass may be, and less than 64 tokens of it fill it up;
    a row beyond a pass stays as it is. Elsewhere nothing fills a sequence up."""
    rows = [(index, make_example(length)) for index, length in enumerate(lengths)]
    for batch in pack_batches(rows, tokens=limit, device=CPU):
        used, total = sum(lengths[row] for row in batch.rows), batch.input_ids.numel()
        assert total - used < 64
        assert total == used if used > limit else total == limit or total % 64 == 0
    for batch in pack_batches(rows, tokens=limit, device=torch.device("meta")):
        assert batch.input_ids.numel() == sum(lengths[row] for row in batch.rows)


def test_a_row_longer_than_a_pass_has_one_of_its_own() -> None:
    """A row beyond the limit is neither cut nor dropped."""
    rows = list(enumerate(make_rows(6, seed=2)))
    longest = max(rows, key=lambda row: len(row[1].input_ids))
    batches = pack_batches(rows, tokens=len(longest[1].input_ids) - 1, device=CPU)
    assert (longest[0],) in [batch.rows for batch in batches]


@pytest.mark.parametrize("tokens", [1, 64, 100, 10_000])
def test_the_loss_is_that_of_padded_rows(architecture: str, tokens: int) -> None:
    """Loss, units and right predictions over packed rows are those over padded ones, and over each row alone."""
    plain, model, objective = make_model(architecture), make_model(architecture), Sft(pad_id=0)
    assert keep_apart(model) is None
    rows = list(enumerate(make_rows(12, seed=3)))
    sums = []
    for adapted, limit in ((AdaptedModel(plain, {}), 10_000), (AdaptedModel(model, {}, packs=True), tokens)):
        loss = units = right = 0.0
        with adapted.evaluating():
            for batch in objective.micro_batches(adapted, rows, Progress(0, 1), tokens=limit):
                part, metrics = objective.loss_sum(adapted, batch)
                loss, right = loss + float(part), right + metrics["correct"]
                units += objective.units(batch)
        sums.append((loss, units, right))
    assert sums[1][0] == pytest.approx(sums[0][0], rel=1e-6)
    assert sums[1][1:] == sums[0][1:]
