"""The order of rows is a function of seed and step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.runtime.order import rows_of_step, steps_per_epoch, total_steps


@given(
    num_rows=st.integers(1, 200),
    batch_size=st.integers(1, 50),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
def test_an_epoch_is_a_permutation(num_rows: int, batch_size: int, seed: int, epoch: int) -> None:
    """The steps of an epoch hold every row exactly once, and only the last may be short."""
    per_epoch = steps_per_epoch(num_rows, batch_size)
    steps = [
        rows_of_step(epoch * per_epoch + index, num_rows=num_rows, batch_size=batch_size, seed=seed)
        for index in range(per_epoch)
    ]
    assert sorted(row for rows in steps for row in rows) == list(range(num_rows))
    assert all(len(rows) == batch_size for rows in steps[:-1])


def test_epochs_and_seeds_differ() -> None:
    """Another epoch and another seed give another order; the same ones give the same."""
    settings = {"num_rows": 100, "batch_size": 100}
    assert rows_of_step(0, seed=0, **settings) == rows_of_step(0, seed=0, **settings)
    assert rows_of_step(0, seed=0, **settings) != rows_of_step(1, seed=0, **settings)
    assert rows_of_step(0, seed=0, **settings) != rows_of_step(0, seed=1, **settings)


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"),
    [(1.0, None, 4), (2.0, None, 8), (0.5, None, 2), (0.01, None, 1), (3.0, 5, 5), (0.3, None, 2)],
)
def test_total_steps(epochs: float, max_steps: int | None, expected: int) -> None:
    """10 rows in batches of 3 make 4 steps an epoch; a part of a step counts as one; max_steps wins."""
    assert total_steps(10, 3, epochs=epochs, max_steps=max_steps) == expected
