"""Learning-rate schedules as pure functions of the step.

Each returns a multiplier of the peak rate. `step` counts from 0 and is the update about to be made. Warm-up is linear
and never 0: PEFT's and transformers' first warm-up step trains with rate 0, ours with 1 / (warmup + 1).
"""

from __future__ import annotations

import math


def warmup_steps(warmup: int | float, total_steps: int) -> int:
    """Return the warm-up in steps: an integer is a number of steps, a float a fraction of all steps."""
    if isinstance(warmup, int):
        return min(warmup, total_steps)
    return round(warmup * total_steps)


def multiplier(
    schedule: str,
    step: int,
    *,
    total_steps: int,
    warmup: int,
    floor: float = 0.0,
    decay: float = 0.2,
    power: float = 1.0,
) -> float:
    """Return the factor of the peak learning rate at `step`, in (0, 1]; it never falls below `floor` after warm-up."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    if schedule == "inverse_sqrt":
        # Continues the warm-up smoothly: 1 at its end, then 1/sqrt(step); without warm-up it starts at step 1.
        return max(floor, math.sqrt(max(warmup, 1) / max(step, 1)))
    remaining = max(total_steps - warmup, 1)
    done = min((step - warmup) / remaining, 1.0)
    if schedule == "wsd":
        # Warm-up, stable, decay (arXiv 2404.06395, section 4): linear over the last `decay` part of all steps.
        decay_steps = min(max(round(decay * total_steps), 1), remaining)
        left = min((total_steps - step) / decay_steps, 1.0)
        return floor + (1.0 - floor) * max(left, 0.0)
    shape = {
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),  # arXiv 1608.03983, eq. 5
        "polynomial": (1.0 - done) ** power,
    }[schedule]
    return floor + (1.0 - floor) * shape
