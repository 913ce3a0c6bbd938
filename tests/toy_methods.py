"""The toy job of tests/toy.py for each method, in a short run that has all that a method does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toy import write_recipe

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "dropout": 0.1},
    "qlora": {"rank": 4, "dropout": 0.1},
    "dora": {"rank": 4, "dropout": 0.1},
    # The budget falls at steps 2 to 7, and the ranks are final in the last two.
    "adalora": {"initial_rank": 6, "target_rank": 2, "tinit": 1, "tfinal": 2, "delta_t": 1, "dropout": 0.1},
    # Restarts after steps 3, 6 and 9
    "relora": {"rank": 4, "restart_every": 3, "restart_warmup": 1, "reset": "random", "dropout": 0.1},
    "vera": {"rank": 16, "dropout": 0.1},
    "full": {},
}


def write_method(folder: Path, base: Path, method: str, **changes: Any) -> Path:
    """Write a recipe of 10 steps over 2 epochs, which evaluates, generates and saves meanwhile; return its file.

    Everything but the base is named relative to the folder.
    """
    return write_recipe(
        folder,
        base,
        **{
            "adapter": {"method": method, **METHODS[method]},
            "data__train": "train.jsonl",
            "data__eval": "eval.jsonl",
            "train__save_every": 1,
            "train__eval_every": 4,
            "train__micro_batch_tokens": 128,
            "evaluate__metrics": ["loss", "exact_match"],
            "run__output": "run",
            **changes,
        },
    )
