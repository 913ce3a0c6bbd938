"""The five stages in order. READ THIS FIRST.

    prepare -> inject -> train -> evaluate -> export

Each stage is one file in `stages/` with one public `run`. Nothing is written before the data are prepared and the
adapter is injected, so bad input leaves nothing behind. Commands that leave stages out are in `without_training.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli import interrupts, objectives
from lora_cli.adapters import Method, Start
from lora_cli.data.chosen_tokens import require_used
from lora_cli.models.adapted import AdaptedModel
from lora_cli.objectives import Objective
from lora_cli.recipe.dump import dump_recipe
from lora_cli.recipe.gates import Gate, check_gates
from lora_cli.recipe.schema import Recipe
from lora_cli.runtime import order, report
from lora_cli.runtime.checkpoint import Checkpoints, require_best
from lora_cli.runtime.dist import Runtime
from lora_cli.runtime.fingerprints import fingerprints, machine, versions
from lora_cli.runtime.log import Log
from lora_cli.runtime.resume import find_finished, find_step
from lora_cli.runtime.run_folder import CHECKPOINTS, EXPORTS, RunFolder
from lora_cli.runtime.session import started, timed
from lora_cli.stages import _opened as opened
from lora_cli.stages import _space, export, inject, prepare
from lora_cli.stages import evaluate as evaluate_stage
from lora_cli.stages import train as train_stage
from lora_cli.stages._companions import Companions, name_of_base
from lora_cli.stages._win_rate import Referee, referee_of
from lora_cli.types import Prepared


@dataclass(frozen=True)
class _Job:
    """A run whose rows are prepared."""

    recipe: Recipe
    """As the adapter that it starts from settles it."""
    folder: RunFolder
    base: Path
    start: Start | None
    tokenizer: Any
    """The base's, with the recipe's new tokens; `prepared` has it with the template."""
    prepared: Prepared
    objective: Objective
    referee: Referee | None
    facts: dict[str, str]
    """Fingerprints of what it is made of besides the recipe."""


def train(
    recipe: Recipe,
    *,
    resume: bool | None = None,
    overwrite: bool = False,
    gates: Sequence[Gate] = (),
    allow: Sequence[str] = (),
) -> dict[str, Any]:
    """Run the whole recipe and return the summary, which also stands in summary.json.

    An unfinished run is gone on with, unless `resume` is False; with True a finished one that now asks for more is,
    too. `allow` are keys that may differ from those of the checkpoint.

    Raises:
        LoraError: see `errors.py`; its exit code says which kind of fault it is.
    """
    folder, seconds = RunFolder(Path(recipe.run.output).expanduser()), dict[str, float]()
    with started(recipe.run) as (rt, log), folder.lock:
        rt.in_main(folder.hold)
        goes_on = folder.is_run() and resume is not False and not overwrite
        with timed(seconds, "prepare"):
            job = _open(recipe, folder, rt, log)
        recipe = job.recipe
        finished = None if overwrite else find_finished(folder, recipe, job.facts, resume=resume is True)
        if finished is not None:
            log.line(f"{folder.path}: finished already, nothing to do (--overwrite trains it again)")
            check_gates(gates, finished["eval"]["tuned"])
            return finished
        total, step = _total_steps(recipe, job), None
        checkpoints = Checkpoints(folder.path / CHECKPOINTS, keep=recipe.train.keep_checkpoints)
        if goes_on:
            here = versions() | machine(rt)
            step = find_step(folder, checkpoints, recipe, job.facts, here, total, log.line, allow=allow)
        with timed(seconds, "inject"):
            model, method = _inject(job, total, checkpoints, step, rt, log)
        made_of = _begin(job, model, method, total, step, rt)
        with timed(seconds, "train"):
            trained = train_stage.run(
                recipe.train, model, method, job.objective, job.prepared, folder.path, checkpoints,
                seed=recipe.run.seed, resume_step=step, rt=rt, log=log,
                facts={"recipe": recipe.resolved(), "machine": machine(rt), **made_of},
            )  # fmt: skip
        for name in job.prepared.changed():
            log.line(f"warning: {name}: was changed while the run trained on what it held before")
        with timed(seconds, "evaluate"):
            scores = evaluate_stage.run(
                recipe.evaluate, model, job.objective, job.prepared,
                rt=rt, log=log, folder=folder.path, referee=job.referee,
            )  # fmt: skip
        trainable = _trainable(job, model, method)
        summary = report.summarize(recipe, trainable, job.facts, job.prepared, trained, scores)
        with timed(seconds, "export"):
            card = report.model_card(summary, recipe)
            differences = _export(job, model, method, made_of, card, rt, log)
        summary = report.complete(summary, differences, seconds, rt.device)
        if rt.is_main:
            folder.write_summary(summary)
        log.line(f"done: {folder.path}, {sum(seconds.values()):.0f} s")
        check_gates(gates, scores.tuned)
        return summary


def _open(recipe: Recipe, folder: RunFolder, rt: Runtime, log: Log) -> _Job:
    base = opened.base(recipe, log.line)
    recipe, start = opened.settle_start(recipe, base)
    tokenizer = opened.tokenizer_for(recipe, base)
    prepared = _prepare(recipe, tokenizer, rt, log)
    objective = opened.objective(recipe, prepared, rt, log.line)
    if start:
        opened.begin_from(start, objective)
    facts = fingerprints(prepared, base, start.fingerprint() if start else None) | objective.contents()
    referee = referee_of(recipe, prepared, folder.path, rt, log)
    return _Job(recipe, folder, base, start, tokenizer, prepared, objective, referee, facts)


def _inject(
    job: _Job, total: int, checkpoints: Checkpoints, step: int | None, rt: Runtime, log: Log
) -> tuple[AdaptedModel, Method]:
    recipe = job.recipe
    model, method = inject.run(
        job.base, recipe.model.dtype, recipe.adapter, job.prepared,
        start=job.start, keeps_start=job.objective.needs_reference,
        quantization=opened.quantization(recipe), packing=recipe.data.packing,
        total_steps=total, max_length=recipe.data.max_length,
        max_generated=max(
            evaluate_stage.plan(recipe.evaluate, job.prepared), job.objective.require_rows(job.prepared)
        ),
        batch_size=recipe.train.batch_size, seed=recipe.run.seed,
        resumed=lambda: None if step is None else checkpoints.method_state(step), rt=rt, log=log.line,
    )  # fmt: skip
    scores = job.objective.has_score_head
    export.require_expressible(recipe.export_formats(), model, method, scores=scores)
    return model, method


def _trainable(job: _Job, model: AdaptedModel, method: Method) -> int:
    """Return how many parameters are trained."""
    weights = {**method.trainable(model.model), **job.objective.trainable(model)}
    return sum(parameter.numel() for parameter in weights.values())


def _begin(
    job: _Job, model: AdaptedModel, method: Method, total: int, step: int | None, rt: Runtime
) -> dict[str, Any]:
    """Make the folder that of this run, where all of it fits; return what stands in the manifests of what it writes."""
    recipe, folder, goes_on = job.recipe, job.folder, step is not None
    # All processes meet here, so that none looks for a checkpoint after the main one has begun to write.
    rt.in_main(
        lambda: _space.require_for_run(recipe, folder, job.base, model, method, total, goes_on=goes_on)
    )
    with interrupts.deferred():  # half-way through, a folder is neither the old run's nor a new one's
        rt.in_main(lambda: folder.begin(dump_recipe(recipe), fresh=not goes_on))
    # The recipe's file is the main process' alone: the others may be on another disk.
    recipe_sha256 = folder.recipe_sha256() if rt.is_main else ""
    return {"recipe_sha256": recipe_sha256, **job.facts, "versions": versions()}


def _export(
    job: _Job,
    model: AdaptedModel,
    method: Method,
    made_of: dict[str, Any],
    card: str,
    rt: Runtime,
    log: Log,
) -> dict[str, Any]:
    if not rt.is_main:
        return {}
    recipe, prepared, path = job.recipe, job.prepared, job.folder.path
    targets = {form: path / EXPORTS[form] for form in recipe.export_formats()}
    merge_with = f"lora-merge {path} --output DIR"
    if "peft" not in targets:
        merge_with = "lora-train --resume with export.formats=[merged]"
    beside = Companions(
        base=job.base, base_name=name_of_base(recipe, job.base), revision=recipe.model.revision,
        stop_ids=prepared.stop_ids, card=card, facts=made_of,
        tokenizer=job.tokenizer if recipe.chosen_tokens()[1] else None,
        chat_template=opened.chat_template(job.tokenizer, prepared.tokenizer),
    )  # fmt: skip
    return export.run(
        targets, model, method, beside,
        settings=recipe.export, sample=prepared.sample(), merge_with=merge_with,
        score=job.objective.score_head(), log=log.line,
    )  # fmt: skip


def _prepare(recipe: Recipe, tokenizer: Any, rt: Runtime, log: Log) -> Prepared:
    on, spelled = recipe.train_on(), opened.named_tokens(recipe)
    kinds = objectives.consumes(recipe.objective)
    prepared = prepare.run(recipe.data, on, tokenizer, rt, log.line, spelled=spelled, consumes=kinds)
    require_used(prepared, spelled)
    return prepared


def _total_steps(recipe: Recipe, job: _Job) -> int:
    """Return the optimizer steps of the run.

    Raises:
        InputError: the best weights are asked for, and no held-out loss would be taken.
    """
    assert job.prepared.train is not None
    updates = job.objective.updates_per_rollout
    total = order.planned_steps(recipe.train, len(job.prepared.train), updates=updates)
    require_best(recipe.train, total)
    return total
