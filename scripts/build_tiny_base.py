"""Build the bundled `tiny` base: corpus, tokenizer, model, training, model folder, in one command.

The training is this project's own: a recipe with `adapter.method: full`, run as `python -m lora_cli`. Everything is a
function of the seed, up to the rounding of matrix products, which depends on processor and thread count.

The rows are chats of several unrelated exchanges, packed to one length so that padding costs little, and only the
answers are trained: the questions are full of invented names, which nothing can predict.

Run: python scripts/build_tiny_base.py (`--tokens 200000 --output runs/tiny` to try it out)
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from make_tickets import ASSETS, EVAL_ROWS, TRAIN_ROWS, entity_words, make_rows, write_jsonl
from safetensors.torch import load_file, save_file
from tiny_corpus import Document, as_row, documents
from tiny_model import END_OF_TEXT, make_model, train_tokenizer
from tiny_words import TICKET_KEYS

TOKENS = 8_000_000
TOKENIZER_DOCUMENTS = 40_000
HELD_OUT_ROWS = 200
# Most rows are as long as a ticket; one in ten is longer, so that the positions behind are trained too.
ROW_TOKENS, LONG_ROW_TOKENS, LONG_EVERY = 128, 256, 10
OPEN_DOCUMENTS = 128  # documents among which the packer looks for one that fills a row
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
MAX_WEIGHT_BYTES = 8_000_000
RECIPE: dict[str, Any] = {
    "model": {"dtype": "bfloat16"},
    "data": {"format": "chat", "max_length": LONG_ROW_TOKENS},
    "adapter": {"method": "full"},
    "objective": {"name": "sft", "train_on": "assistant"},
    "train": {
        "epochs": 1.0,
        "batch_size": 32,
        "learning_rate": 2.0e-3,
        "schedule": "wsd",
        "warmup": 0.02,
        "decay": 0.3,
        "betas": [0.9, 0.98],
        "log_every": 50,
    },
    "evaluate": {"metrics": ["loss"]},
    "export": {"formats": ["merged"]},
}


def pack(stream: Iterable[Document], tokenizer: Any) -> Iterator[tuple[list[Document], int]]:
    """Rows of documents that together nearly fill a row's length, with their number of tokens; best fit first.

    Documents longer than a short row begin the long rows; those that find no place are left out.
    """
    stream = iter(stream)
    waiting: list[tuple[int, Document]] = []
    long: list[tuple[int, Document]] = []
    for number in itertools.count():
        is_long = number % LONG_EVERY == 0
        row, free = [], LONG_ROW_TOKENS if is_long else ROW_TOKENS
        if is_long and long:
            length, document = long.pop()
            row, free = [document], free - length
        while True:
            if len(waiting) < OPEN_DOCUMENTS:
                new = list(itertools.islice(stream, OPEN_DOCUMENTS))
                texts = [tokenizer.apply_chat_template(as_row(d)["messages"], tokenize=False) for d in new]
                lengths = map(len, tokenizer(texts, add_special_tokens=False).input_ids)
                measured = list(zip(lengths, new, strict=True))
                waiting += [(n, d) for n, d in measured if n <= ROW_TOKENS]
                long = [(n, d) for n, d in measured if ROW_TOKENS < n <= LONG_ROW_TOKENS] or long
            fitting = [i for i, (length, _) in enumerate(waiting) if length <= free]
            if not fitting:
                break
            # The first document is the oldest one, so that none waits for ever.
            best = max(fitting, key=lambda i: waiting[i][0]) if row else fitting[0]
            length, document = waiting.pop(best)
            row.append(document)
            free -= length
        yield row, (LONG_ROW_TOKENS if is_long else ROW_TOKENS) - free


def check_apart_from_tickets(line: str, words: frozenset[str]) -> None:
    """Assert that a row of the corpus has neither a key of the ticket format nor a name of its evaluation rows."""
    assert not any(f'\\"{key}\\"' in line for key in TICKET_KEYS), line
    assert words.isdisjoint(re.findall(r"\w+", line.lower())), line


def write_corpus(folder: Path, tokenizer: Any, tokens: int, seed: int) -> int:
    """Write `train.jsonl` of about `tokens` tokens and `eval.jsonl`; return the number of training tokens."""
    words = frozenset(word.lower() for word in entity_words(make_rows("eval", EVAL_ROWS, 0)))
    rows = pack(documents(seed), tokenizer)
    held_out = [row for row, _ in itertools.islice(rows, HELD_OUT_ROWS)]
    total = 0

    def training() -> Iterator[list[Document]]:
        nonlocal total
        while total < tokens:
            row, length = next(rows)
            total += length
            yield row

    for name, chosen in (("eval", iter(held_out)), ("train", training())):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            for row in chosen:
                line = json.dumps(as_row([exchange for document in row for exchange in document]))
                check_apart_from_tickets(line, words)
                file.write(line + "\n")
    return total


def train(work: Path, seed: int, processes: int) -> Path:
    """Run this project's training on what `work` holds, and return the folder of the trained model."""
    recipe = {**RECIPE, "run": {"output": str(work / "run"), "seed": seed}}
    recipe["model"] = {**RECIPE["model"], "base": str(work / "untrained")}
    recipe["data"] = {**RECIPE["data"], "train": str(work / "train.jsonl"), "eval": str(work / "eval.jsonl")}
    path = work / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    root = Path(__file__).resolve().parent.parent
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [
        sys.executable,
        *(launcher if processes > 1 else []),
        "-m",
        "lora_cli",
        str(path),
        "--overwrite",
    ]
    subprocess.run(command, check=True, cwd=root)
    return work / "run" / "merged"


def install(trained: Path, tokenizer: Any, output: Path) -> None:
    """Copy the model's files to `output`, the weights in bfloat16, and the settings for generation."""
    output.mkdir(parents=True, exist_ok=True)
    for name in MODEL_FILES:
        if name != "model.safetensors" and (trained / name).exists():
            shutil.copyfile(trained / name, output / name)
    weights = {
        name: tensor.to(torch.bfloat16) for name, tensor in load_file(trained / "model.safetensors").items()
    }
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TEXT)]
    generation = {"do_sample": False, "eos_token_id": stops, "pad_token_id": tokenizer.pad_token_id}
    (output / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    size = (output / "model.safetensors").stat().st_size
    assert size <= MAX_WEIGHT_BYTES, f"the weights are {size} bytes, more than {MAX_WEIGHT_BYTES}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the base and the quickstart's tickets beside it."""
    parser = argparse.ArgumentParser(description="Build the bundled tiny base model.")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/tiny-base"), help="folder of what is made on the way"
    )
    parser.add_argument("--output", type=Path, default=ASSETS, help="folder of the finished model")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="length of the training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--processes", type=int, default=1, help="data-parallel processes; 2 where others use the CPU"
    )
    options = parser.parse_args(arguments)
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)

    sample = itertools.islice(documents(options.seed), TOKENIZER_DOCUMENTS)
    tokenizer = train_tokenizer(text for document in sample for exchange in document for text in exchange)
    model = make_model(tokenizer, options.seed)
    model.save_pretrained(work / "untrained")
    tokenizer.save_pretrained(work / "untrained")
    total = write_corpus(work, tokenizer, options.tokens, options.seed)
    print(
        f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary, {total:,} to train on"
    )
    install(train(work, options.seed, options.processes), tokenizer, options.output)
    for split, count in (("train", TRAIN_ROWS), ("eval", EVAL_ROWS)):
        write_jsonl(options.output / f"tickets.{split}.jsonl", make_rows(split, count, 0))
    print(f"built {options.output}")


if __name__ == "__main__":
    main()
