"""The gradient step: all micro-batches of one optimizer step, on all processes, and the update.

The objective gives sums; they are divided by the units of the whole step, over micro-batches and processes, before
the backward pass. So a step's gradient does not depend on how its rows are split. `_micro_batches.py` makes the passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from lora_cli.adapters import Method
from lora_cli.errors import DivergedError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.objectives import Objective
from lora_cli.objectives._base import batch_tokens
from lora_cli.recipe.schema import Train
from lora_cli.runtime import order, schedule
from lora_cli.runtime.checkpoint import Checkpoints, State
from lora_cli.runtime.dist import Runtime
from lora_cli.runtime.log import Stopwatch
from lora_cli.runtime.optim import MasterAdamW
from lora_cli.stages import _spikes
from lora_cli.stages._activations import Activations
from lora_cli.stages._compilation import compile_layers
from lora_cli.stages._micro_batches import MicroBatches, Passes
from lora_cli.stages._sampled import step_metrics
from lora_cli.types import Examples, Item, Progress

MICRO_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
_NAMED = 5
"""Rows that a message names."""
_TRIAL_SHARE = 0.01
"""Part of a run's tokens up to which its longest passes are tried out on a CPU."""
_SURE = 0.25
"""Part of the room that a pass may be thought to need for nothing to be tried out on a CPU."""


