"""Pairs of answers as both sides get them: tokens of the prompt, of the chosen and of the rejected answer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lora_cli import objectives
from lora_cli.models.load import base_folder
from lora_cli.objectives._answers import common_prompt
from lora_cli.recipe.schema import Recipe
from lora_cli.runtime.dist import Runtime
from lora_cli.stages import _opened as opened
from lora_cli.stages import prepare
from lora_cli.types import Examples, PairExample, Prepared
from side_by_side.records import IGNORED, Document

Ids = list[int]
Pair = tuple[Ids, Ids, Ids]


def prepared(recipe: Recipe, rt: Runtime) -> Prepared:
    """Return a recipe's pairs as the pipeline prepares them."""
    base = base_folder(recipe.model.base, recipe.model.revision)
    tokenizer = opened.tokenizer_for(recipe, base)
    kinds = objectives.consumes(recipe.objective)
    return prepare.run(recipe.data, recipe.train_on(), tokenizer, rt, lambda line: None, consumes=kinds)


def pairs_of(examples: Examples) -> Iterator[Pair]:
    """Yield each pair of a data set whose answers are all that is trained of it, and all that follows its prompt.

    What a template writes behind an answer's terminator is left out: nothing is predicted from it.
    """
    for index in range(len(examples)):
        pair = examples[index]
        assert isinstance(pair, PairExample)
        prompt, answers = common_prompt(pair), []
        for one in pair.answers():
            end = int(np.flatnonzero(one.trained).max(initial=-1)) + 1
            if end > prompt and one.trained[prompt:end].all():  # TRL trains on all that follows the prompt
                answers.append(one.input_ids[prompt:end].tolist())
        if len(answers) == 2:
            yield pair.chosen.input_ids[:prompt].tolist(), answers[0], answers[1]


def write_steps(path: Path, pairs: Sequence[Pair], steps: int, size: int) -> Path:
    """Write the pairs of each step, `size` of them, in their order, from the first again after the last."""
    rows = [pairs[index % len(pairs)] for index in range(steps * size)]
    content = {"steps": [rows[first : first + size] for first in range(0, len(rows), size)]}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def read_steps(path: str) -> list[list[Pair]]:
    """Return the pairs of every step of a file that `write_steps` wrote."""
    steps = json.loads(Path(path).read_text(encoding="utf-8"))["steps"]
    return [[(prompt, chosen, rejected) for prompt, chosen, rejected in step] for step in steps]


def documents(pairs: Sequence[Pair]) -> list[Document]:
    """Return both answers of each pair with the prompt before them."""
    found = []
    for prompt, *answers in pairs:
        for answer in answers:
            labels = [IGNORED] * len(prompt) + answer
            found.append((np.asarray(prompt + answer), np.asarray(labels)))
    return found
