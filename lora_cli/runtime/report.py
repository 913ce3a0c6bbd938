"""What a run says of itself: summary.json, and the model card of an exported folder."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lora_cli.models.memory import peak_memory
from lora_cli.recipe.data_block import CHOICES
from lora_cli.recipe.dump import dump_recipe
from lora_cli.recipe.schema import Recipe, Section
from lora_cli.redaction import redacted
from lora_cli.runtime.fingerprints import versions
from lora_cli.types import Evaluated, Prepared, Trained

_NAMING_PATHS = ("file", "folder", "prompts", "run")
"""Keys of rewards, judges and constitutions that hold a path."""


def summarize(
    recipe: Recipe,
    trainable: int,
    facts: dict[str, str],
    prepared: Prepared,
    trained: Trained,
    scores: Evaluated,
) -> dict[str, Any]:
    """Return what is known of a run before its export; `trainable` counts the trained parameters."""
    return {
        "status": "exporting",
        "method": recipe.adapter.method,
        "steps": trained.steps,
        "best_step": trained.best_step,
        "stopped_early": trained.stopped_early,
        "skipped_steps": trained.skipped,
        "deterministic": recipe.run.deterministic,
        "trainable_parameters": trainable,
        "tokens": trained.tokens,
        "trained_tokens": trained.trained_tokens,
        "tokens_per_second": trained.tokens_per_second,
        "eval": asdict(scores),
        "rows": {split: asdict(counts) for split, counts in prepared.counts.items()},
        "fingerprints": facts,
        "recipe": recipe.resolved(),
        "versions": versions(),
    }


def complete(
    summary: dict[str, Any], export: dict[str, Any], seconds: dict[str, float], device: torch.device
) -> dict[str, Any]:
    """Return the summary of a finished run; `export` holds the logit difference of each exported format, and
    what a merge or a portable adapter was measured to."""
    return summary | {
        "status": "done",
        "export": export,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(device),
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def model_card(summary: dict[str, Any], recipe: Recipe) -> str:
    """Return the card of an adapter or merged model from the run's summary so far; it names no folder of a machine."""
    base = _public(recipe.model.base)
    library = "transformers" if summary["method"] == "full" else "peft"
    task = "text-classification" if recipe.objective.name == "reward" else "text-generation"
    lines = [
        "---",
        f"base_model: {json.dumps(base)}",
        f"library_name: {library}",
        f"pipeline_tag: {task}",
        "tags: [lora-cli]",
        "---",
        "",
        f"# {summary['method']} on {base}",
        "",
        f"Trained with lora-cli {summary['versions']['lora-cli']}: {summary['steps']} steps,"
        f" {summary['trained_tokens']:,} trained of {summary['tokens']:,} tokens,"
        f" {summary['trainable_parameters']:,} trainable parameters.",
        "",
    ]
    if recipe.data.template not in CHOICES:
        lines += [f"Chat template: {_public(recipe.data.template)}, in chat_template.jinja.", ""]
    scores = summary["eval"]
    if scores["tuned"]:
        lines += ["| held-out | base | tuned |", "|---|---|---|"]
        lines += [
            f"| {name} | {scores['base'][name]:.4f} | {scores['tuned'][name]:.4f} |"
            for name in scores["tuned"]
        ]
        lines += [""]
    lines += ["Fingerprints of what it was made of:", ""]
    lines += [f"- {name}: `{fingerprint}`" for name, fingerprint in summary["fingerprints"].items()]
    lines += ["", "## Recipe", "", "```yaml", _public_recipe(recipe).rstrip(), "```", ""]
    return redacted("\n".join(lines))


def _public_recipe(recipe: Recipe) -> str:
    """Return the recipe with folders cut to their last part, since a card is published."""
    data = recipe.data.model_copy(
        update={
            "train": _public_names(recipe.data.train),
            "eval": _public_names(recipe.data.eval),
            "template": _public(recipe.data.template),
            "sources": {
                name: source.model_copy(update={"path": _public_names(source.path)})
                for name, source in recipe.data.sources.items()
            },
        }
    )
    model = recipe.model.model_copy(update={"base": _public(recipe.model.base)})
    start = recipe.init_from()
    adapter = recipe.adapter.model_copy(update={"init_from": _public(start)} if start else {})
    run = recipe.run.model_copy(update={"output": Path(recipe.run.output).name})
    named = {
        name: _public_section(block)
        for name in ("objective", "evaluate", "constitution")
        if (block := getattr(recipe, name)) is not None
    }
    return dump_recipe(
        recipe.model_copy(update={"data": data, "model": model, "adapter": adapter, "run": run, **named})
    )


def _public_section(section: Section) -> Section:
    """Return a block with the files and folders that it names cut to their last part."""
    changes: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            changes[name] = _public_section(value)
        elif name in _NAMING_PATHS:
            changes[name] = _public_names(value)
        elif isinstance(value, list):
            changes[name] = [_public_section(one) if isinstance(one, Section) else one for one in value]
    return section.model_copy(update=changes)


def _public_names(names: str | list[str] | None) -> str | list[str] | None:
    if names is None or isinstance(names, str):
        return names and _public(names)
    return [_public(name) for name in names]


def _public(name: str) -> str:
    """Return a hub id as it is, and of a local path the last part."""
    return Path(name).name if Path(name).expanduser().exists() else name
