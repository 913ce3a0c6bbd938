"""The five stages in order. READ THIS FIRST.

    prepare -> inject -> train -> evaluate -> export        `train`, the whole job
    prepare -> inject ----------> evaluate                  `evaluate`
               inject ----------------------> export        `merge`

Each stage is one file in `stages/` with one public `run`. Nothing is written before the data are prepared and the
adapter is injected, so bad input leaves nothing behind.
"""

from __future__ import annotations

import errno
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lora_cli import objectives
from lora_cli.adapters import _peft
from lora_cli.data.render import settle_special_tokens
from lora_cli.errors import InputError, ResourceError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.load import DTYPES, base_folder, load_model, load_tokenizer
from lora_cli.recipe.dump import dump_recipe
from lora_cli.recipe.gates import Gate, check_gates
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.schema import Recipe
from lora_cli.runtime import dist
from lora_cli.runtime.checkpoint import Checkpoints
from lora_cli.runtime.log import Log
from lora_cli.runtime.resume import changed_keys
from lora_cli.runtime.run_folder import CHECKPOINTS, RECIPE_FILE, RunFolder
from lora_cli.stages import evaluate as evaluate_stage
from lora_cli.stages import export, inject, prepare
from lora_cli.stages import train as train_stage
from lora_cli.stages._model_card import model_card
from lora_cli.types import Prepared, Trained

FOLDERS = {"peft": "adapter", "merged": "merged"}


def train(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, gates: Sequence[Gate] = ()
) -> dict[str, Any]:
    """Run the whole recipe and return the summary, which also stands in summary.json.

    Raises:
        LoraError: see `errors.py`; its exit code says which kind of fault it is.
    """
    folder = RunFolder(Path(recipe.run.output))
    seconds: dict[str, float] = {}
    with dist.start(recipe.run.device) as rt, Log(speaks=rt.is_main) as log, _resource_faults():
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
                base, recipe.model.dtype, recipe.adapter, recipe.run.seed, rt, log.line
            )

        resume_step = _resume_step(folder, recipe, log) if resume else None
        rt.barrier()  # no process may look for a checkpoint after the main one has begun to write
        if rt.is_main:
            folder.begin(dump_recipe(recipe), fresh=resume_step is None)
        with _timed(seconds, "train"):
            trained = train_stage.run(
                recipe.train,
                model,
                method,
                objective,
                prepared,
                folder.path,
                seed=recipe.run.seed,
                resume_step=resume_step,
                rt=rt,
                log=log,
            )
        with _timed(seconds, "evaluate"):
            scores = evaluate_stage.run(
                recipe.evaluate, model, objective, prepared, rt=rt, log=log, folder=folder.path
            )
        summary = _summary(recipe, prepared, trained, {"base": scores.base, "tuned": scores.tuned})
        summary["trainable_parameters"] = sum(p.numel() for p in method.trainable(model.model).values())
        with _timed(seconds, "export"):
            if rt.is_main:
                exported = export.run(
                    recipe.export_formats(),
                    model,
                    method,
                    base=base,
                    base_name=_base_name(recipe, base),
                    revision=recipe.model.revision,
                    stop_ids=prepared.stop_ids,
                    card=model_card(summary, base_name=recipe.model.base, recipe_text=dump_recipe(recipe)),
                    max_shard_bytes=recipe.export.max_shard_bytes,
                    targets={form: folder.path / FOLDERS[form] for form in recipe.export_formats()},
                    log=log.line,
                )
                summary["export"] = exported.max_logit_difference
        summary |= {"status": "done", "seconds": seconds, "peak_memory_bytes": _peak_memory(rt.device)}
        if rt.is_main:
            folder.write_summary(summary)
        log.line(f"done: {folder.path}, {sum(seconds.values()):.0f} s")
        check_gates(gates, scores.tuned)
        return summary


def evaluate(target: Path, recipe: Recipe, gates: Sequence[Gate] = ()) -> dict[str, Any]:
    """Score a run folder, a PEFT folder on `model.base`, or a plain model; return `{base: ..., tuned: ...}`."""
    if recipe.data.eval is None:
        raise InputError("data.eval: no held-out rows to score on (give data.eval=FILE)")
    with dist.start(recipe.run.device) as rt, Log(speaks=rt.is_main) as log, _resource_faults():
        adapter, base = _locate(target, recipe)
        tokenizer = load_tokenizer(base)
        prepared = prepare.run(
            recipe.data, recipe.objective.train_on, tokenizer, rt, log.line, need_train=False
        )
        objective = objectives.build(recipe.objective, pad_id=prepared.pad_id)
        model = load_model(base, dtype=DTYPES[recipe.model.dtype], device=rt.device)
        layers = _peft.load(adapter, model).layers if adapter is not None else {}
        scores = evaluate_stage.run(
            recipe.evaluate,
            AdaptedModel(model, layers),
            objective,
            prepared,
            rt=rt,
            log=log,
            with_base=adapter is not None,
        )
        check_gates(gates, scores.tuned)
        return {"base": scores.base, "tuned": scores.tuned}


