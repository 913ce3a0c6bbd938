"""AdaLoRA's rank budget: how many triplets may stay at a step, and which are worth it (arXiv 2303.10512).

Sections are those of the paper. The cubic fall is written as PEFT has it, from `tinit` to the step where the ranks
are final, so that both ends are met exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_cli.errors import InputError


@dataclass(frozen=True, slots=True)
class Schedule:
    """When the budget falls, in steps counted from 0: after `tinit`, every `delta_t`, until `end`."""

    total_steps: int
    tinit: int
    tfinal: int
    delta_t: int

    @property
    def end(self) -> int:
        """The step after which the ranks are final."""
        return self.total_steps - self.tfinal


def settle_schedule(total_steps: int, tinit: int | None, tfinal: int | None, delta_t: int | None) -> Schedule:
    """Return the schedule of a run; null is 10 % of it before pruning, 30 % after it, 100 updates between.

    Raises:
        InputError: no step is left between tinit and tfinal, or delta_t is longer than what is left.
    """
    last = max(1, 3 * total_steps // 10) if tfinal is None else tfinal
    first = min(total_steps // 10, max(0, total_steps - last - 1)) if tinit is None else tinit
    if tfinal is None:
        last = max(1, min(last, total_steps - first - 1))
    room = total_steps - first - last
    if room < 1:
        key = "adapter.tinit" if tinit is not None else "adapter.tfinal"
        raise InputError(
            f"{key}: tinit {first} + tfinal {last} leave none of the run's {total_steps} steps to lower the ranks"
            " (their sum must be below the number of steps: lower them or train longer)"
        )
    if delta_t is not None and delta_t > room:
        raise InputError(
            f"adapter.delta_t: {delta_t} steps between budget updates, but the ranks fall over only {room} of the"
            f" run's {total_steps} steps, after tinit {first} and before tfinal {last} (use at most {room})"
        )
    return Schedule(total_steps, first, last, max(1, room // 100) if delta_t is None else delta_t)


def budget(step: int, schedule: Schedule, initial: int, target: int) -> int:
    """Return the number of triplets that stay at a step: `initial`, then a cubic fall to `target` (section 3.3)."""
    if step <= schedule.tinit:
        return initial
    if step >= schedule.end:
        return target
    rest = 1 - (step - schedule.tinit) / (schedule.end - schedule.tinit)
    return int(target + (initial - target) * rest**3)


class Importance:
    """Averages over steps of every weight's sensitivity, and of how uncertain it is (section 3.2)."""

    def __init__(self, beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.sensitivity: dict[str, Tensor] = {}
        self.uncertainty: dict[str, Tensor] = {}

    def observe(self, weights: Mapping[str, Tensor]) -> None:
        """Move the averages by one step, from weights after the update and the gradients that led to it."""
        if not self.sensitivity:
            self.sensitivity = {name: torch.zeros_like(weight) for name, weight in weights.items()}
            self.uncertainty = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        gradients = [weight.grad for weight in weights.values() if weight.grad is not None]
        assert len(gradients) == len(weights)
        sensitivity = [self.sensitivity[name] for name in weights]
        uncertainty = [self.uncertainty[name] for name in weights]
        now = torch._foreach_mul(list(weights.values()), gradients)
        torch._foreach_abs_(now)  # I = |w dL/dw|
        torch._foreach_mul_(sensitivity, self.beta1)
        torch._foreach_add_(sensitivity, now, alpha=1 - self.beta1)
        torch._foreach_sub_(now, sensitivity)
        torch._foreach_abs_(now)  # U = |I - its average|
        torch._foreach_mul_(uncertainty, self.beta2)
        torch._foreach_add_(uncertainty, now, alpha=1 - self.beta2)

    def score(self, right: str, entry: str, left: str) -> Tensor:
        """Return the score of each triplet, its entry's plus the means of its row's and its column's: (r,)."""
        a, e, b = (self.sensitivity[name] * self.uncertainty[name] for name in (right, entry, left))
        return e[:, 0] + a.mean(dim=1) + b.mean(dim=0)

    def forget(self) -> None:
        """Drop the averages, which nothing needs once the ranks are final."""
        self.sensitivity, self.uncertainty = {}, {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages as `<name>.{sensitivity,uncertainty}`."""
        state = {f"{name}.sensitivity": average for name, average in self.sensitivity.items()}
        return state | {f"{name}.uncertainty": average for name, average in self.uncertainty.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.forget()
        for key, average in state.items():
            name, _, kind = key.rpartition(".")
            {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty}[kind][name] = average
