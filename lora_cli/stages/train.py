"""Stage 3: the loop. It decides when to log, evaluate, save and stop; `_gradient_step.py` makes each update.

Everything random is a function of (seed, step), so a run that continues from a checkpoint repeats nothing and skips
nothing. A signal is heeded between two passes: what the step in progress has added up is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_cli import interrupts
from lora_cli.adapters import Method
from lora_cli.errors import Stopped
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.memory import PassSize
from lora_cli.objectives import Objective
from lora_cli.objectives._heldout import heldout_sums
from lora_cli.recipe.schema import Train
from lora_cli.runtime.checkpoint import Checkpoints, State, exports_best
from lora_cli.runtime.dist import Runtime
from lora_cli.runtime.log import Log
from lora_cli.stages._gradient_step import GradientStep
from lora_cli.stages._micro_batches import REMEDY
from lora_cli.stages._sampled import joined_state, new_lines
from lora_cli.types import Examples, Prepared, Trained


def run(
    settings: Train,
    model: AdaptedModel,
    method: Method,
    objective: Objective,
    prepared: Prepared,
    folder: Path,
    checkpoints: Checkpoints,
    *,
    seed: int,
    resume_step: int | None,
    facts: dict[str, Any],
    rt: Runtime,
    log: Log,
) -> Trained:
    """Train until the last step, early stopping or a signal, and leave the final weights in `model`.

    `facts` (recipe, fingerprints of data and base) stand in every checkpoint, for the one who resumes from it.

    Raises:
        DivergedError: a loss or gradient is not finite, or too many steps stood out; the update was not applied.
        ResourceError: one row does not fit into memory, or the checkpoint onto the disk.
        Stopped: SIGINT or SIGTERM came; the last step made is in a checkpoint.
    """
    assert prepared.train is not None
    step = GradientStep(settings, model, method, objective, prepared.train, seed, rt, log.line)
    if resume_step is not None:
        step.state = step.restore(checkpoints, resume_step)
        rt.in_main(lambda: checkpoints.prune(step.state))
    state, keep_best = step.state, exports_best(settings)
    saved: dict[str, Any] = asdict(state)

    def save() -> None:
        nonlocal saved
        if state.step and asdict(state) != saved:
            kept = joined_state(objective, state.step, rt)
            rt.in_main(lambda: checkpoints.save(state, step.optimizer, method.state_dict(), facts, kept))
            saved = asdict(state)

    with interrupts.deferred():
        log.open_metrics(folder, keep_steps=state.step)
        log.start_progress(step.total, state.step)
        step.try_out()
        _take_steps(settings, step, prepared.eval, save, log)
    log.stop_progress()
    if keep_best and state.best_step is not None:
        step.restore(checkpoints, state.best_step)
    for line in method.report():
        log.line(line)
    return _trained(state, stopped_early=_out_of_patience(settings, state))


def _take_steps(
    settings: Train, step: GradientStep, heldout: Examples | None, save: Callable[[], None], log: Log
) -> None:
    """Make the steps that are left, and between them what is due; `save` writes what is not in a checkpoint yet."""
    state, rt, total = step.state, step.rt, step.total
    heldout_size = PassSize(step.tokens, "train.micro_batch_tokens", REMEDY, log.line)
    while True:
        if heldout is not None and _evaluation_is_due(settings, state):
            improved = _evaluate(step, heldout, heldout_size, log)
            if improved and exports_best(settings):
                save()
        stop = rt.stop_requested()
        ends = state.step == total or _out_of_patience(settings, state)
        if stop or ends or (settings.save_every is not None and state.step % settings.save_every == 0):
            save()
        if stop := stop or rt.stop_requested():
            raise Stopped(_stopped(stop, state, total), stop)
        if ends:
            return
        metrics = step.take()
        if metrics:
            log.rollouts(new_lines(step.objective, rt))
            if state.step % settings.log_every == 0 or state.step in (1, total):
                _report(metrics, total, log)
            log.advance(state.step, _status(metrics))


def _out_of_patience(settings: Train, state: State) -> bool:
    return settings.early_stopping is not None and state.evaluations_since_best >= settings.early_stopping


def _trained(state: State, *, stopped_early: bool) -> Trained:
    return Trained(
        steps=state.step,
        tokens=state.tokens,
        trained_tokens=state.trained_tokens,
        tokens_per_second=state.tokens / state.seconds if state.seconds else 0.0,
        best_step=state.best_step,
        stopped_early=stopped_early,
        skipped=state.skipped,
    )


def _evaluation_is_due(settings: Train, state: State) -> bool:
    every = settings.eval_every
    return every is not None and state.step > state.evaluated_step and state.step % every == 0


def _stopped(number: int, state: State, total: int) -> str:
    if not state.step:
        return f"stopped by signal {number} in the first step of {total}, there is nothing to save"
    return f"stopped by signal {number} after step {state.step} of {total}, saved"


def _evaluate(step: GradientStep, examples: Examples, size: PassSize, log: Log) -> bool:
    """Log the held-out loss and keep count of the best; return whether this is it.

    Where a process is to stop meanwhile, nothing is counted, and the step stays one that is due.
    """
    rt, state = step.rt, step.state
    sums = heldout_sums(
        step.objective,
        step.model,
        examples,
        rank=rt.rank,
        world_size=rt.world_size,
        size=size,
        stopping=lambda: rt.stopping,
    )
    total, units, stopping = rt.sum([sums["loss"], sums["units"], float(rt.stopping)])
    if stopping:
        return False
    loss, state.evaluated_step = total / max(units, 1.0), state.step
    improved = math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss)
    if improved:
        state.best_loss, state.best_step, state.evaluations_since_best = loss, state.step, 0
    else:
        state.evaluations_since_best += 1
    log.metrics({"step": state.step, "eval_loss": loss if math.isfinite(loss) else None})
    log.line(f"step {state.step:>6}  held-out loss {loss:.4f}{'  (best)' if improved else ''}")
    return improved


def _report(metrics: dict[str, float], total: int, log: Log) -> None:
    log.metrics(metrics)
    log.line(f"step {metrics['step']:>6}/{total}  {_status(metrics)}")


def _status(metrics: dict[str, float]) -> str:
    return (
        f"loss {metrics['loss']:.4f}  lr {metrics['learning_rate']:.2e}"
        f"  grad {metrics['grad_norm']:.3f}  {metrics['tokens_per_second']:,.0f} tokens/s"
    )
