"""Rendered text -> ids and the trained mask.

The whole text is encoded once, so its ids are those of the text and no token is merged or split at a border
that inference does not have. A token is trained if it overlaps a trained span and begins at or after the
span's start. A token that straddles the start (an answer that begins inside a token) is not trained: at
inference the prompt ends there, so the model is never asked for that token.

Offsets come from a copy of the backend without its post-processor: `ByteLevel(trim_offsets=True)` leaves the
white space of a token out of its offsets, which hides that the token straddles the border.

Rows in which a user typed control tokens take a slow path: in a second copy of the backend every control
token has a private name (`U+FDD0 id U+FDD1`); the template's control tokens are given these names in the
text, and what the user typed is ordinary text there, in one pass and with exact offsets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_cli.data.render import BREAK, Rendered, Span
from lora_cli.data.special import added_bos, any_of
from lora_cli.errors import InputError
from lora_cli.types import Example

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


class Encoder:
    """Encodes rendered rows by one tokenizer; `controls` are its control tokens, text -> id."""

    def __init__(self, tokenizer: Any, controls: Mapping[str, int]) -> None:
        self._spec = backend_json(tokenizer)
        self.backend = _bare(self._spec)
        self._controls = dict(controls)
        self._private: tuple[Any, Ids] | None = None
        self._bos_id = added_bos(tokenizer)
        # Text may well hold what the vocabulary lacks; every other control token must come from the template.
        self._never_from_text = [i for i in self._controls.values() if i != tokenizer.unk_token_id]

    def encode(self, rows: Sequence[Rendered]) -> list[Example]:
        """Return the tokens of each row.

        Raises:
            InputError: if the tokenizer makes a control token from ordinary text.
        """
        plain = [row for row in rows if not row.broken]
        encodings = iter(self.backend.encode_batch([row.text for row in plain], add_special_tokens=False))
        return [
            self._encode_broken(row) if row.broken else self._example(row, next(encodings)) for row in rows
        ]

    def _example(self, row: Rendered, encoding: Any) -> Example:
        ids = np.array(encoding.ids, dtype=np.int32)
        return self._finish(row, ids, trained_mask(encoding, row.spans, len(row.text)))

    def _finish(self, row: Rendered, ids: Ids, trained: Mask) -> Example:
        if row.add_bos and self._bos_id is not None and (not len(ids) or ids[0] != self._bos_id):
            ids = np.concatenate([np.array([self._bos_id], dtype=np.int32), ids])
            trained = np.concatenate([np.zeros(1, dtype=np.bool_), trained])
        trained[:1] = False  # nothing stands before the first token to predict it from
        return Example(ids, trained)

    def _encode_broken(self, row: Rendered) -> Example:
        if self._private is None:
            self._private = _private_backend(self._spec, self._controls)
        backend, to_id = self._private
        text, spans = _hide(row.text, row.spans, self._controls)
        encoding = backend.encode(text, add_special_tokens=False)
        ids = to_id[np.array(encoding.ids, dtype=np.int32)]
        written = [int(name) for name in _PRIVATE.findall(text)]
        if ids[np.isin(ids, self._never_from_text)].tolist() != written:
            raise InputError(f"{row.where}: the tokenizer makes a control token from the text of a message")
        return self._finish(row, ids, trained_mask(encoding, spans, len(text)))


def backend_json(tokenizer: Any) -> str:
    """Return the fast tokenizer's whole definition, without padding and truncation left by earlier calls.

    Raises:
        InputError: if the tokenizer is not a fast one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError("model.base: the tokenizer has no fast version (tokenizer.json)")
    backend.no_padding()
    backend.no_truncation()
    return str(backend.to_str())


def _bare(spec: str) -> Any:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(spec)
    backend.post_processor = None
    return backend


def trained_mask(encoding: Any, spans: Sequence[Span], length: int) -> Mask:
    """Return which tokens of a `tokenizers.Encoding` are trained; `length` is the text's, in characters."""
    trained = np.zeros(len(encoding.ids), dtype=np.bool_)  # (T,)
    for start, end in spans:
        trained[_first_from(encoding, start, length) : _first_from(encoding, end, length)] = True
    return trained


def _first_from(encoding: Any, position: int, length: int) -> int:
    """Return the first token that begins at or after a character; the number of tokens if there is none.

    Asking for single characters costs a tenth of fetching all offsets of a row.
    """
    if position == 0:
        return 0
    count = len(encoding)
    token = None
    while token is None:  # some tokenizers leave characters (white space) out of every token
        if position >= length:
            return count
        token = encoding.char_to_token(position)
        position += token is None
    while token < count and encoding.token_to_chars(token)[0] < position:
        token += 1
    return int(token)


_PRIVATE = re.compile("\ufdd0(\\d+)\ufdd1")


def _private_name(token_id: int) -> str:
    return f"\ufdd0{token_id}\ufdd1"


def _hide(text: str, spans: Sequence[Span], controls: Mapping[str, int]) -> tuple[str, tuple[Span, ...]]:
    """Give control tokens their private names and mend what the user typed; spans follow their text.

    Span borders never fall inside a control token, so the pieces between them can be treated one by one.
    """
    pattern = any_of(controls)
    borders = sorted({0, len(text), *(border for span in spans for border in span)})
    pieces: list[str] = []
    moved = {0: 0}
    length = 0
    for start, end in pairwise(borders):
        piece = pattern.sub(lambda match: _private_name(controls[match[0]]), text[start:end]).replace(
            BREAK, ""
        )
        pieces.append(piece)
        length += len(piece)
        moved[end] = length
    return "".join(pieces), tuple((moved[start], moved[end]) for start, end in spans)


def _private_backend(spec: str, controls: Mapping[str, int]) -> tuple[Any, Ids]:
    """Return a backend in which control tokens have private names, and its ids -> the tokenizer's ids."""
    data = json.loads(spec)
    names = {text: _private_name(token_id) for text, token_id in controls.items()}
    for token in data["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
        token["normalized"] = token["normalized"] and token["content"] not in names.values()
    model = data["model"]
    # Text could match a control token that is a word of the model (not in BPE, which only joins by merges).
    if model.get("type") == "Unigram":
        model["vocab"] = [[names.get(word, word), score] for word, score in model["vocab"]]
    elif model.get("type") in ("WordPiece", "WordLevel"):
        model["vocab"] = {names.get(word, word): i for word, i in model["vocab"].items()}
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    data["post_processor"] = None
    backend = _bare(json.dumps(data))
    to_id = np.arange(backend.get_vocab_size(with_added_tokens=True), dtype=np.int32)
    original = {token["content"]: token["id"] for token in data["added_tokens"]}
    for text, token_id in original.items():
        to_id[backend.token_to_id(text)] = token_id
    return backend, to_id
