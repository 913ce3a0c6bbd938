"""The five stages in order. READ THIS FIRST.

    prepare -> inject -> train -> evaluate -> export        `train`, the whole job
    prepare -> inject ----------> evaluate                  `evaluate`
               inject ----------------------> export        `merge`

Each stage is one file in `stages/` with one public `run`. Nothing is written before the data are prepared and the
adapter is injected, so bad input leaves nothing behind.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lora_cli import adapters, objectives
from lora_cli.adapters import Method, _peft
from lora_cli.data.render import settle_special_tokens
from lora_cli.errors import InputError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.load import (
    DTYPES,
    base_fingerprint,
    base_folder,
    fastest_attention,
    load_model,
    load_tokenizer,
)
from lora_cli.models.nf4 import Quantization
from lora_cli.publish import MANIFEST
from lora_cli.recipe.gates import Gate, check_gates
from lora_cli.recipe.schema import Recipe
from lora_cli.runtime import dist, order, report
from lora_cli.runtime.checkpoint import exports_best
from lora_cli.runtime.dist import Runtime
from lora_cli.runtime.faults import resource_faults
from lora_cli.runtime.log import Log
from lora_cli.runtime.resume import begin, find_finished
from lora_cli.runtime.run_folder import EXPORTS, RunFolder
from lora_cli.stages import evaluate as evaluate_stage
from lora_cli.stages import export, inject, prepare
from lora_cli.stages import train as train_stage
from lora_cli.types import Example, Examples, Prepared


def train(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, gates: Sequence[Gate] = ()
) -> dict[str, Any]:
    """Run the whole recipe and return the summary, which also stands in summary.json.

    Raises:
        LoraError: see `errors.py`; its exit code says which kind of fault it is.
    """
    folder = RunFolder(Path(recipe.run.output).expanduser())
    seconds: dict[str, float] = {}
    with _started(recipe) as (rt, log):
        with _timed(seconds, "prepare"):
            base = base_folder(recipe.model.base, recipe.model.revision)
            tokenizer = load_tokenizer(base)
            prepared = prepare.run(recipe.data, recipe.objective.train_on, tokenizer, rt, log.line)
            objective = objectives.build(recipe.objective, pad_id=prepared.pad_id)
            facts = report.fingerprints(prepared, base_fingerprint(base))
        finished = None if overwrite else find_finished(folder, recipe, facts, resume=resume)
        if finished is not None:
            log.line(f"{folder.path}: finished already, nothing to do (--overwrite trains it again)")
            check_gates(gates, finished["eval"]["tuned"])
            return finished

        total = _total_steps(recipe, prepared)
        with _timed(seconds, "inject"):
            model, method = inject.run(
                base, recipe.model.dtype, recipe.adapter, prepared, quantization=_quantization(recipe),
                total_steps=total, max_length=recipe.data.max_length,
                max_generated=evaluate_stage.plan(recipe.evaluate, prepared),
                seed=recipe.run.seed, rt=rt, log=log.line,
            )  # fmt: skip
        resume_step = begin(folder, recipe, facts, total, rt, log.line, resume=resume)
        with _timed(seconds, "train"):
            trained = train_stage.run(
                recipe.train, model, method, objective, prepared, folder.path,
                seed=recipe.run.seed, resume_step=resume_step, facts=facts, rt=rt, log=log,
            )  # fmt: skip
        for name in prepared.changed():
            log.line(f"warning: {name}: was changed while the run trained on what it held before")
        with _timed(seconds, "evaluate"):
            scores = evaluate_stage.run(
                recipe.evaluate, model, objective, prepared, rt=rt, log=log, folder=folder.path
            )
        trainable = sum(parameter.numel() for parameter in method.trainable(model.model).values())
        summary = report.summarize(recipe.adapter.method, trainable, facts, prepared, trained, scores)
        with _timed(seconds, "export"):
            card = report.model_card(summary, recipe)
            targets = {form: folder.path / EXPORTS[form] for form in recipe.export_formats()}
            sample = _sample(prepared.eval or prepared.train)
            differences = _export(
                targets, recipe, base, model, method, prepared.stop_ids, card, rt, log, sample
            )

        summary = report.complete(summary, differences, seconds, rt.device)
        if rt.is_main:
            folder.write_summary(summary)
        log.line(f"done: {folder.path}, {sum(seconds.values()):.0f} s")
        check_gates(gates, scores.tuned)
        return summary


def evaluate(target: Path, recipe: Recipe, gates: Sequence[Gate] = ()) -> dict[str, Any]:
    """Score a run folder, a PEFT folder on `model.base`, or a plain model; return `{base: ..., tuned: ...}`."""
    if not recipe.data.holds_out():
        raise InputError("data.eval: no held-out rows to score on (give data.eval=FILE)")
    with _started(recipe) as (rt, log):
        adapter, base = _locate(target, recipe)
        prepared = prepare.run(
            recipe.data, recipe.objective.train_on, load_tokenizer(base), rt, log.line, need_train=False
        )
        objective = objectives.build(recipe.objective, pad_id=prepared.pad_id)
        generated = evaluate_stage.plan(recipe.evaluate, prepared)
        attention = fastest_attention(rt.device, recipe.data.max_length)
        dtype, quantization = DTYPES[recipe.model.dtype], _quantization(recipe)
        model = load_model(
            base, dtype=dtype, device=rt.device, attention=attention, quantization=quantization
        )
        inject.check_rows_fit(model, prepared, max_generated=generated)
        layers = _load_adapter(adapter, base, model).placed() if adapter is not None else {}
        scores = evaluate_stage.run(
            recipe.evaluate, AdaptedModel(model, layers), objective, prepared,
            rt=rt, log=log, with_base=adapter is not None,
        )  # fmt: skip
        check_gates(gates, scores.tuned)
        return {"base": scores.base, "tuned": scores.tuned}


def merge(target: Path, output: Path, recipe: Recipe, dtype: str | None = None) -> dict[str, Any]:
    """Write the base with the adapter of `target` in its weights to `output`; return the folder and the difference."""
    output = output.expanduser()
    with _started(recipe) as (rt, log):
        adapter, base = _locate(target, recipe)
        if adapter is None:
            raise InputError(f"{target}: has no adapter to merge (it is a plain model already)")
        if output.exists():
            raise InputError(f"{output}: exists already (choose another folder or remove it)")
        sample = _held_out_sample(recipe, base, rt, log)
        model = load_model(
            base,
            dtype=DTYPES[dtype or recipe.model.dtype],
            device=rt.device,
            quantization=_quantization(recipe),
        )
        method = _load_adapter(adapter, base, model)
        _, stop_ids = settle_special_tokens(load_tokenizer(base), recipe.data.template)
        card = adapter / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else f"# {adapter.name}, merged\n"
        adapted = AdaptedModel(model, method.placed())
        differences = _export(
            {"merged": output}, recipe, base, adapted, method, stop_ids, text, rt, log, sample
        )
        return {"output": str(output), "max_logit_difference": differences.pop("merged"), **differences}


def _locate(target: Path, recipe: Recipe) -> tuple[Path | None, Path]:
    """Return the adapter folder, if any, and the folder of the model it stands on."""
    if not target.is_dir():
        raise InputError(f"{target}: no such folder (give a run, a PEFT adapter or a model folder)")
    if RunFolder(target).is_run():
        exported = [target / name for name in EXPORTS.values() if (target / name).is_dir()]
        if not exported:
            raise InputError(f"{target}: the run has exported nothing yet (finish it with --resume)")
        target = exported[0]
    if (target / _peft.CONFIG_FILE).is_file():
        return target, base_folder(recipe.model.base, recipe.model.revision)
    return None, base_folder(str(target))


def _load_adapter(folder: Path, base: Path, model: PreTrainedModel) -> Method:
    """Inject an adapter; refuse one of ours that was trained on a base with other weights."""
    manifest = folder / MANIFEST
    trained_on = (
        json.loads(manifest.read_text(encoding="utf-8")).get("model.base") if manifest.is_file() else None
    )
    if trained_on not in (None, base_fingerprint(base)):
        raise InputError(f"{folder}: was trained on another base than {base}: config or weights differ")
    return adapters.load(folder, model)


def _quantization(recipe: Recipe) -> Quantization | None:
    form = recipe.quantization()
    return None if form == "none" else Quantization(form, recipe.model.double_quant)


def _sample(examples: Examples | None) -> list[Example]:
    """Return the rows that a merged model of a quantized base is measured on."""
    return [examples[row] for row in range(min(16, len(examples)))] if examples is not None else []


def _held_out_sample(recipe: Recipe, base: Path, rt: Runtime, log: Log) -> list[Example]:
    """Return held-out rows for a merge that is measured; none where they are not wanted or no longer there."""
    if recipe.quantization() == "none" or not recipe.data.holds_out():
        return []
    tokenizer, train_on = load_tokenizer(base), recipe.objective.train_on
    try:
        return _sample(prepare.run(recipe.data, train_on, tokenizer, rt, log.line, need_train=False).eval)
    except InputError as error:
        log.line(f"merge: the held-out rows cannot be read: {error.lines[0]}")
        return []


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
    stop_ids: Sequence[int],
    card: str,
    rt: Runtime,
    log: Log,
    sample: Sequence[Example],
) -> dict[str, Any]:
    """Export in the one process that writes; return the logit difference of each format after it was read back."""
    if not rt.is_main:
        return {}
    # PEFT finds the base again by a hub id as it is, or by a local folder's absolute path.
    local = recipe.model.base == "tiny" or Path(recipe.model.base).expanduser().exists()
    return export.run(
        targets, model, method,
        base=base, base_name=str(base.resolve()) if local else recipe.model.base, revision=recipe.model.revision,
        stop_ids=stop_ids, card=card, facts={"model.base": base_fingerprint(base)},
        settings=recipe.export, sample=sample, log=log.line,
    )  # fmt: skip


@contextmanager
def _started(recipe: Recipe) -> Iterator[tuple[Runtime, Log]]:
    with resource_faults(), dist.start(recipe.run.device) as rt, Log(speaks=rt.is_main) as log:
        yield rt, log


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - started, 3)
