"""The work of a case, made once: the documents of every optimizer step, and what the adapters start from.

Every step holds the same number of documents, since the trainers count rows. Dense: 4 x 512 random tokens, all
labelled. GSM8K: questions and answers of the file in its order, the answer labelled, cut at no place; documents beyond
512 tokens are left out, and so are groups beyond the tokens of a step.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from side_by_side.records import IGNORED

LONGEST = 512
Tokens = tuple[list[int], list[int]]


def dense(folder: Path, steps: int, vocabulary: int, *, rows: int = 4, length: int = LONGEST) -> Path:
    """Write steps of `rows` documents of `length` random tokens, all of them labelled."""
    draws = np.random.Generator(np.random.PCG64(0)).integers(0, vocabulary, (steps, rows, length))
    documents = [[(row.tolist(), [IGNORED, *row[1:].tolist()]) for row in step] for step in draws]
    return _write(folder / f"dense-{rows}x{length}-{steps}-{vocabulary}.json", documents)


def question_answers(file: Path, folder: Path, steps: int, tokenizer: Path, step_tokens: int) -> Path:
    """Write steps of as many documents of a file of questions and answers as `step_tokens` hold on average.

    Raises:
        ValueError: the file has too few of them.
    """
    documents = _tokenized(file, tokenizer)
    if not documents:
        raise ValueError(f"{file}: no document of at most {LONGEST} tokens")
    mean = sum(len(ids) for ids, _ in documents) / len(documents)
    # A multiple of 8, which is what TRL takes at a time where it is not told otherwise.
    for number in range(8 * max(1, round(step_tokens / mean / 8)), 0, -8):
        groups = [documents[first : first + number] for first in range(0, len(documents), number)]
        fitting = [
            group
            for group in groups
            if len(group) == number and sum(len(ids) for ids, _ in group) <= step_tokens
        ]
        if len(fitting) >= steps:
            content = hashlib.sha256(json.dumps(fitting[:steps]).encode()).hexdigest()
            return _write(folder / f"answers-{content[:12]}.json", fitting[:steps])
    raise ValueError(f"{file}: too few documents for {steps} steps of {step_tokens} tokens")


def _tokenized(file: Path, folder: Path) -> list[Tokens]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    end: Any = tokenizer.token_to_id(config["eos_token"])
    documents: list[Tokens] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt: list[int] = tokenizer.encode(row["question"], add_special_tokens=False).ids
        answer: list[int] = [*tokenizer.encode(row["answer"], add_special_tokens=False).ids, end]
        if len(prompt) + len(answer) <= LONGEST:
            documents.append((prompt + answer, [IGNORED] * len(prompt) + answer))
    return documents


def _write(path: Path, steps: list[Any]) -> Path:
    if not path.is_file():
        path.write_text(json.dumps({"steps": steps}), encoding="utf-8")
    return path


def starts(model: Path, method: str, rank: int, path: Path) -> Path | None:
    """Write the values that every side's adapter starts from, none of them zero; None where there is no adapter.

    Named `<module path>.lora_A` and so on, in float32; VeRA's shared matrices are `vera_A` and `vera_B`.
    """
    if method == "full":
        return None
    if path.is_file():
        return path
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(model / "model.safetensors", "pt") as weights:  # type: ignore[no-untyped-call]
        names = sorted(name for name in weights.keys() if name.endswith("_proj.weight"))  # noqa: SIM118
        shapes = {name.removesuffix(".weight"): weights.get_slice(name).get_shape() for name in names}
        for name, (out, inputs) in shapes.items():
            if method == "vera":
                tensors[f"{name}.vera_lambda_b"] = torch.empty(out).normal_(std=0.1, generator=draw)
                tensors[f"{name}.vera_lambda_d"] = torch.full((rank,), 0.1)
                continue
            bound = 1 / math.sqrt(inputs)
            tensors[f"{name}.lora_A"] = torch.empty(rank, inputs).uniform_(-bound, bound, generator=draw)
            tensors[f"{name}.lora_B"] = torch.empty(out, rank).normal_(std=0.01, generator=draw)
            if method == "adalora":
                tensors[f"{name}.lora_E"] = torch.empty(rank, 1).normal_(generator=draw)
            if method == "dora":
                norms = torch.linalg.vector_norm(weights.get_tensor(f"{name}.weight").float(), dim=1)
                tensors[f"{name}.lora_magnitude_vector"] = norms
    if method == "vera":
        for name, shape in {
            "vera_A": (rank, max(shape[1] for shape in shapes.values())),
            "vera_B": (max(shape[0] for shape in shapes.values()), rank),
        }.items():
            bound = math.sqrt(6 / shape[1])
            tensors[name] = torch.empty(shape).uniform_(-bound, bound, generator=draw)
    save_file(tensors, path)
    return path
