"""Conversations as the model is fed them, and its tokens as text: by the renderer and the encoder of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_cli.data.faults import Faults
from lora_cli.data.render import Rendered, Renderer, choose_template, settle_special_tokens
from lora_cli.data.tokens import Encoder
from lora_cli.types import Conversation, Message

_ANSWER = Message("assistant", "An answer.")
"""Stands where the answer will, so that the renderer says where it begins."""


class Conversations:
    """The tokenizer and template of one model; `wanted` is the recipe's data.template, which the tokenizer has."""

    def __init__(self, tokenizer: Any, wanted: str) -> None:
        template = choose_template(tokenizer, wanted)
        self.pad_id, self.stop_ids = settle_special_tokens(tokenizer, template)
        self._tokenizer = tokenizer
        self._renderer = Renderer(tokenizer, template, "completion")
        self._encoder = Encoder(tokenizer, self._renderer.controls)

    def encode(self, turns: Sequence[Message]) -> npt.NDArray[np.int32]:
        """Return the tokens (T,) after which the model writes its turn.

        Raises:
            InputError: the template refuses the conversation.
        """
        faults = Faults("conversation")
        row = Conversation((*turns, _ANSWER), "a conversation", prompt_turns=len(turns))
        (rendered,) = self._renderer.render([row], faults)
        faults.raise_if_any()
        assert rendered is not None
        head = rendered.text[: rendered.spans[0][0]]
        (example,) = self._encoder.encode([Rendered(head, (), rendered.add_bos, rendered.broken, row.where)])
        return example.input_ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of an answer, control tokens and white space around it left out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.strip()
