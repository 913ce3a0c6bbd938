"""The five stages in order. READ THIS FIRST.

    prepare -> inject -> train -> evaluate -> export        `train`, the whole job
    prepare -> inject ----------> evaluate                  `evaluate`
               inject ----------------------> export        `merge`
    prepare -> describe                                     `describe_data`
               inject -> what was learned                   `inspect`

Each stage is one file in `stages/` with one public `run`. Nothing is written before the data are prepared and the
adapter is injected, so bad input leaves nothing behind.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lora_cli import failpoints, interrupts, objectives
from lora_cli.adapters import Method
from lora_cli.data.chosen_tokens import require_used
from lora_cli.data.render import settle_special_tokens
from lora_cli.data.templates import with_template
from lora_cli.errors import InputError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.load import (
    DTYPES,
    base_fingerprint,
    fastest_attention,
    load_model,
    tokenizer_folder,
)
from lora_cli.models.safety import check_model_folder, leads_out
from lora_cli.network import closed
from lora_cli.recipe.dump import dump_recipe
from lora_cli.recipe.gates import Gate, check_gates
from lora_cli.recipe.schema import Recipe
from lora_cli.runtime import dist, order, report
from lora_cli.runtime.checkpoint import exports_best
from lora_cli.runtime.dist import Runtime
from lora_cli.runtime.faults import resource_faults
from lora_cli.runtime.fingerprints import fingerprints, machine
from lora_cli.runtime.log import Log
from lora_cli.runtime.resume import find_finished, find_step, method_state
from lora_cli.runtime.run_folder import EXPORTS, RunFolder
from lora_cli.stages import _opened as opened
from lora_cli.stages import _space, describe, export, inject, prepare
from lora_cli.stages import evaluate as evaluate_stage
from lora_cli.stages import inspect as inspect_stage
from lora_cli.stages import train as train_stage
from lora_cli.types import Conversation, Example, Examples, Labelled, Pair, Prepared, Text


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
    folder = RunFolder(Path(recipe.run.output).expanduser())
    seconds: dict[str, float] = {}
    with _started(recipe) as (rt, log), folder.lock:
        rt.in_main(folder.hold)
        goes_on = folder.is_run() and resume is not False and not overwrite
        with _timed(seconds, "prepare"):
            base = opened.base(recipe, log.line)
            recipe, start = opened.settle_start(recipe, base)
            tokenizer = opened.tokenizer_for(recipe, base)
            prepared = _prepare(recipe, tokenizer, rt, log)
            objective = objectives.build(recipe.objective, pad_id=prepared.pad_id)
            facts = fingerprints(prepared, base, start.fingerprint() if start else None)
        finished = None if overwrite else find_finished(folder, recipe, facts, resume=resume is True)
        if finished is not None:
            log.line(f"{folder.path}: finished already, nothing to do (--overwrite trains it again)")
            check_gates(gates, finished["eval"]["tuned"])
            return finished

        total, made_on, step = _total_steps(recipe, prepared), machine(rt), None
        if goes_on:
            step = find_step(folder, recipe, facts, made_on, total, log.line, allow=allow)
        with _timed(seconds, "inject"):
            model, method = inject.run(
                base, recipe.model.dtype, recipe.adapter, prepared,
                start=start, quantization=opened.quantization(recipe), packing=recipe.data.packing,
                total_steps=total, max_length=recipe.data.max_length,
                max_generated=evaluate_stage.plan(recipe.evaluate, prepared),
                batch_size=recipe.train.batch_size, seed=recipe.run.seed,
                resumed=lambda: method_state(folder, recipe, step), rt=rt, log=log.line,
            )  # fmt: skip
        export.require_expressible(recipe.export_formats(), model, method)
        goes_on = step is not None
        rt.in_main(
            lambda: _space.require_for_run(recipe, folder, base, model, method, total, goes_on=goes_on)
        )
        rt.barrier()  # no process may look for a checkpoint after the main one has begun to write
        with interrupts.deferred():  # half-way through, a folder is neither the old run's nor a new one's
            rt.in_main(lambda: folder.begin(dump_recipe(recipe), fresh=not goes_on))
        # The recipe's file is the main process' alone: the others may be on another disk.
        made_of = {
            "recipe_sha256": folder.recipe_sha256() if rt.is_main else "",
            **facts,
            "versions": report.versions(),
        }
        with _timed(seconds, "train"):
            trained = train_stage.run(
                recipe.train, model, method, objective, prepared, folder.path,
                seed=recipe.run.seed, resume_step=step, rt=rt, log=log,
                facts={"recipe": recipe.resolved(), "machine": made_on, **made_of},
            )  # fmt: skip
        for name in prepared.changed():
            log.line(f"warning: {name}: was changed while the run trained on what it held before")
        with _timed(seconds, "evaluate"):
            scores = evaluate_stage.run(
                recipe.evaluate, model, objective, prepared, rt=rt, log=log, folder=folder.path
            )
        trainable = sum(parameter.numel() for parameter in method.trainable(model.model).values())
        summary = report.summarize(recipe, trainable, facts, prepared, trained, scores)
        with _timed(seconds, "export"):
            card = report.model_card(summary, recipe)
            targets = {form: folder.path / EXPORTS[form] for form in recipe.export_formats()}
            sample = _sample(prepared.eval or prepared.train)
            merge_with = f"lora-merge {folder.path} --output DIR"
            if "peft" not in targets:
                merge_with = "lora-train --resume with export.formats=[merged]"
            differences = _export(
                targets, recipe, base, model, method, made_of, prepared.stop_ids, card, rt, log, sample, merge_with,
                tokenizer if recipe.chosen_tokens()[1] else None, opened.chat_template(tokenizer, prepared.tokenizer),
            )  # fmt: skip

        summary = report.complete(summary, differences, seconds, rt.device)
        if rt.is_main:
            with interrupts.deferred():
                folder.write_summary(summary)
        log.line(f"done: {folder.path}, {sum(seconds.values()):.0f} s")
        check_gates(gates, scores.tuned)
        return summary


def evaluate(target: Path, recipe: Recipe, gates: Sequence[Gate] = ()) -> dict[str, Any]:
    """Score a run folder, a PEFT folder on `model.base`, or a plain model; return `{base: ..., tuned: ...}`."""
    if not recipe.data.holds_out():
        raise InputError("data.eval: no held-out rows to score on (give data.eval=FILE)")
    with _started(recipe) as (rt, log):
        adapter, base = opened.locate(target, recipe, log.line)
        log.line(f"evaluating {adapter or base}" + (f" on {recipe.model.base}" if adapter else ""))
        tokenizer, _ = opened.tokenizer_of(adapter, base)
        prepared = _held_out(recipe, tokenizer, adapter, rt, log)
        objective = objectives.build(recipe.objective, pad_id=prepared.pad_id)
        generated = evaluate_stage.plan(recipe.evaluate, prepared)
        attention = fastest_attention(rt.device, recipe.data.max_length)
        dtype, quantization = DTYPES[recipe.model.dtype], opened.quantization(recipe)
        model = load_model(
            base, dtype=dtype, device=rt.device, attention=attention, quantization=quantization
        )
        layers = opened.load_adapter(adapter, base, model).placed() if adapter is not None else {}
        inject.check_rows_fit(model, prepared, max_generated=generated)
        packs = inject.settle_packing(model, recipe.data.packing, log.line)
        head = inject.settle_head(model, packs, log.line)
        scores = evaluate_stage.run(
            recipe.evaluate, AdaptedModel(model, layers, packs=packs, head=head), objective, prepared,
            rt=rt, log=log, with_base=adapter is not None,
        )  # fmt: skip
        check_gates(gates, scores.tuned)
        return {"base": scores.base, "tuned": scores.tuned}


def describe_data(recipe: Recipe, *, show: int = 0, rows: Sequence[str] = ()) -> dict[str, Any]:
    """Return what training would be fed: counts, lengths, findings, and rows token by token; no weights are read.

    `show` training rows are shown, and those that `rows` names as `file:line`.
    """
    with _started(recipe) as (rt, log):
        block = recipe.model
        folder, config = tokenizer_folder(block.base, block.revision, runs_code=block.trust_remote_code)
        recipe, _ = opened.settle_start(recipe, None)
        tokenizer, named = opened.tokenizer_for(recipe, folder), opened.named_tokens(recipe)
        every = (Conversation, Text, Pair, Labelled)
        prepared = prepare.run(
            recipe.data, recipe.objective.train_on, tokenizer, rt, log.line, consumes=every, spelled=named
        )
        refusals: list[str] = []
        for check in (lambda: require_used(prepared, named), lambda: _total_steps(recipe, prepared)):
            try:
                check()
            except InputError as error:
                refusals += error.lines
        objective = objectives.build(recipe.objective, pad_id=prepared.pad_id)
        return describe.run(
            recipe, prepared, config, consumes=objective.consumes, device=rt.device.type, refusals=refusals,
            show=show, rows=rows,
        )  # fmt: skip


def merge(
    target: Path, output: Path, recipe: Recipe, dtype: str | None = None, form: str = "merged"
) -> dict[str, Any]:
    """Write the base with the adapter of `target` in its weights to `output`; return the folder and the difference.

    With the form `portable` the adapter alone is written, as a plain LoRA of one rank.
    """
    output = output.expanduser()
    with _started(recipe) as (rt, log):
        adapter, base = opened.locate(target, recipe, log.line)
        if adapter is None:
            raise InputError(f"{target}: has no adapter to merge (it is a plain model already)")
        if output.exists():
            raise InputError(f"{output}: exists already (choose another folder or remove it)")
        log.line(f"merging {adapter} into {recipe.model.base}")
        own, has_new = opened.tokenizer_of(adapter, base)
        sample = _held_out_sample(recipe, own, adapter, rt, log) if form == "merged" else []
        model = load_model(
            base,
            dtype=DTYPES[dtype or recipe.model.dtype],
            device=rt.device,
            quantization=opened.quantization(recipe),
        )
        method = opened.load_adapter(adapter, base, model)
        tokenizer = with_template(own, recipe.data.template, adapter)
        _, stop_ids = settle_special_tokens(tokenizer, recipe.data.template)
        card = adapter / "README.md"
        has_card = card.is_file() and not leads_out(
            card, adapter
        )  # a link could publish any file of this machine
        text = card.read_text(encoding="utf-8") if has_card else f"# {adapter.name}, {form}\n"
        adapted = AdaptedModel(model, method.placed())
        _space.require_for_export(form, recipe.export, output, base, adapted, method)
        made_of = {"model.base": base_fingerprint(base), "versions": report.versions()}
        merge_with = f"lora-merge {target} --output DIR"
        if not RunFolder(target).is_run():
            merge_with += f" model.base={recipe.model.base}"
        differences = _export(
            {form: output}, recipe, base, adapted, method, made_of, stop_ids, text, rt, log, sample, merge_with,
            own if has_new else None, opened.chat_template(own, tokenizer),
        )  # fmt: skip
        return {"output": str(output), "max_logit_difference": differences.pop(form), **differences}


def inspect(target: Path, recipe: Recipe) -> dict[str, Any]:
    """Return where the adaptation of a run, a PEFT folder or a model went, and whether its ranks fit."""
    with _started(recipe) as (rt, log):
        adapter, folder = opened.locate(target, recipe, log.line)
        base = folder if adapter is not None else opened.base(recipe, log.line)
        settings = recipe.adapter if RunFolder(target).is_run() else None
        source: Method | PreTrainedModel
        if adapter is not None:
            dtype, quantization = DTYPES[recipe.model.dtype], opened.quantization(recipe)
            model = load_model(base, dtype=dtype, device=rt.device, quantization=quantization)
            source = opened.load_adapter(adapter, base, model)
        else:
            # Both as the model's files have it: a base in float32 was rounded as well before a bfloat16 run.
            runs_code = recipe.model.trust_remote_code
            header = check_model_folder(folder, runs_code=runs_code)
            dtype = DTYPES["bfloat16" if header.dtypes == ("BF16",) else "float32"]
            model, source = (load_model(one, dtype=dtype, device=rt.device) for one in (base, folder))
        log.line(f"inspecting {adapter or folder} on {recipe.model.base}")
        found = inspect_stage.run(source, model, settings)
        return {"target": str(target), "base": recipe.model.base, "quantize": recipe.quantization(), **found}


def _sample(examples: Examples | None) -> list[Example]:
    """Return the rows that a merged model of a quantized base is measured on."""
    return [examples[row] for row in range(min(16, len(examples)))] if examples is not None else []


def _held_out_sample(recipe: Recipe, tokenizer: Any, adapter: Path, rt: Runtime, log: Log) -> list[Example]:
    """Return held-out rows for a merge that is measured; none where they are not wanted or no longer there."""
    if recipe.quantization() == "none" or not recipe.data.holds_out():
        return []
    try:
        return _sample(_held_out(recipe, tokenizer, adapter, rt, log).eval)
    except InputError as error:
        log.line(f"merge: the held-out rows cannot be read: {error.lines[0]}")
        return []


def _prepare(recipe: Recipe, tokenizer: Any, rt: Runtime, log: Log) -> Prepared:
    on, spelled = recipe.objective.train_on, opened.named_tokens(recipe)
    prepared = prepare.run(recipe.data, on, tokenizer, rt, log.line, spelled=spelled)
    require_used(prepared, spelled)
    return prepared


def _held_out(recipe: Recipe, tokenizer: Any, adapter: Path | None, rt: Runtime, log: Log) -> Prepared:
    on, spelled = recipe.objective.train_on, opened.named_tokens(recipe)
    return prepare.run(
        recipe.data, on, tokenizer, rt, log.line, need_train=False, spelled=spelled, adapter=adapter
    )


def _total_steps(recipe: Recipe, prepared: Prepared) -> int:
    """Return the optimizer steps of the run.

    Raises:
        InputError: the best weights are asked for, and no held-out loss would be taken.
    """
    assert prepared.train is not None
    rows, plan = len(prepared.train), recipe.train
    total = order.total_steps(rows, plan.batch_size, epochs=plan.epochs, max_steps=plan.max_steps)
    if exports_best(plan) and (plan.eval_every or 0) > total:
        raise InputError(
            f"train.eval_every: {plan.eval_every} is more than the run's {total} steps, so no weights would be"
            " the best (lower it)"
        )
    return total


def _export(
    targets: dict[str, Path],
    recipe: Recipe,
    base: Path,
    model: AdaptedModel,
    method: Method,
    made_of: dict[str, Any],
    stop_ids: Sequence[int],
    card: str,
    rt: Runtime,
    log: Log,
    sample: Sequence[Example],
    merge_with: str,
    tokenizer: Any | None,
    chat_template: str | None,
) -> dict[str, Any]:
    """Export in the one process that writes; return the logit difference of each format after it was read back."""
    if not rt.is_main:
        return {}
    # PEFT finds the base again by a hub id as it is, or by a local folder's absolute path.
    local = recipe.model.base == "tiny" or Path(recipe.model.base).expanduser().exists()
    return export.run(
        targets, model, method,
        base=base, base_name=str(base.resolve()) if local else recipe.model.base, revision=recipe.model.revision,
        stop_ids=stop_ids, card=card, facts=made_of, settings=recipe.export,
        tokenizer=tokenizer, chat_template=chat_template, sample=sample, merge_with=merge_with, log=log.line,
    )  # fmt: skip


@contextmanager
def _started(recipe: Recipe) -> Iterator[tuple[Runtime, Log]]:
    failpoints.armed()  # a wrong name is told before anything is read
    started = dist.start(recipe.run.device, deterministic=recipe.run.deterministic)
    with closed(), resource_faults(), started as rt, Log(speaks=rt.is_main) as log:
        yield rt, log


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    interrupts.check()
    started = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - started, 3)
