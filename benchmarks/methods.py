"""Every adapter method on the same task, from its own recipe in configs/: one table from one command.

    python benchmarks/methods.py                          # the tickets, seed 0
    python benchmarks/methods.py --seeds 0 1 2 --write    # with spread, written to docs/methods.md

Each run is a process of its own, so that its peak memory is its own. A figure is the median over the seeds, with the
smallest and the largest behind it where there are several.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ("quickstart", "lora_plus", "pissa", "dora", "adalora", "relora", "vera", "qlora", "full")
TABLE_BEGIN, TABLE_END = "<!-- table -->", "<!-- end of table -->"
COLUMNS = (
    "recipe",
    "method",
    "trained parameters",
    "held-out loss",
    "exact match",
    "tokens/s",
    "peak memory",
    "export",
)


def run(recipe: str, seed: int, folder: Path, extra: Sequence[str]) -> dict[str, Any]:
    """Train one recipe and return its summary, with the bytes of what it exported."""
    output = folder / f"{recipe}-{seed}"
    overrides = [f"run.output={output}", f"run.seed={seed}", "evaluate.metrics=[loss,exact_match]", *extra]
    command = [sys.executable, "-m", "lora_cli", f"configs/{recipe}.yaml", *overrides]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    weights = [path for name in ("adapter", "merged") for path in (output / name).glob("*.safetensors")]
    return summary | {"export_bytes": sum(path.stat().st_size for path in weights)}


def row(recipe: str, summaries: Sequence[dict[str, Any]]) -> list[str]:
    """Return a recipe's cells."""

    def spread(values: Sequence[float], form: str) -> str:
        middle = format(statistics.median(values), form)
        if len(values) == 1:
            return middle
        return f"{middle} ({format(min(values), form)} to {format(max(values), form)})"

    tuned = [summary["eval"]["tuned"] for summary in summaries]
    return [
        f"[{recipe}](../configs/{recipe}.yaml)",
        summaries[0]["method"],
        f"{summaries[0]['trainable_parameters']:,}",
        spread([scores["loss"] for scores in tuned], ".4f"),
        spread([scores["exact_match"] for scores in tuned], ".1%"),
        spread([summary["tokens_per_second"] for summary in summaries], ",.0f"),
        spread([summary["peak_memory_bytes"] / 1e9 for summary in summaries], ".2f") + " GB",
        f"{summaries[0]['export_bytes'] / 1e6:.2f} MB",
    ]


def write(table: str) -> None:
    """Put the table into docs/methods.md, between its two marks."""
    page = ROOT / "docs" / "methods.md"
    text = page.read_text(encoding="utf-8")
    before, after = text.split(TABLE_BEGIN)[0], text.split(TABLE_END)[1]
    page.write_text(f"{before}{TABLE_BEGIN}\n{table}\n{TABLE_END}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipes and print the table as Markdown, row by row."""
    parser = argparse.ArgumentParser(description="Compare every method on the tickets task.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--write", action="store_true", help="put the table into docs/methods.md")
    parser.add_argument("overrides", nargs="*", help="key=value for every recipe, e.g. train.max_steps=20")
    options = parser.parse_args(arguments)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for recipe in options.recipes:
            summaries = [run(recipe, seed, Path(folder), options.overrides) for seed in options.seeds]
            lines.append("| " + " | ".join(row(recipe, summaries)) + " |")
            print(lines[-1], flush=True)
    if options.write:
        write("\n".join(lines))


if __name__ == "__main__":
    main()