class GradientStep:
    """One optimizer step over all processes, and what it needs to know from one to the next."""

    def __init__(
        self,
        settings: Train,
        model: AdaptedModel,
        method: Method,
        objective: Objective,
        examples: Examples,
        seed: int,
        rt: Runtime,
        log: Callable[[str], None],
    ) -> None:
        self.settings, self.model, self.method, self.objective = settings, model, method, objective
        self.examples, self.seed, self.rt, self.log = examples, seed, rt, log
        self.state = State()
        self.total = order.planned_steps(settings, len(self.examples), updates=objective.updates_per_rollout)
        self.warmup = schedule.warmup_steps(settings.warmup, self.total)
        self.tokens = batch_tokens(settings.micro_batch_tokens, model, at_most=MICRO_BATCH_TOKENS)
        """Tokens of a forward pass as the recipe has it."""
        self.optimizer = MasterAdamW(
            {},
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            eight_bit=settings.optimizer == "adamw_8bit",
            keep_masters=method.keep_masters,
            seed=seed,
        )
        self._follow_method()
        self.compiled = settings.compile and compile_layers(
            model, objective, examples, self.optimizer.zero_grad, log
        )
        activations = Activations(settings.activations, model, objective, rt.world_size, log)
        self.passes = MicroBatches(
            model, method, objective, examples, self.optimizer, activations, self.tokens, seed, rt, log
        )
        self.state.compiled = self.compiled

    def take(self) -> dict[str, float]:
        """Make one update and return the step's metrics; empty, with nothing changed, where a process is to stop.

        Raises:
            DivergedError: the loss or gradient norm is not finite, on any process; nothing was updated. Or too many
                steps in a row stood out.
            ResourceError: a single row does not fit into memory.
        """
        watch, state, rt = Stopwatch(), self.state, self.rt
        progress = Progress(state.step, self.total)
        mine = self._rows_of(state.step)
        batches = self.passes.split(mine, progress)
        counts = [sum(map(self.objective.units, batches)), self.objective.tokens(mine, batches)]
        units, tokens = rt.sum(counts)
        passes = self.passes.add_up(mine, batches, progress, max(units, 1.0))
        # The sum carries a NaN of any process to all of them, so all stop at the same step.
        loss, stopping, *watched = rt.sum([passes.loss, float(rt.stopping), *passes.watched])
        if stopping:
            self.optimizer.zero_grad()
            return {}
        told = step_metrics(self.objective, rt)
        rt.sum_tensors(self.optimizer.gradients())
        norm = self.optimizer.gradient_norm()
        if not (math.isfinite(loss) and math.isfinite(float(norm))):
            raise self._diverged(passes, max(units, 1.0), loss, float(norm))
        rate = self.learning_rate()
        if self._stands_out(loss, float(norm)):
            torch._foreach_zero_(self.optimizer.gradients())  # what the method does at a step may need some
        else:
            if self.settings.max_grad_norm is not None:
                self.optimizer.clip(norm, self.settings.max_grad_norm)
            self.optimizer.step(rate)
        self.method.after_step(self.optimizer, progress)
        self.optimizer.zero_grad()
        self._follow_method()
        self._agree_on_size()
        seconds = watch.lap()
        state.step += 1
        state.tokens += int(tokens)
        state.trained_tokens += int(units)
        state.seconds += seconds
        metrics = {
            "step": state.step,
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": float(norm),
            "tokens": state.tokens,
            "trained_tokens": state.trained_tokens,
            "tokens_per_second": tokens / seconds,
            **self._watched(loss, watched, max(units, 1.0)),
            **told,
        }
        return metrics | ({"skipped": state.skipped} if self.settings.skip_spikes is not None else {})

    def _watched(self, loss: float, sums: Sequence[float], units: float) -> dict[str, float]:
        """Return what the objective reports of a step beside its loss."""
        names = self.objective.watched
        if not names:
            return {}
        means = {name: value / units for name, value in zip(names, sums, strict=True)}
        scores = self.objective.scores({"loss": loss, **means})
        return {name: value for name, value in scores.items() if name != "loss"}

    def try_out(self) -> None:
        """Choose what the passes keep, and make the longest ones to come, so that one that does not fit into memory
        fails before the first update.

        On a CPU, where a pass costs what it costs in training, only if that is little of the run and the room may not
        do. No weight, count or random stream is changed.

        Raises:
            ResourceError: a single row does not fit.
        """
        state, batch_size, lengths = self.state, self.settings.batch_size, self.examples.lengths
        if state.step >= self.total:
            return
        each = self.objective.updates_per_rollout
        longest = each * order.step_of_longest(
            lengths, state.step // each, -(-self.total // each), batch_size=batch_size, seed=self.seed
        )
        rows = self._rows_of(longest)
        if rows:
            self.passes.settle_activations(rows, Progress(longest, self.total))
        costs = min(2 * self.passes.size.tokens, sum(row.tokens for _, row in rows))
        to_come = float(lengths.mean()) * batch_size * (self.total - state.step)
        doubtful = self.passes.activations.filled > _SURE and costs <= _TRIAL_SHARE * to_come
        if rows and (self.model.device.type != "cpu" or doubtful):
            self.passes.try_out(rows, Progress(longest, self.total))
        self._agree_on_size()

    def restore(self, checkpoints: Checkpoints, step: int) -> State:
        """Put method and optimizer where a checkpoint has them, and return its state.

        Raises:
            InputError: the checkpoint is missing, damaged, or was changed while it was read.
        """
        with checkpoints.opened(step) as (state, optimizer, method):
            self.method.load_state_dict(method)  # first: what is trained may depend on it
            self._follow_method()
            self.optimizer.load_state_dict(optimizer)
        self.objective.load_state_dict(checkpoints.objective_state(step))
        if state.compiled != self.compiled:
            was, now = ("compiled" if one else "plain" for one in (state.compiled, self.compiled))
            self.log(
                f"resume: warning: not bit-identical to a run in one piece: decoder layers {was} -> {now}"
            )
            state.compiled = self.compiled
        self.passes.size.tokens = min(self.tokens, state.micro_batch_tokens or self.tokens)
        return state

    def learning_rate(self) -> float:
        """Return the learning rate of the update about to be made."""
        settings = self.settings
        factor = schedule.multiplier(
            settings.schedule,
            self.state.step,
            total_steps=self.total,
            warmup=self.warmup,
            floor=settings.floor,
            decay=settings.decay,
            power=settings.power,
        )
        return settings.learning_rate * factor * self.method.schedule_factor(self.state.step)

    def _follow_method(self) -> None:
        """Have the optimizer update what the method trains now."""
        method, own = self.method, self.objective.trainable(self.model)
        trainable = {**method.trainable(self.model.model), **own}
        if not self.optimizer.updates(trainable):
            self.optimizer.set_parameters(
                trainable,
                rate_factors={name: method.rate_factor(name) for name in trainable if name not in own},
                undecayed={
                    name
                    for name, parameter in trainable.items()
                    if name in own or not method.decays(name, parameter)
                },
            )

    def _rows_of(self, step: int) -> list[tuple[int, Item]]:
        """Return this process' rows of a step."""
        rows = order.rows_of_step(
            step // self.objective.updates_per_rollout,
            num_rows=len(self.examples),
            batch_size=self.settings.batch_size,
            seed=self.seed,
        )
        return [(row, self.examples[row]) for row in rows[self.rt.rank :: self.rt.world_size]]

    def _agree_on_size(self) -> None:
        """Make the passes of all processes as small as those of the one with the least room, and remember it."""
        size = self.passes.size
        size.tokens = int(min(tokens for (tokens,) in self.rt.gather([size.tokens])))
        self.state.micro_batch_tokens = size.tokens if size.tokens < self.tokens else None

    def _stands_out(self, loss: float, norm: float) -> bool:
        """Say whether the step is a spike that the recipe wants skipped, and keep count."""
        if self.settings.skip_spikes is None:
            return False
        found = _spikes.skip(self.state, loss, norm, self.settings.skip_spikes)
        if found:
            self.log(
                f"step {self.state.step + 1:>6}  skipped: loss {loss:.4f}, gradient norm {norm:.3f},"
                f" {found:.1f} standard deviations above the steps before"
            )
        return found > 0

    def _diverged(self, passes: Passes, units: float, loss: float, norm: float) -> DivergedError:
        """Return the fault of a step that is not finite, which names the rows of the micro-batch that it came from."""
        suspect = self.passes.not_finite(passes, self.state.step, units)
        rows = sorted(suspect.rows) if suspect is not None else []
        named = [float(row) for row in rows[:_NAMED]]
        told = self.rt.gather([len(rows), *named, *[0.0] * (_NAMED - len(named))])
        count, *first = next((one for one in told if one[0]), [0.0])
        where = "the sum of the micro-batches, each of which is finite"
        if count:
            names = [self.examples.where(int(row)) for row in first[: int(count)]]
            where = f"one of {int(count)} rows: {', '.join(names)}" + ", ..." * (count > _NAMED)
        return DivergedError(
            f"step {self.state.step + 1}: the loss is {loss:g} and the gradient norm {norm:g}, from {where};"
            " the update was not applied (lower train.learning_rate, or look at these rows)"
        )
