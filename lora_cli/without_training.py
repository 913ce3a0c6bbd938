"""The pipeline with stages left out: what is done with a recipe, a run, an adapter or a model without training.

prepare -> inject ----------> evaluate                  `evaluate`
           inject ----------------------> export        `merge`
prepare -> describe                                     `describe_data`
           constitution                                 `constitute`
           inject -> what was learned                   `inspect`
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lora_cli import objectives
from lora_cli.adapters import Method
from lora_cli.constitution.journal import ENDPOINT_FILE
from lora_cli.constitution.ledger import Ledger
from lora_cli.constitution.principles import read_principles
from lora_cli.data.chosen_tokens import require_used
from lora_cli.data.prompts import contents, read_prompts
from lora_cli.data.render import settle_special_tokens
from lora_cli.data.templates import with_template
from lora_cli.errors import InputError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.load import DTYPES, base_fingerprint, fastest_attention, load_model, tokenizer_folder
from lora_cli.models.safety import check_model_folder
from lora_cli.models.score_head import ScoreHead, read_weight
from lora_cli.recipe.dump import dump_recipe
from lora_cli.recipe.gates import Gate, check_gates
from lora_cli.recipe.schema import Constitution, Recipe
from lora_cli.runtime.checkpoint import require_best
from lora_cli.runtime.constitution_folder import ConstitutionFolder
from lora_cli.runtime.dist import Runtime
from lora_cli.runtime.fingerprints import versions
from lora_cli.runtime.log import Log
from lora_cli.runtime.order import planned_steps
from lora_cli.runtime.run_folder import RunFolder
from lora_cli.runtime.session import started
from lora_cli.stages import _opened as opened
from lora_cli.stages import _space, _voices, _win_rate, describe, export, inject, prepare
from lora_cli.stages import constitution as constitution_stage
from lora_cli.stages import evaluate as evaluate_stage
from lora_cli.stages import inspect as inspect_stage
from lora_cli.stages._companions import Companions, card_of, name_of_base
from lora_cli.types import Conversation, Example, Labelled, Pair, Prepared, Text


def evaluate(target: Path, recipe: Recipe, gates: Sequence[Gate] = ()) -> dict[str, Any]:
    """Score a run folder, a PEFT folder on `model.base`, or a plain model; return `{base: ..., tuned: ...}`."""
    if not recipe.data.holds_out():
        raise InputError("data.eval: no held-out rows to score on (give data.eval=FILE)")
    with started(recipe.run) as (rt, log):
        adapter, base = opened.locate(target, recipe, log.line)
        if adapter is None and recipe.evaluate.compares() is not None:
            raise InputError(
                f"evaluate.metrics: win_rate compares with a base, and {base} is a plain model (leave it out of"
                " evaluate.metrics)"
            )
        log.line(f"evaluating {adapter or base}" + (f" on {recipe.model.base}" if adapter else ""))
        tokenizer, _ = opened.tokenizer_of(adapter, base)
        prepared = _held_out(recipe, tokenizer, adapter, rt, log)
        objective = opened.objective(recipe, prepared, rt, log.line)
        if objective.has_score_head:
            objective.take_score_head(opened.require_score_head(adapter or base))
        referee = _win_rate.referee_of(recipe, prepared, None, rt, log)
        generated = max(evaluate_stage.plan(recipe.evaluate, prepared), objective.require_rows(prepared))
        attention = fastest_attention(rt.device, recipe.data.max_length)
        model, method = opened.model(recipe, adapter, base, rt.device, attention=attention)
        inject.check_rows_fit(model, prepared, max_generated=generated)
        began = {}
        if method is not None and objective.needs_reference and RunFolder(target).is_run():
            began = opened.start_values(recipe, base, model, method)
        packs = inject.settle_packing(model, recipe.data.packing, log.line)
        head = inject.settle_head(model, packs, log.line)
        adapted = AdaptedModel(model, method.placed() if method else {}, began=began, packs=packs, head=head)
        scores = evaluate_stage.run(
            recipe.evaluate, adapted, objective, prepared,
            rt=rt, log=log, with_base=adapter is not None, referee=referee,
        )  # fmt: skip
        check_gates(gates, scores.tuned)
        return {"base": scores.base, "tuned": scores.tuned}


def describe_data(recipe: Recipe, *, show: int = 0, rows: Sequence[str] = ()) -> dict[str, Any]:
    """Return what training would be fed: counts, lengths, findings, and rows token by token; no weights are read.

    `show` training rows are shown, and those that `rows` names as `file:line`.
    """
    with started(recipe.run) as (rt, log):
        block = recipe.model
        folder, config = tokenizer_folder(block.base, block.revision, runs_code=block.trust_remote_code)
        recipe, _ = opened.settle_start(recipe, None)
        tokenizer, named = opened.tokenizer_for(recipe, folder), opened.named_tokens(recipe)
        every = (Conversation, Text, Pair, Labelled)
        prepared = prepare.run(
            recipe.data, recipe.train_on(), tokenizer, rt, log.line, consumes=every, spelled=named
        )
        assert prepared.train is not None
        objective = opened.objective(recipe, prepared, rt, log.line)
        steps = planned_steps(recipe.train, len(prepared.train), updates=objective.updates_per_rollout)
        refusals: list[str] = []
        for check in (lambda: require_used(prepared, named), lambda: require_best(recipe.train, steps)):
            try:
                check()
            except InputError as error:
                refusals += error.lines
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
    with started(recipe.run) as (rt, log):
        adapter, base = opened.locate(target, recipe, log.line)
        if adapter is None:
            raise InputError(f"{target}: has no adapter to merge (it is a plain model already)")
        if output.exists():
            raise InputError(f"{output}: exists already (choose another folder or remove it)")
        log.line(f"merging {adapter} into {recipe.model.base}")
        own, has_new = opened.tokenizer_of(adapter, base)
        sample = _held_out_sample(recipe, own, adapter, rt, log) if form == "merged" else []
        model, method = opened.model(recipe, adapter, base, rt.device, dtype=dtype)
        assert method is not None
        tokenizer = with_template(own, recipe.data.template, adapter)
        pad_id, stop_ids = settle_special_tokens(tokenizer, recipe.data.template)
        weight = read_weight(adapter)
        score = None if weight is None else ScoreHead(weight, pad_id)
        adapted = AdaptedModel(model, method.placed())
        _space.require_for_export(form, recipe.export, output, base, adapted, method)
        merge_with = f"lora-merge {target} --output DIR"
        if not RunFolder(target).is_run():
            merge_with += f" model.base={recipe.model.base}"
        beside = Companions(
            base=base, base_name=name_of_base(recipe, base), revision=recipe.model.revision, stop_ids=stop_ids,
            card=card_of(adapter, form), facts={"model.base": base_fingerprint(base), "versions": versions()},
            tokenizer=own if has_new else None, chat_template=opened.chat_template(own, tokenizer),
        )  # fmt: skip
        differences = export.run(
            {form: output}, adapted, method, beside,
            settings=recipe.export, sample=sample, merge_with=merge_with, score=score, log=log.line,
        )  # fmt: skip
        return {"output": str(output), "max_logit_difference": differences.pop(form), **differences}


def inspect(target: Path, recipe: Recipe) -> dict[str, Any]:
    """Return where the adaptation of a run, a PEFT folder or a model went, and whether its ranks fit."""
    with started(recipe.run) as (rt, log):
        adapter, folder = opened.locate(target, recipe, log.line)
        base = folder if adapter is not None else opened.base(recipe, log.line)
        settings = recipe.adapter if RunFolder(target).is_run() else None
        source: Method | PreTrainedModel
        if adapter is not None:
            model, method = opened.model(recipe, adapter, base, rt.device)
            assert method is not None
            source = method
        else:
            # Both as the model's files have it: a base in float32 was rounded as well before a bfloat16 run.
            runs_code = recipe.model.trust_remote_code
            header = check_model_folder(folder, runs_code=runs_code)
            dtype = DTYPES["bfloat16" if header.dtypes == ("BF16",) else "float32"]
            model, source = (
                load_model(one, dtype=dtype, device=rt.device, headless=True) for one in (base, folder)
            )
            if read_weight(folder) is not None:  # a reward model, which has no output head to compare
                source.set_output_embeddings(model.get_output_embeddings())  # type: ignore[no-untyped-call]
        log.line(f"inspecting {adapter or folder} on {recipe.model.base}")
        found = inspect_stage.run(source, model, settings)
        return {"target": str(target), "base": recipe.model.base, "quantize": recipe.quantization(), **found}


def constitute(recipe: Recipe, *, overwrite: bool = False) -> dict[str, Any]:
    """Make the rows of the recipe's constitution in `run.output`, those that are not there yet; return their counts."""
    settings = recipe.constitution
    assert settings is not None
    folder = ConstitutionFolder(Path(recipe.run.output).expanduser())
    with started(recipe.run) as (rt, log), folder.lock, ExitStack() as stack:
        if rt.world_size > 1:
            raise InputError("lora constitution make: is one process (start it without torchrun)")
        principles = read_principles(Path(settings.file).expanduser())
        prompts = read_prompts(settings, recipe.data)
        base = opened.base(recipe, log.line)
        recipe, start = opened.settle_start(recipe, base)
        made_of = {
            "constitution.file": principles.sha256, "constitution.prompts": contents(prompts),
            "run.seed": recipe.run.seed, **_constitution_settings(settings),
            **_voices.identities(recipe, settings, base, start),
        }  # fmt: skip
        folder.begin(dump_recipe(recipe), principles.text, made_of, overwrite=overwrite)
        finished = folder.finished()
        if finished is not None:
            log.line(f"{folder.path}: finished already, nothing to do (--overwrite makes all rows anew)")
            return finished
        ledger = cache(lambda: stack.enter_context(Ledger(folder.path / ENDPOINT_FILE)))
        voices = _voices.open_voices(recipe, settings, base, start, ledger, rt.device, log.line)
        counts = constitution_stage.run(
            settings, principles, prompts, voices, folder.path, seed=recipe.run.seed, log=log
        )
        summary = {"status": "done", **counts}
        if "endpoint" in (settings.critic.kind, settings.judge.kind):
            log.line(ledger().usage.line())
            summary["endpoint"] = asdict(ledger().usage)
        folder.write_summary(summary)
        log.line(f"done: {folder.path}")
        return summary


def _constitution_settings(settings: Constitution) -> dict[str, Any]:
    names = ("rounds", "samples", "temperature", "min_margin", "answer_tokens", "batch_rows")
    return {f"constitution.{name}": getattr(settings, name) for name in names}


def _held_out_sample(recipe: Recipe, tokenizer: Any, adapter: Path, rt: Runtime, log: Log) -> list[Example]:
    """Return held-out rows for a merge that is measured; none where they are not wanted or no longer there."""
    if recipe.quantization() == "none" or not recipe.data.holds_out():
        return []
    try:
        return _held_out(recipe, tokenizer, adapter, rt, log).sample()
    except InputError as error:
        log.line(f"merge: the held-out rows cannot be read: {error.lines[0]}")
        return []


def _held_out(recipe: Recipe, tokenizer: Any, adapter: Path | None, rt: Runtime, log: Log) -> Prepared:
    on, spelled = recipe.train_on(), opened.named_tokens(recipe)
    return prepare.run(
        recipe.data, on, tokenizer, rt, log.line,
        need_train=False, spelled=spelled, adapter=adapter, consumes=objectives.consumes(recipe.objective),
    )  # fmt: skip
