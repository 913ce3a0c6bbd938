"""Several objectives in one recipe: each stage is an ordinary run in a folder of its own, one after the other.

Which adapter or model a stage starts from is settled where the recipe is read (`recipe/chain.py`). So there is nothing
to carry over in memory, and a chain that was stopped, in a stage or between two, goes on as its runs do: those that are
finished are known, the one that was begun resumes.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from typing import Any

from lora_cli import interrupts, pipeline, without_training
from lora_cli.errors import InputError
from lora_cli.recipe.chain import Chain, dump_chain
from lora_cli.recipe.gates import Gate, check_gates
from lora_cli.recipe.stage import Stage
from lora_cli.runtime.chain_folder import ChainFolder
from lora_cli.runtime.log import Log


def train(
    chain: Chain,
    *,
    resume: bool | None = None,
    overwrite: bool = False,
    gates: Sequence[Gate] = (),
    allow: Sequence[str] = (),
) -> dict[str, Any]:
    """Run all stages and return the summary, which also stands in summary.json.

    The gates are on the scores of the last stage that trains the language model.

    Raises:
        LoraError: see `errors.py`; what the stages before have made stays.
    """
    folder, is_main = ChainFolder(chain.folder), os.environ.get("RANK", "0") == "0"
    try:
        with Log(speaks=is_main) as log, folder.lock:
            if is_main:
                folder.begin(dump_chain(chain), overwrite=overwrite)
            summary, scores = _stages(chain, folder, is_main, resume, allow, log)
    except InputError:
        if is_main:
            folder.withdraw()
        raise
    check_gates(gates, scores)
    return summary


def _stages(
    chain: Chain, folder: ChainFolder, is_main: bool, resume: bool | None, allow: Sequence[str], log: Log
) -> tuple[dict[str, Any], dict[str, float]]:
    """Run the stages that are left; return the summary, and the scores of the language model at its last stage."""
    stages = [_waiting(stage) for stage in chain.stages]
    summary: dict[str, Any] = {"status": "training", "stages": stages}
    scores: dict[str, float] = {}
    for stage, told in zip(chain.stages, stages, strict=True):
        interrupts.check()
        log.line(f"stage {stage.number} of {len(stages)}: {stage.name} ({stage.objective}) -> {stage.folder}")
        found = _run(stage, resume=resume, allow=allow)
        if stage is chain.policy():
            scores = found["eval"]["tuned"]
        told |= {"status": "done", "eval": found.get("eval"), "seconds": found.get("seconds")}
        gc.collect()  # a model in a cycle of references would stand beside the next one
        if stage is chain.stages[-1]:
            summary["status"] = "done"
        if is_main:
            folder.write_summary(summary)
    if is_main:
        folder.write_recipe(dump_chain(chain))
    log.line(f"done: {folder.path}, {len(stages)} stages")
    return summary, scores


def _run(stage: Stage, *, resume: bool | None, allow: Sequence[str]) -> dict[str, Any]:
    if stage.recipe.constitution is not None:
        return without_training.constitute(stage.recipe)
    return pipeline.train(stage.recipe, resume=resume, allow=allow)


def _waiting(stage: Stage) -> dict[str, Any]:
    """Return what is told of a stage that was not run yet."""
    return {
        "name": stage.name, "objective": stage.objective, "folder": stage.folder.name, "status": "waiting",
        "eval": None, "seconds": None,
    }  # fmt: skip
