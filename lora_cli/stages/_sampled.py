"""What an objective that samples has to tell and to keep, put together over all processes."""

from __future__ import annotations

import json
from itertools import zip_longest

import torch
from safetensors.torch import load, save
from torch import Tensor

from lora_cli.objectives import Objective
from lora_cli.runtime.dist import Runtime


def step_metrics(objective: Objective, rt: Runtime) -> dict[str, float]:
    """Return the means of the step that was made."""
    if not objective.online:
        return {}
    found = objective.step_metrics()
    totals = rt.sum([value for pair in found.values() for value in pair])
    return {
        name: total / max(count, 1.0)
        for name, total, count in zip(found, totals[0::2], totals[1::2], strict=True)
    }


def new_lines(objective: Objective, rt: Runtime) -> list[str]:
    """Return what was sampled since it was asked last, in the order of the step's rows.

    Row k of process r is row k * processes + r of the step.
    """
    if not objective.online:
        return []
    told = rt.gather_bytes(json.dumps(objective.new_lines()).encode())
    by_rank: list[list[list[str]]] = [json.loads(text) for text in told]
    return [line for rows in zip_longest(*by_rank, fillvalue=[]) for row in rows for line in row]


def joined_state(objective: Objective, step: int, rt: Runtime) -> dict[str, Tensor]:
    """Return what the objective needs for the step to come, of all processes, joined along the first axis."""
    if not objective.online:
        return {}
    own = {name: tensor.contiguous() for name, tensor in objective.state_dict(step).items()}
    if rt.world_size == 1:
        return own
    parts = [load(content) for content in rt.gather_bytes(save(own) if own else b"") if content]
    return {name: torch.cat([part[name] for part in parts]) for name in own}
