"""A preference with a known rule: of two tickets for one message, the one of the higher severity is the better answer.

    python benchmarks/reward_rule.py                      # seeds 0 1 2: held-out accuracy, margin, calibration, seconds
    python benchmarks/reward_rule.py --seeds 0 --pairs 2000

Messages are those of the bundled data set, whose people and products in the held-out rows occur nowhere else. Both
tickets of a pair have product, category and customer of some other message, the same in both, so that nothing but the
severity tells them apart. The reward model is that of configs/reward.yaml on the bundled base, at a learning rate of
2e-3.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "lora_cli" / "assets" / "tiny"
SEVERITIES = ("low", "medium", "high", "critical")


def pairs(split: str, number: int, seed: int = 0) -> list[dict[str, str]]:
    """Return so many pairs of a split, train or eval, each with the severities of both answers."""
    lines = (ASSETS / f"tickets.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [[turn["content"] for turn in json.loads(line)["messages"]] for line in lines]
    draw = random.Random(f"{split} {seed}")
    made = []
    for place in range(number):
        low, high = sorted(draw.sample(range(len(SEVERITIES)), 2))
        ticket = json.loads(draw.choice(rows)[1])
        better, worse = (
            json.dumps(ticket | {"severity": SEVERITIES[one]}, separators=(",", ":")) for one in (high, low)
        )
        made.append({"prompt": rows[place % len(rows)][0], "chosen": better, "rejected": worse})
    return made


def write_pairs(folder: Path, *, train: int, heldout: int, seed: int = 0) -> tuple[Path, Path]:
    """Write training and held-out pairs, and return both files."""
    files = []
    for split, number in (("train", train), ("eval", heldout)):
        files.append(folder / f"rule.{split}.jsonl")
        content = "".join(json.dumps(row) + "\n" for row in pairs(split, number, seed))
        files[-1].write_text(content, encoding="utf-8")
    return files[0], files[1]


def main() -> None:
    """Train a reward model for each seed and print its scores."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, default=500)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        for seed in settings.seeds:
            train, held = write_pairs(Path(place), train=settings.pairs, heldout=300, seed=seed)
            run = Path(place) / f"run-{seed}"
            overrides = [
                f"data.train={train}", f"data.eval={held}", "data.eval_fraction=null", "data.max_length=256",
                "train.learning_rate=2e-3", f"run.output={run}", f"run.seed={seed}",
            ]  # fmt: skip
            command = [sys.executable, "-m", "lora_cli", str(ROOT / "configs" / "reward.yaml"), *overrides]
            subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
            summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
            tuned = summary["eval"]["tuned"]
            print(
                f"seed {seed}: accuracy {tuned['preference_accuracy']:.1%}, loss {tuned['loss']:.4f},"
                f" margin {tuned['reward_margin']:.2f}, calibration error {tuned['calibration_error']:.1%},"
                f" {summary['seconds']['train']:.0f} s of training"
            )


if __name__ == "__main__":
    main()
