"""A base without weights: config and tokenizer, all that `lora data` needs; and recipes over it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from toy import CHATML, write_tokenizer
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from lora_cli import without_training
from lora_cli.recipe.load import load_recipe

CORPUS = ["user assistant what does the cat say", "the cat says purr and no more"] * 3
SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]


def write_config(folder: Path, vocabulary: int, positions: int = 256) -> None:
    """Write the config of a small model that is nowhere stored."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=positions,
    )
    config.save_pretrained(folder)


def write_base(folder: Path, positions: int = 256) -> Path:
    """Write config and byte-level tokenizer with a ChatML template."""
    folder.mkdir(parents=True)
    write_config(folder, write_tokenizer(folder), positions)
    return folder


def write_word_base(folder: Path, *, byte_fallback: bool) -> Path:
    """Write a base whose SentencePiece-like tokenizer lacks many characters: unknown, or written byte by byte."""
    folder.mkdir(parents=True)
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=byte_fallback, fuse_unk=False))
    backend.normalizer = normalizers.Replace("\n", " ")
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL + pieces, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    stored = json.loads(backend.to_str())
    stored["added_tokens"] = [token for token in stored["added_tokens"] if token["content"] in SPECIAL]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(stored)), eos_token="<|im_end|>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    write_config(folder, len(tokenizer))
    return folder


def tokenizer_of(base: Path) -> Any:
    """Return transformers' own tokenizer of a base."""
    return AutoTokenizer.from_pretrained(base)


def describe(base: Path, *overrides: str, show: int = 0, rows: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the description of a recipe that consists of overrides."""
    recipe = load_recipe(None, [f"model.base={base}", "run.device=cpu", *overrides])
    return without_training.describe_data(recipe, show=show, rows=rows)


def finding(said: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the only finding of this name."""
    (found,) = [one for one in said["findings"] if one["name"] == name]
    return dict(found)


def recount(tokenizer: Any, turns: list[dict[str, str]]) -> tuple[int, int]:
    """Return the tokens of a conversation and those of its last answer with terminator, by transformers alone."""
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    start = len(tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True))
    end = text.rindex("<|im_end|>") + len("<|im_end|>")
    offsets = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    return len(offsets), sum(start <= first < end for first, _ in offsets)


def turns_of(prompt: str, answer: str) -> list[dict[str, str]]:
    """Return a question and its answer as messages."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
