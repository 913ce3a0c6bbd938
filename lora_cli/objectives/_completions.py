"""Completions of rows' prompts, drawn from the model and judged: what a rollout begins as."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.sampling import Draw, sample
from lora_cli.objectives._base import Items, Surroundings, tokens_of_pass
from lora_cli.objectives._prompts import split_answer
from lora_cli.objectives._rewards import Answer, Term
from lora_cli.objectives._rollout import Rollout
from lora_cli.recipe.rollout_blocks import Sampling
from lora_cli.seeding import stream_seed

SAMPLED_TOKENS = {"cpu": 16384, "cuda": 131072}


def complete(
    model: AdaptedModel,
    rows: Items,
    sampling: Sampling,
    rewards: Sequence[Term],
    around: Surroundings,
    *,
    samples: int,
    step: int,
    greedy: bool,
    pad_id: int,
    tokens: int | None = None,
) -> Rollout | None:
    """Return `samples` completions of each row's prompt with their rewards; None where it is to stop meanwhile.

    `tokens`, of prompts and completions, are drawn at once, None: as many as the recipe has it.

    Raises:
        InputError: the model keeps no cache of keys and values, or a reward cannot judge a completion.
        ResourceError: a single row does not fit into memory.
    """
    temperature = 0.0 if greedy else sampling.temperature
    draw = Draw(sampling.max_new_tokens, around.stop_ids, temperature, sampling.top_p, sampling.top_k)
    chosen = [(index, *split_answer(*row.answers()), n) for index, row in rows for n in range(samples)]
    with model.evaluating():
        found = sample(
            model,
            [prompt for _, prompt, _, _ in chosen],
            [stream_seed(around.seed, "rollout", step, row, number) for row, _, _, number in chosen],
            draw,
            pad_id=pad_id,
            tokens=tokens or tokens_of_pass(sampling.batch_tokens, model.device.type, at_most=SAMPLED_TOKENS),
            stopping=around.stopping,
        )
    if around.stopping():
        return None
    answers = [
        Answer(
            around.text(one.answer()), around.text(prompt), around.text(answer), len(one.ids), [*prompt, *one.ids]
        )
        for one, (_, prompt, answer, _) in zip(found, chosen, strict=True)
    ]  # fmt: skip
    columns = [term.judge(answers) for term in rewards]
    return Rollout(
        index=-1,
        rows=[row for row, _, _, _ in chosen],
        prompts=[prompt for _, prompt, _, _ in chosen],
        completions=[one.ids for one in found],
        rewards=torch.tensor(columns, dtype=torch.float64).reshape(len(columns), len(chosen)).T,
        ended=[one.ended for one in found],
        entropies=torch.tensor([float(one.entropies.sum()) for one in found], dtype=torch.float64),
    )
