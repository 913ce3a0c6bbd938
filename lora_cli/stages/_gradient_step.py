"""The gradient step: all micro-batches of one optimizer step, on all processes, and the update.

The objective gives sums; they are divided by the units of the whole step, over micro-batches and processes, before
the backward pass. So a step's gradient does not depend on how its rows are split.
"""

from __future__ import annotations

import math

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
from lora_cli.seeding import stream_seed
from lora_cli.types import Batch, Examples, Progress

MICRO_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}


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
    ) -> None:
        self.settings, self.model, self.method, self.objective = settings, model, method, objective
        self.examples, self.seed, self.rt = examples, seed, rt
        self.state = State()
        self.total = order.total_steps(
            len(self.examples), settings.batch_size, epochs=settings.epochs, max_steps=settings.max_steps
        )
        self.warmup = schedule.warmup_steps(settings.warmup, self.total)
        self.tokens = batch_tokens(settings.micro_batch_tokens, model, at_most=MICRO_BATCH_TOKENS)
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

    def take(self) -> dict[str, float]:
        """Make one update and return the step's metrics.

        Raises:
            DivergedError: the loss or gradient norm is not finite, on any process; nothing was updated.
        """
        watch, state, rt = Stopwatch(), self.state, self.rt
        rows = order.rows_of_step(
            state.step, num_rows=len(self.examples), batch_size=self.settings.batch_size, seed=self.seed
        )
        progress = Progress(state.step, self.total)
        mine = [(row, self.examples[row]) for row in rows[rt.rank :: rt.world_size]]
        batches = self.objective.micro_batches(self.model, mine, progress, tokens=self.tokens)
        counts = [sum(map(self.objective.units, batches)), sum(len(example.input_ids) for _, example in mine)]
        units, tokens = rt.sum(counts)
        loss, suspect = self._backward(batches, max(units, 1.0))
        rt.sum_tensors(self.optimizer.gradients())
        # The sum carries a NaN of any process to all of them, so all stop at the same step.
        (loss,) = rt.sum([loss])
        norm = self.optimizer.gradient_norm()
        if not (math.isfinite(loss) and math.isfinite(float(norm))):
            where = "the gradient, or another process' rows"
            if suspect:
                first = [self.examples.where(row) for row in sorted(suspect.rows)[:5]]
                where = f"one of {len(suspect.rows)} rows: {', '.join(first)}" + ", ..." * (
                    len(suspect.rows) > 5
                )
            raise DivergedError(
                f"step {state.step + 1}: the loss is {loss:g} and the gradient norm {float(norm):g}, from {where};"
                " the update was not applied (lower train.learning_rate, or look at these rows)"
            )
        if self.settings.max_grad_norm is not None:
            self.optimizer.clip(norm, self.settings.max_grad_norm)
        rate = self.learning_rate()
        self.optimizer.step(rate)
        self.method.after_step(self.optimizer, progress)
        self.optimizer.zero_grad()
        self._follow_method()
        seconds = watch.lap()
        state.step += 1
        state.tokens += int(tokens)
        state.trained_tokens += int(units)
        state.seconds += seconds
        return {
            "step": state.step,
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": float(norm),
            "tokens": state.tokens,
            "trained_tokens": state.trained_tokens,
            "tokens_per_second": tokens / seconds,
        }

    def restore(self, checkpoints: Checkpoints, step: int) -> State:
        """Put method and optimizer where a checkpoint has them, and return its state.

        Raises:
            InputError: the checkpoint is missing or damaged.
        """
        state, optimizer, method = checkpoints.load(step)
        self.method.load_state_dict(method)  # first: what is trained may depend on it
        self._follow_method()
        self.optimizer.load_state_dict(optimizer)
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
        method, trainable = self.method, self.method.trainable(self.model.model)
        if not self.optimizer.updates(trainable):
            self.optimizer.set_parameters(
                trainable,
                rate_factors={name: method.rate_factor(name) for name in trainable},
                undecayed={
                    name for name, parameter in trainable.items() if not method.decays(name, parameter)
                },
            )

    def _backward(self, batches: list[Batch], units: float) -> tuple[float, Batch | None]:
        """Add the gradients of this process; return its share of the mean loss, and a batch that is not finite."""
        self.model.model.train()
        total, suspect = 0.0, None
        for micro_step, batch in enumerate(batches):
            torch.manual_seed(stream_seed(self.seed, "dropout", self.state.step, micro_step, self.rt.rank))
            loss, _ = self.objective.loss_sum(self.model, batch)
            (loss / units).backward()
            value = float(loss.detach()) / units
            suspect = suspect if math.isfinite(value) else batch
            total += value
        penalty = self.method.penalty()
        if penalty is not None:
            # Every process adds the same term; its gradient must count once in the sum.
            (penalty / self.rt.world_size).backward()
        return total, suspect
