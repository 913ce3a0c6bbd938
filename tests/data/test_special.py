"""Padding and terminators: what is chosen, and what is refused."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken

from lora_cli.data.render import settle_special_tokens
from lora_cli.errors import InputError


def test_terminators_join_the_end_token(shape, shape_tokenizer):
    """Generation stops at the end token and at what the template writes after an answer."""
    _, stops = settle_special_tokens(shape_tokenizer, "auto")
    ids = shape_tokenizer.convert_tokens_to_ids([shape.eos, shape.terminator])
    assert stops == tuple(dict.fromkeys(ids))


def test_plain_stops_at_the_end_token_alone(make_tokenizer):
    """The plain template has no terminator but the end token."""
    tokenizer = make_tokenizer("gemma")
    assert settle_special_tokens(tokenizer, "plain")[1] == (tokenizer.eos_token_id,)


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        ([], "<|im_end|>"),
        (["<unk>"], "<unk>"),
        (["<unk>", "<|reserved_special_token_0|>"], "<|reserved_special_token_0|>"),
        (["<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"], "<|finetune_right_pad_id|>"),
        (["<|notepad|>"], "<|im_end|>"),
    ],
)
def test_padding_prefers_a_token_made_for_it(make_tokenizer, added, expected):
    """Without a pad token: one named so, else a reserved one, else unk, else the end token."""
    tokenizer = make_tokenizer("chatml")
    tokenizer.add_tokens([AddedToken(text, special=True) for text in added], special_tokens=True)
    before = tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map
    pad, stops = settle_special_tokens(tokenizer, "auto")
    assert tokenizer.convert_ids_to_tokens(pad) == expected
    assert expected == "<|im_end|>" or pad not in stops
    assert (tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map) == before


def test_the_tokenizers_own_padding_wins(make_tokenizer):
    """A tokenizer that names its pad token keeps it, even where that is the end token."""
    tokenizer = make_tokenizer("chatml")
    for text in ("<|end|>", "<|im_end|>"):
        tokenizer.pad_token = text
        assert settle_special_tokens(tokenizer, "auto")[0] == tokenizer.convert_tokens_to_ids(text)


def test_no_end_token_is_refused(make_tokenizer):
    """A tokenizer without an end token cannot teach a model to stop."""
    tokenizer = make_tokenizer("chatml")
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end token"):
        settle_special_tokens(tokenizer, "plain")
