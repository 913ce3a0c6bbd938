"""Tokens that a recipe names: their ids, new ones added to the tokenizer, and whether the rows use them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken

from lora_cli.errors import InputError
from lora_cli.types import Prepared


def token_ids(tokenizer: Any, names: Sequence[str]) -> list[int]:
    """Return the ids of tokens by their text, `<tool>`, or as the vocabulary writes them, `Ġtool`.

    Raises:
        InputError: the tokenizer has no such token, or two names are one token.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab() if names else {}
    found: dict[int, str] = {}
    for name in names:
        if name not in vocabulary:
            near = difflib.get_close_matches(name, tokenizer.get_added_vocab(), n=3, cutoff=0.5)
            near += difflib.get_close_matches(name, vocabulary, n=2, cutoff=0.8) if not near else []
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise InputError(
                f"adapter.train_tokens: {name!r} is no token of the model ({hint}a new one goes under"
                " adapter.add_tokens)"
            )
        if vocabulary[name] in found:
            raise InputError(f"adapter.train_tokens: {name!r} and {found[vocabulary[name]]!r} are one token")
        found[vocabulary[name]] = name
    return list(found)


def add_tokens(tokenizer: Any, names: Sequence[str]) -> None:
    """Give the tokenizer new tokens, in order, after those that it has; wherever a text has one, it is that token.

    They are ordinary tokens, no control tokens: a message may hold them, and decoding keeps them.

    Raises:
        InputError: it has one of them already.
    """
    vocabulary = tokenizer.get_vocab() if names else {}
    for name in names:
        if name in vocabulary:
            raise InputError(
                f"adapter.add_tokens: {name!r} is a token of the model already, {vocabulary[name]} (put it under"
                " adapter.train_tokens)"
            )
    # Not normalized: a tokenizer that lowers or strips its text would not find `<Tool>` again.
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])


def require_used(prepared: Prepared, names: Sequence[str]) -> None:
    """Refuse to train tokens that no training row holds.

    Raises:
        InputError: with the tokens.
    """
    examples, missing = prepared.train, dict(zip(token_ids(prepared.tokenizer, names), names, strict=True))
    assert examples is not None
    for row in range(len(examples)):
        if not missing:
            return
        ids = np.concatenate([answer.input_ids for answer in examples[row].answers()])
        for token in missing.keys() & set(np.unique(ids).tolist()):
            del missing[token]
    if missing:
        raise InputError(
            f"adapter.train_tokens: no row of data.train has {', '.join(map(repr, missing.values()))} (as rendered by"
            " the template; is it spelled as in the data?)"
        )
