"""The README.md of an exported folder: what it is, how it was made, what it scored. Markdown with hub metadata."""

from __future__ import annotations

from typing import Any


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
