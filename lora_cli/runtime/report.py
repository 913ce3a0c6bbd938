"""What a run says of itself: summary.json, and the model card of an exported folder."""

from __future__ import annotations

import resource
import time
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

from lora_cli.types import Evaluated, Prepared, Trained


def summarize(
    method: str, trainable: int, prepared: Prepared, trained: Trained, scores: Evaluated
) -> dict[str, Any]:
    """Return what is known of a run before its export; `trainable` counts the trained parameters."""
    splits = {"train": prepared.train, "eval": prepared.eval}
    return {
        "status": "exporting",
        "method": method,
        "steps": trained.steps,
        "best_step": trained.best_step,
        "stopped_early": trained.stopped_early,
        "trainable_parameters": trainable,
        "tokens": trained.tokens,
        "trained_tokens": trained.trained_tokens,
        "tokens_per_second": trained.tokens_per_second,
        "eval": asdict(scores),
        "rows": {split: asdict(counts) for split, counts in prepared.counts.items()},
        "data": {split: examples.fingerprint for split, examples in splits.items() if examples is not None},
        "versions": {name: version(name) for name in ("lora-cli", "torch", "transformers", "safetensors")},
    }


def complete(
    summary: dict[str, Any], export: dict[str, Any], seconds: dict[str, float], device: torch.device
) -> dict[str, Any]:
    """Return the summary of a finished run; `export` holds the logit difference of each exported format, and
    what a merge was measured to."""
    return summary | {
        "status": "done",
        "export": export,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(device),
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def peak_memory(device: torch.device) -> int:
    """Return the most memory this process has held, in bytes: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def model_card(summary: dict[str, Any], *, base_name: str, recipe_text: str) -> str:
    """Return the card of an adapter or merged model from the run's summary so far."""
    lines = [
        "---",
        f"base_model: {base_name}",
        "library_name: peft" if summary["method"] != "full" else "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [lora-cli]",
        "---",
        "",
        f"# {summary['method']} on {base_name}",
        "",
        f"Trained with lora-cli {summary['versions']['lora-cli']}: {summary['steps']} steps,"
        f" {summary['trained_tokens']:,} trained of {summary['tokens']:,} tokens,"
        f" {summary['trainable_parameters']:,} trainable parameters.",
        "",
    ]
    base, tuned = summary["eval"]["base"], summary["eval"]["tuned"]
    if tuned:
        lines += ["| held-out | base | tuned |", "|---|---|---|"]
        lines += [f"| {name} | {base[name]:.4f} | {tuned[name]:.4f} |" for name in tuned]
        lines += [""]
    lines += ["Data, by sha256 of its tokens:", ""]
    lines += [f"- {split}: `{fingerprint}`" for split, fingerprint in summary["data"].items()]
    lines += ["", "## Recipe", "", "```yaml", recipe_text.rstrip(), "```", ""]
    return "\n".join(lines)
