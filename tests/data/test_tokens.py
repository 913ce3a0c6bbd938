"""The mask follows character offsets, in every family of tokenizers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lora_cli.data.tokens import trained_mask

SPECIAL = ["<unk>", "<s>", "</s>"]
CORPUS = [
    "the capital of France is Paris and the fox jumps",
    "<s> and </s> are written in text, unhappy islands",
] * 4
CHATML_LIKE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def byte_level() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def sentencepiece_bpe() -> Tokenizer:
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def unigram() -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def words() -> Tokenizer:
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.train_from_iterator(
        CORPUS, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    )
    return backend


FAMILIES = {
    "byte-level BPE": byte_level(),
    "SentencePiece BPE": sentencepiece_bpe(),
    "Unigram": unigram(),
    "words": words(),
}


@pytest.mark.parametrize("family", list(FAMILIES))
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_mask_is_the_offset_rule(family, data):
    """A token is trained iff it begins inside a span; so also if it reaches over the span's end."""
    text = data.draw(
        st.lists(st.sampled_from(["the capital", " of", " ", "  ", "\n", "é", "😀", "x", " unhappy"])).map(
            "".join
        )
    )
    borders = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    spans = list(zip(borders[::2], borders[1::2], strict=False))
    encoding = FAMILIES[family].encode(text, add_special_tokens=False)
    expected = [any(start <= first < end for start, end in spans) for first, _ in encoding.offsets]
    assert trained_mask(encoding, spans, len(text)).tolist() == expected


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("typed", ["{e}", "x{e}y", " {e} {s} the fox", "{s}{e}"])
def test_typed_control_tokens_stay_text_in_every_family(family, typed, chat, encode):
    """Also where the control token is a word of the model's vocabulary, typing it gives no control token."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(FAMILIES[family].to_str()),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    tokenizer.chat_template = CHATML_LIKE
    content = "the capital " + typed.format(s="<s>", e="</s>")
    example = encode(tokenizer, chat(("user", content), ("assistant", content)))
    opening, closing = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    controls = [int(i) for i in example.input_ids if i in (opening, closing)]
    assert controls == [opening, closing, opening, closing]
    assert example.trained[-1]
    first_answer = np.flatnonzero(example.input_ids == opening)[1]
    assert not example.trained[: first_answer + 1].any()
    # Up to the first typed control token nothing differs from the ordinary path.
    ordinary = encode(tokenizer, chat(("user", "the capital"), ("assistant", "the capital")))
    assert example.input_ids[:3].tolist() == ordinary.input_ids[:3].tolist()


def test_slow_path_equals_the_fast_one_where_both_apply(make_tokenizer, chat, encode):
    """The private names change no id: the slow path, forced by one typed token, agrees on all else."""
    tokenizer = make_tokenizer("llama3")
    turns = [("user", "naïve café 😀"), ("assistant", "The capital\n\n of France.")]
    fast = encode(tokenizer, chat(*turns, ("user", "end"), ("assistant", "ok")))
    slow = encode(tokenizer, chat(*turns, ("user", "<|eot_id|>"), ("assistant", "ok")))
    same = len(encode(tokenizer, chat(*turns)).input_ids) - 1
    assert slow.input_ids[:same].tolist() == fast.input_ids[:same].tolist()
    assert slow.trained[:same].tolist() == fast.trained[:same].tolist()
