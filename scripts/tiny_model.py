"""The tiny base's tokenizer and its weights before training.

Tokenizer: byte-level BPE. The pre-tokenizer never joins a space with a capitalised word or a digit that follows, so a
name or a date has the same tokens in a sentence and inside JSON quotes: copying is then copying of tokens. Digits stand
alone. There is no begin token; `<|im_end|>` ends each turn and is the end token.

Weights: Llama with tied embeddings, random but structured. A model of this size needs some millions of tokens until it
discovers induction, the attention pattern that copies "what followed the last time" (arXiv 2209.11895). We start from
that circuit instead, as mimetic initialisation does for the shape of trained attention (arXiv 2305.09828): three heads
of layer 0 look one, two and three tokens back; three heads of layer 1 compare that with the current tokens and copy
what stood there. Everything stays trainable. Untrained, such a model already copies half of the tokens of a list.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from tiny_words import BARE_WORDS, CAPITAL_WORDS, GLOSSARY
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 2048
END_OF_TEXT, TURN_START, TURN_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Contractions; a lower-case word with its space; a capitalised word; one digit; punctuation with the space before it,
# or with the space after it where a capital or digit follows; white space; letters without case.
SPLIT = (
    r"'(?:s|t|re|ve|m|ll|d)| ?\p{Ll}+|\p{Lu}\p{Ll}+|\p{Lu}|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+(?: (?=[\p{Lu}\p{N}]))?|\s+(?=\S)|\s+|\p{L}+"
)
CONTEXT = 1024

HIDDEN, LAYERS, HEADS, FEED_FORWARD = 192, 4, 6, 512
EMBEDDING_STD, WEIGHT_STD, OUTPUT_STD = 0.06, 0.03, 0.004
# Part of each embedding that is the same for all tokens, relative to the rest; heads that look at positions need it.
CONSTANT = 0.4
# Strengths of the circuit: sharpness and gain of the look-back, sharpness of the match, gain of the copy.
LOOK_BACK, LOOK_BACK_GAIN, MATCH, COPY_GAIN = 7.0, 0.37, 2.5, 1.0
# Rotary pairs: the fastest ones tell positions apart, the slow ones barely turn within a row and can compare content.
POSITION_PAIRS, FIRST_CONTENT_PAIR = 5, 6


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Train the BPE on the glossary and the texts, and return it with the chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()

    def weighted() -> Iterator[str]:
        yield from (f" {word}" * 300 for word in GLOSSARY)
        yield from (f'{word}"' * 2000 for word in BARE_WORDS + CAPITAL_WORDS)
        yield from texts

    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(weighted(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=PAD,
        additional_special_tokens=[END_OF_TEXT, TURN_START],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    return fast


def make_model(tokenizer: Any, seed: int) -> LlamaForCausalLM:
    """The untrained model in float32, a function of the seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = LlamaForCausalLM(config)
    _initialise(model, torch.Generator().manual_seed(seed))
    return model


def _orthonormal(first: Tensor | None, generator: torch.Generator) -> Tensor:
    """(HIDDEN, HIDDEN) orthonormal rows; the first is `first`, if given."""
    columns = torch.randn(HIDDEN, HIDDEN, generator=generator)
    if first is not None:
        columns[:, 0] = first
    return torch.linalg.qr(columns)[0].T


@torch.no_grad()
def _initialise(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    """Fill all weights: noise everywhere, small where a layer writes, and the circuit in layers 0 and 1."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            std = OUTPUT_STD if name.endswith(("o_proj.weight", "down_proj.weight")) else WEIGHT_STD
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    constant = torch.randn(HIDDEN, generator=generator)
    constant /= constant.norm()
    table = EMBEDDING_STD * torch.randn(model.config.vocab_size, HIDDEN, generator=generator)
    table -= torch.outer(table @ constant, constant)
    model.model.embed_tokens.weight.copy_(table + CONSTANT * EMBEDDING_STD * math.sqrt(HIDDEN) * constant)

    size = HIDDEN // HEADS
    rows = _orthonormal(constant, generator)[1:]
    read, written = rows[:size], [rows[size * (back + 1) : size * (back + 2)] for back in range(3)]
    _look_back(model.model.layers[0].self_attn, constant, read, written)
    _match_and_copy(model.model.layers[1].self_attn, read, written, _orthonormal(None, generator))


def _look_back(attention: Any, constant: Tensor, read: Tensor, written: list[Tensor]) -> None:
    """Let head h attend h + 1 tokens back and write what it read there, (size, HIDDEN), into its own subspace.

    Query and key see only the constant part of the embedding; the key is turned by h + 1 positions, so that the
    rotary product cos((distance - h - 1) * frequency) is largest at that distance.
    """
    size, half = len(read), len(read) // 2
    fast = 10000.0 ** (-torch.arange(POSITION_PAIRS) / half)
    strength = LOOK_BACK * math.sqrt((1 + CONSTANT**2) / HIDDEN) / CONSTANT
    for head, subspace in enumerate(written):
        query, key = torch.zeros(size), torch.zeros(size)
        query[:POSITION_PAIRS] = strength
        key[:POSITION_PAIRS] = strength * torch.cos((head + 1) * fast)
        key[half : half + POSITION_PAIRS] = strength * torch.sin((head + 1) * fast)
        at = slice(head * size, (head + 1) * size)
        attention.q_proj.weight[at] = torch.outer(query, constant)
        attention.k_proj.weight[at] = torch.outer(key, constant)
        attention.v_proj.weight[at] = LOOK_BACK_GAIN * read
        attention.o_proj.weight[:, at] = LOOK_BACK_GAIN * subspace.T


def _match_and_copy(attention: Any, read: Tensor, written: list[Tensor], values: Tensor) -> None:
    """Let head h attend to where the last h + 1 tokens stood before what follows them, and write that token.

    Longer matches are what tells the repeated digits of dates apart.
    """
    size, half = len(read), len(read) // 2
    slow = list(range(FIRST_CONTENT_PAIR, half))
    dimensions = slow + [half + pair for pair in slow]
    for head in range(3):
        start, length = head * size, head + 1
        for back in range(length):
            current = read if back == 0 else written[back - 1]
            for row in range(len(dimensions) // length):
                dimension = start + dimensions[row * length + back]
                attention.q_proj.weight[dimension] = MATCH * current[row]
                attention.k_proj.weight[dimension] = MATCH * written[back][row]
        subspace = values[start : start + size]
        attention.v_proj.weight[start : start + size] = COPY_GAIN * subspace
        attention.o_proj.weight[:, start : start + size] = COPY_GAIN * subspace.T
