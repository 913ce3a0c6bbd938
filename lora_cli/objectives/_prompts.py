"""A row as a prompt and the answer to it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lora_cli.types import Example

Ids = npt.NDArray[np.int32]


def split_answer(example: Example) -> tuple[Ids, Ids]:
    """Return the tokens before the row's last trained run, and that run: prompt (P,) and answer (A,)."""
    (trained,) = np.nonzero(example.trained)
    last = trained[-1]
    untrained_before = np.nonzero(~example.trained[: last + 1])[0]
    first = untrained_before[-1] + 1 if len(untrained_before) else 0
    return example.input_ids[:first], example.input_ids[first : last + 1]


def joined(prompt: Ids, completion: Ids) -> Example:
    """Return a prompt with a completion of which every token is trained."""
    trained = np.zeros(len(prompt) + len(completion), dtype=np.bool_)
    trained[len(prompt) :] = True
    return Example(np.concatenate([prompt, completion]).astype(np.int32), trained)
