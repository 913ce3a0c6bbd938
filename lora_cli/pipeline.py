"""The five stages in order. READ THIS FIRST.

    prepare -> inject -> train -> evaluate -> export        `train`, the whole job
    prepare -> inject ----------> evaluate                  `evaluate`
               inject ----------------------> export        `merge`

Each stage is one file in `stages/` with one public `run`. Nothing is written before the data are prepared and the
adapter is injected, so bad input leaves nothing behind.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_cli import adapters, objectives
from lora_cli.adapters import Method, _peft
from lora_cli.data.render import settle_special_tokens
from lora_cli.errors import InputError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.load import DTYPES, base_folder, load_model, load_tokenizer
from lora_cli.recipe.dump import dump_recipe
from lora_cli.recipe.gates import Gate, check_gates
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.schema import Recipe
from lora_cli.runtime import dist, order, report
from lora_cli.runtime.checkpoint import Checkpoints
from lora_cli.runtime.dist import Runtime
from lora_cli.runtime.faults import resource_faults
from lora_cli.runtime.log import Log
from lora_cli.runtime.resume import changed_keys
from lora_cli.runtime.run_folder import CHECKPOINTS, RECIPE_FILE, RunFolder
from lora_cli.stages import evaluate as evaluate_stage
from lora_cli.stages import export, inject, prepare
from lora_cli.stages import train as train_stage
from lora_cli.types import Prepared

FOLDERS = {"peft": "adapter", "merged": "merged"}


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
        finished = None if overwrite else folder.finished()
        if finished is not None:
            _refuse_changes(folder, recipe, "holds a finished run of another recipe")
            log.line(f"{folder.path}: finished already, nothing to do (--overwrite trains it again)")
            check_gates(gates, finished["eval"]["tuned"])
            return finished

        with _timed(seconds, "prepare"):
            base = base_folder(recipe.model.base, recipe.model.revision)
            tokenizer = load_tokenizer(base)
            prepared = prepare.run(recipe.data, recipe.objective.train_on, tokenizer, rt, log.line)
            objective = objectives.build(recipe.objective, pad_id=prepared.pad_id)
        with _timed(seconds, "inject"):
            model, method = inject.run(
                base, recipe.model.dtype, recipe.adapter, total_steps=_total_steps(recipe, prepared),
                max_length=recipe.data.max_length, seed=recipe.run.seed, rt=rt, log=log.line,
            )  # fmt: skip
        resume_step = _begin(folder, recipe, resume, rt, log)
        with _timed(seconds, "train"):
            trained = train_stage.run(
                recipe.train, model, method, objective, prepared, folder.path,
                seed=recipe.run.seed, resume_step=resume_step, rt=rt, log=log,
            )  # fmt: skip
        with _timed(seconds, "evaluate"):
            scores = evaluate_stage.run(
                recipe.evaluate, model, objective, prepared, rt=rt, log=log, folder=folder.path
            )
        trainable = sum(parameter.numel() for parameter in method.trainable(model.model).values())
        summary = report.summarize(recipe.adapter.method, trainable, prepared, trained, scores)
        with _timed(seconds, "export"):
            card = report.model_card(summary, base_name=recipe.model.base, recipe_text=dump_recipe(recipe))
            targets = {form: folder.path / FOLDERS[form] for form in recipe.export_formats()}
            differences = _export(targets, recipe, base, model, method, prepared.stop_ids, card, rt, log)

        summary = report.complete(summary, differences, seconds, rt.device)
        if rt.is_main:
            folder.write_summary(summary)
        log.line(f"done: {folder.path}, {sum(seconds.values()):.0f} s")
        check_gates(gates, scores.tuned)
        return summary


def evaluate(target: Path, recipe: Recipe, gates: Sequence[Gate] = ()) -> dict[str, Any]:
    """Score a run folder, a PEFT folder on `model.base`, or a plain model; return `{base: ..., tuned: ...}`."""
    if recipe.data.eval is None:
        raise InputError("data.eval: no held-out rows to score on (give data.eval=FILE)")
    with _started(recipe) as (rt, log):
        adapter, base = _locate(target, recipe)
        prepared = prepare.run(
            recipe.data, recipe.objective.train_on, load_tokenizer(base), rt, log.line, need_train=False
        )
        objective = objectives.build(recipe.objective, pad_id=prepared.pad_id)
        dtype, longest = DTYPES[recipe.model.dtype], recipe.data.max_length
        model = load_model(base, dtype=dtype, device=rt.device, max_length=longest)
        layers = adapters.load(adapter, model).placed() if adapter is not None else {}
        scores = evaluate_stage.run(
            recipe.evaluate, AdaptedModel(model, layers), objective, prepared,
            rt=rt, log=log, with_base=adapter is not None,
        )  # fmt: skip
        check_gates(gates, scores.tuned)
        return {"base": scores.base, "tuned": scores.tuned}


def merge(target: Path, output: Path, recipe: Recipe, dtype: str | None = None) -> dict[str, Any]:
    """Write the base with the adapter of `target` in its weights to `output`; return the folder and the difference."""
    with _started(recipe) as (rt, log):
        adapter, base = _locate(target, recipe)
        if adapter is None:
            raise InputError(f"{target}: has no adapter to merge (it is a plain model already)")
        if output.exists():
            raise InputError(f"{output}: exists already (choose another folder or remove it)")
        model = load_model(base, dtype=DTYPES[dtype or recipe.model.dtype], device=rt.device)
        method = adapters.load(adapter, model)
        _, stop_ids = settle_special_tokens(load_tokenizer(base), recipe.data.template)
        card = adapter / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else f"# {adapter.name}, merged\n"
        adapted = AdaptedModel(model, method.placed())
        differences = _export({"merged": output}, recipe, base, adapted, method, stop_ids, text, rt, log)
        return {"output": str(output), "max_logit_difference": differences["merged"]}


def _locate(target: Path, recipe: Recipe) -> tuple[Path | None, Path]:
    """Return the adapter folder, if any, and the folder of the model it stands on."""
    if not target.is_dir():
        raise InputError(f"{target}: no such folder (give a run, a PEFT adapter or a model folder)")
    if (target / RECIPE_FILE).is_file():
        exported = [target / name for name in FOLDERS.values() if (target / name).is_dir()]
        if not exported:
            raise InputError(f"{target}: the run has exported nothing yet (finish it with --resume)")
        target = exported[0]
    if (target / _peft.CONFIG_FILE).is_file():
        return target, base_folder(recipe.model.base, recipe.model.revision)
    return None, base_folder(str(target))


def _begin(folder: RunFolder, recipe: Recipe, resume: bool, rt: Runtime, log: Log) -> int | None:
    """Make the run folder; return the step to continue from, or None to start at the beginning."""
    step = None
    if resume:
        step = Checkpoints(folder.path / CHECKPOINTS, keep=recipe.train.keep_checkpoints).newest(log.line)
        if step is not None:
            _refuse_changes(folder, recipe, "cannot be resumed")
        log.line(
            f"resume: continuing after step {step}" if step else "resume: no checkpoint yet, starting anew"
        )
    rt.barrier()  # no process may look for a checkpoint after the main one has begun to write
    if rt.is_main:
        folder.begin(dump_recipe(recipe), fresh=step is None)
    return step


def _total_steps(recipe: Recipe, prepared: Prepared) -> int:
    assert prepared.train is not None
    rows, plan = len(prepared.train), recipe.train
    return order.total_steps(rows, plan.batch_size, epochs=plan.epochs, max_steps=plan.max_steps)


def _refuse_changes(folder: RunFolder, recipe: Recipe, what: str) -> None:
    before = load_recipe(folder.path / RECIPE_FILE)
    changes = changed_keys(before.resolved(), recipe.resolved())
    if changes:
        raise InputError(
            f"{folder.path}: {what}: {'; '.join(changes)} (use the old values, --overwrite, or another run.output)"
        )


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
) -> dict[str, float]:
    """Export in the one process that writes; return the logit difference of each format after it was read back."""
    if not rt.is_main:
        return {}
    # PEFT finds the base again by a hub id as it is, or by a local folder's absolute path.
    local = recipe.model.base == "tiny" or Path(recipe.model.base).expanduser().exists()
    return export.run(
        targets, model, method,
        base=base, base_name=str(base.resolve()) if local else recipe.model.base, revision=recipe.model.revision,
        stop_ids=stop_ids, card=card, max_shard_bytes=recipe.export.max_shard_bytes, log=log.line,
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
