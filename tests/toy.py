"""A toy job that is whole: a model folder with a real tokenizer, rows that can be learned, and a recipe file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ANIMALS = ["cat", "dog", "owl", "fox", "hen", "bee", "elk", "yak"]
SOUNDS = ["purr", "bark", "hoot", "yelp", "cluck", "buzz", "bugle", "grunt"]


def rows(number: int) -> list[dict[str, str]]:
    """Return prompt and completion of unequal lengths; the completion follows from the prompt."""
    return [
        {
            "prompt": " ".join(["what does the", *["big"] * (index % 5), ANIMALS[index % 8], "say"]),
            "completion": f"the {ANIMALS[index % 8]} says {SOUNDS[index % 8]}",
        }
        for index in range(number)
    ]


def pairs(number: int) -> list[dict[str, str]]:
    """Return a prompt with the right answer and a wrong one of another length."""
    return [
        {
            "prompt": row["prompt"],
            "chosen": row["completion"],
            "rejected": f"the {ANIMALS[index % 8]} always says {SOUNDS[(index + 3) % 8]}",
        }
        for index, row in enumerate(rows(number))
    ]


def write_rows(path: Path, content: list[Any]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


def write_tokenizer(folder: Path) -> int:
    """Write a byte-level BPE with a ChatML template; return its vocabulary size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([json.dumps(row) for row in rows(16)] + ["user", "assistant"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>")
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    return len(fast)


def write_base(folder: Path, *, poison: bool = False) -> Path:
    """Write a small random Llama with its tokenizer; `poison` puts a NaN into its weights."""
    folder.mkdir(parents=True)
    size = write_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=3,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
        if poison:
            model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    model.save_pretrained(folder)
    return folder


def write_recipe(folder: Path, base: Path, **changes: Any) -> Path:
    """Write train and eval rows and a recipe over them, and return the recipe.

    `changes` are `section__key=value`, or `section=block` in place of a whole block.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recipe: dict[str, Any] = {
        "model": {"base": str(base), "dtype": "float32"},
        "data": {
            "train": str(write_rows(folder / "train.jsonl", rows(40))),
            "eval": str(write_rows(folder / "eval.jsonl", rows(11))),
        },
        "adapter": {"method": "lora", "rank": 4, "alpha": 8},
        "train": {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "log_every": 1},
        "run": {"output": str(folder / "run"), "device": "cpu"},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            recipe.setdefault(section, {})[name] = value
        else:
            recipe[section] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def lora(*arguments: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run `lora ...` as a process of its own."""
    command = [
        sys.executable,
        "-c",
        "from lora_cli.cli import main; raise SystemExit(main())",
        *map(str, arguments),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


__all__ = ["lora", "rows", "write_base", "write_recipe", "write_rows"]
