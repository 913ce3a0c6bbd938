"""Loss spikes: a step that stands out from those before it is not applied.

The rule is that of SkipStepAdamW in OLMo-core: loss or gradient norm more than k standard deviations above the mean of
the last 128 steps. We depart from it in one point: a skipped step does not join those, so that a second spike is
measured by the same rule. Hence a lasting rise would be skipped for ever, and ends the run instead.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from lora_cli.errors import DivergedError
from lora_cli.runtime.checkpoint import State

WINDOW = 128
"""Applied steps that a step is compared with."""
ENOUGH = 64
"""Steps before which nothing is skipped."""
IN_A_ROW = 10
"""Skipped steps after which the run ends."""


def deviations(value: float, before: Sequence[float]) -> float:
    """Return how many standard deviations `value` is above the mean of what came before; 0 of fewer than ENOUGH."""
    if len(before) < ENOUGH:
        return 0.0
    mean = statistics.fmean(before)
    # Values that are all but equal, as of rows that are learned by heart, have no spread to measure by.
    return (value - mean) / max(statistics.stdev(before, mean), 1e-3 * abs(mean), 1e-12)


def skip(state: State, loss: float, norm: float, most: float) -> float:
    """Judge a step and keep count in `state`; return by how many deviations it is to be skipped, 0 if it is applied.

    Raises:
        DivergedError: too many steps in a row were skipped.
    """
    found = max(deviations(loss, state.recent_losses), deviations(norm, state.recent_norms))
    if found <= most:
        state.recent_losses = [*state.recent_losses, loss][-WINDOW:]
        state.recent_norms = [*state.recent_norms, norm][-WINDOW:]
        state.skipped_in_a_row = 0
        return 0.0
    state.skipped += 1
    state.skipped_in_a_row += 1
    if state.skipped_in_a_row > IN_A_ROW:
        raise DivergedError(
            f"step {state.step + 1}: the loss is {loss:g} and the gradient norm {norm:g}, {found:.1f} standard"
            f" deviations above the steps before, as were the last {IN_A_ROW}; the update was not applied (lower"
            " train.learning_rate, or raise train.skip_spikes)"
        )
    return found
