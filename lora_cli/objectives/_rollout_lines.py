"""What rollouts.jsonl says of a completion."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

from lora_cli.objectives._rollout import Ids, Rollout


class Text(Protocol):
    """Tokens -> text."""

    def __call__(self, ids: Ids, *, keep_special: bool = False) -> str: ...


def lines_of(
    rollout: Rollout, step: int, names: Sequence[str], weights: Sequence[float], text: Text
) -> list[list[str]]:
    """Return a JSON line of each completion, by prompt; `names` and `weights` are of the rewards, (K,)."""
    lines: list[list[str]] = []
    advantages = [float(one.mean()) for one in rollout.split("advantages")]
    for number, prompt in enumerate(rollout.prompts):
        rewards = rollout.rewards[number].tolist()
        line: dict[str, Any] = {
            "step": step,
            "prompt": text(prompt, keep_special=True),
            "completion": text(rollout.completions[number]),
            "reward": sum(weight * one for weight, one in zip(weights, rewards, strict=True)),
            **dict(zip(names, rewards, strict=True)),
            "advantage": advantages[number],
            "tokens": rollout.lengths[number],
            "ended": rollout.ended[number],
        }
        if number == 0 or rollout.rows[number] != rollout.rows[number - 1]:
            lines.append([])
        lines[-1].append(json.dumps(line, ensure_ascii=False))
    return lines