def merge(target: Path, output: Path, recipe: Recipe, dtype: str | None = None) -> dict[str, Any]:
    """Write the base with the adapter of `target` in its weights to `output`; return the folder and the difference."""
    with dist.start(recipe.run.device) as rt, Log(speaks=rt.is_main) as log, _resource_faults():
        adapter, base = _locate(target, recipe)
        if adapter is None:
            raise InputError(f"{target}: has no adapter to merge (it is a plain model already)")
        if output.exists():
            raise InputError(f"{output}: exists already (choose another folder or remove it)")
        model = load_model(base, dtype=DTYPES[dtype or recipe.model.dtype], device=rt.device)
        method = _peft.load(adapter, model)
        _, stop_ids = settle_special_tokens(load_tokenizer(base), recipe.data.template)
        card = adapter / "README.md"
        exported = export.run(
            ["merged"],
            AdaptedModel(model, method.layers),
            method,
            base=base,
            base_name=_base_name(recipe, base),
            revision=recipe.model.revision,
            stop_ids=stop_ids,
            card=card.read_text(encoding="utf-8") if card.is_file() else f"# {adapter.name}, merged\n",
            max_shard_bytes=recipe.export.max_shard_bytes,
            targets={"merged": output},
            log=log.line,
        )
        return {"output": str(output), "max_logit_difference": exported.max_logit_difference["merged"]}


def _locate(target: Path, recipe: Recipe) -> tuple[Path | None, Path]:
    """Return the adapter folder, if any, and the folder of the model it stands on."""
    if not target.is_dir():
        raise InputError(f"{target}: no such folder (give a run, a PEFT adapter or a model folder)")
    if (target / RECIPE_FILE).is_file():
        if (target / FOLDERS["peft"]).is_dir():
            target = target / FOLDERS["peft"]
        elif (target / FOLDERS["merged"]).is_dir():
            return None, base_folder(str(target / FOLDERS["merged"]))
        else:
            raise InputError(f"{target}: the run has exported nothing yet (finish it with --resume)")
    if (target / _peft.CONFIG_FILE).is_file():
        return target, base_folder(recipe.model.base, recipe.model.revision)
    return None, base_folder(str(target))


def _resume_step(folder: RunFolder, recipe: Recipe, log: Log) -> int | None:
    """Return the step to continue from, or None where there is no checkpoint yet."""
    step = Checkpoints(folder.path / CHECKPOINTS, keep=recipe.train.keep_checkpoints).newest(log.line)
    if step is None:
        log.line("resume: no checkpoint yet, starting from the beginning")
        return None
    _refuse_changes(folder, recipe, "cannot be resumed")
    log.line(f"resume: continuing after step {step}")
    return step


def _refuse_changes(folder: RunFolder, recipe: Recipe, what: str) -> None:
    before = load_recipe(folder.path / RECIPE_FILE)
    changes = changed_keys(before.resolved(), recipe.resolved())
    if changes:
        raise InputError(
            f"{folder.path}: {what}: {'; '.join(changes)} (use the old values, --overwrite, or another run.output)"
        )


def _summary(
    recipe: Recipe, prepared: Prepared, trained: Trained, scores: dict[str, dict[str, float]]
) -> dict[str, Any]:
    splits = {"train": prepared.train, "eval": prepared.eval}
    return {
        "status": "exporting",
        "method": recipe.adapter.method,
        "steps": trained.steps,
        "best_step": trained.best_step,
        "stopped_early": trained.stopped_early,
        "tokens": trained.tokens,
        "trained_tokens": trained.trained_tokens,
        "tokens_per_second": trained.tokens_per_second,
        "eval": scores,
        "rows": {split: asdict(counts) for split, counts in prepared.counts.items()},
        "data": {split: examples.fingerprint for split, examples in splits.items() if examples is not None},
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {name: version(name) for name in ("lora-cli", "torch", "transformers", "safetensors")},
    }


def _base_name(recipe: Recipe, base: Path) -> str:
    """Return what PEFT needs to find the base again: a hub id as it is, a local folder as an absolute path."""
    local = recipe.model.base == "tiny" or Path(recipe.model.base).expanduser().exists()
    return str(base.resolve()) if local else recipe.model.base


def _peak_memory(device: torch.device) -> int:
    """Return the most memory this process has held, in bytes: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - started, 3)


@contextmanager
def _resource_faults() -> Iterator[None]:
    """Turn what the machine has too little of into a ResourceError that says what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"out of GPU memory: {_first_line(error)} (lower train.micro_batch_tokens)"
        ) from error
    except MemoryError as error:
        raise ResourceError("out of memory (lower train.micro_batch_tokens)") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise ResourceError(
            f"out of memory: {_first_line(error)} (lower train.micro_batch_tokens)"
        ) from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ResourceError(f"the disk is full: {error.filename or _first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]
