"""Stage 3: the loop. It decides when to log, evaluate, save and stop; `_gradient_step.py` makes each update.

Everything random is a function of (seed, step), so a run that continues from a checkpoint repeats nothing and skips
nothing.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lora_cli.adapters import Method
from lora_cli.errors import Stopped
from lora_cli.models.adapted import AdaptedModel
from lora_cli.objectives import Objective
from lora_cli.objectives._heldout import heldout_sums
from lora_cli.recipe.schema import Train
from lora_cli.runtime.checkpoint import Checkpoints, exports_best
from lora_cli.runtime.dist import Runtime
from lora_cli.runtime.log import Log
from lora_cli.runtime.run_folder import CHECKPOINTS
from lora_cli.stages._gradient_step import GradientStep
from lora_cli.types import Examples, Prepared, Trained


def run(
    settings: Train,
    model: AdaptedModel,
    method: Method,
    objective: Objective,
    prepared: Prepared,
    folder: Path,
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
        DivergedError: a loss or gradient is not finite; the update was not applied.
        Stopped: SIGINT or SIGTERM came; a checkpoint was written.
    """
    assert prepared.train is not None
    step = GradientStep(settings, model, method, objective, prepared.train, seed, rt)
    checkpoints = Checkpoints(folder / CHECKPOINTS, keep=settings.keep_checkpoints)
    if resume_step is not None:
        step.state = step.restore(checkpoints, resume_step)
        rt.in_main(lambda: checkpoints.prune(step.state))
    state, total, keep_best = step.state, step.total, exports_best(settings)

    def save() -> None:
        rt.in_main(lambda: checkpoints.save(state, step.optimizer, method.state_dict(), facts))

    def out_of_patience() -> bool:
        return settings.early_stopping is not None and state.evaluations_since_best >= settings.early_stopping

    log.open_metrics(folder, keep_steps=state.step)
    log.start_progress(total, state.step)
    with rt.stoppable():
        while state.step < total and not out_of_patience():
            metrics = step.take()
            if state.step % settings.log_every == 0 or state.step in (1, total):
                _report(metrics, total, log)
            log.advance(state.step, _status(metrics))
            if settings.eval_every is not None and state.step % settings.eval_every == 0:
                improved = prepared.eval is not None and _evaluate(step, prepared.eval, log)
                if improved and keep_best:
                    save()
            stop = rt.stop_requested()
            ends = stop or state.step == total or out_of_patience()
            if ends or (settings.save_every is not None and state.step % settings.save_every == 0):
                save()
            if stop := stop or rt.stop_requested():
                raise Stopped(f"stopped by signal {stop} after step {state.step} of {total}, saved", stop)
    log.stop_progress()
    if keep_best and state.best_step is not None:
        step.restore(checkpoints, state.best_step)
    for line in method.report():
        log.line(line)
    rate = state.tokens / state.seconds if state.seconds else 0.0
    return Trained(state.step, state.tokens, state.trained_tokens, rate, state.best_step, out_of_patience())


def _evaluate(step: GradientStep, examples: Examples, log: Log) -> bool:
    """Log the held-out loss and keep count of the best; return whether this is it."""
    sums = heldout_sums(
        step.objective,
        step.model,
        examples,
        rank=step.rt.rank,
        world_size=step.rt.world_size,
        tokens=step.tokens,
    )
    total, units = step.rt.sum([sums["loss"], sums["units"]])
    loss, state = total / max(units, 1.0), step.state
    improved = math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss)
    if improved:
        state.best_loss, state.best_step, state.evaluations_since_best = loss, state.step, 0
    else:
        state.evaluations_since_best += 1
    log.metrics({"step": state.step, "eval_loss": loss})
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
