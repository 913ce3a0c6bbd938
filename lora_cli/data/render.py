"""A conversation -> its text, and which characters of it are trained.

Template `model` is the tokenizer's chat template, rendered by transformers. For each assistant turn the
conversation before it is rendered with the generation prompt, exactly what inference feeds the model; the
whole rendering must begin with it, and the trained span runs from its end through the turn's terminator
(ChatML: `<|im_end|>` is trained, the line break after it is not). So no `{% generation %}` marks are needed,
and training and inference cannot differ.

Template `plain` is for models without one: turns stand one after the other, separated by a line break; an
answer is followed by the end token. Between a prompt and its answer the line break is left out where the row
brings its own white space (the prompt ends with it, or the answer begins with it), so `"Q: ...\\nA:"` and `"
42"` join as written.

Text that a user typed never becomes a control token: `<|im_end|>` in a message is marked (`BREAK` after its
first character) before the template sees it, and `tokens.py` encodes such a row by its slow path. `Text` rows
are the exception: they may be conversations that were rendered beforehand, so control tokens in them are
control tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_cli.data.faults import Faults
from lora_cli.data.special import (
    TEMPLATE_ERRORS,
    Chat,
    Terminators,
    any_of,
    apply_template,
    choose_template,
    find_terminators,
    settle_special_tokens,
    special_tokens,
)
from lora_cli.errors import InputError
from lora_cli.types import Conversation, Row, Text

__all__ = ["BREAK", "Rendered", "Renderer", "Span", "choose_template", "settle_special_tokens"]

BREAK = "\ufdd2"
"""Unicode noncharacter: no text holds it, and no template or tokenizer treats it specially."""
_RESERVED = any_of("\ufdd0\ufdd1\ufdd2")

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row's text; `spans` are its trained characters [start, end) in order.

    `add_bos`: the begin token goes first, if the tokenizer adds one by itself (a template writes its own).
    `broken`: user-typed control tokens in `text` hold a `BREAK`.
    """

    text: str
    spans: tuple[Span, ...]
    add_bos: bool
    broken: bool
    where: str


class Renderer:
    """Renders rows by one tokenizer and template; `train_on` is assistant or all.

    `spelled` are control tokens that a message may hold, unless they begin, end or pad a text or end an answer.
    """

    def __init__(self, tokenizer: Any, template: str, train_on: str, spelled: Sequence[str] = ()) -> None:
        assert template in ("model", "plain"), template
        assert train_on in ("assistant", "all"), train_on
        self._tokenizer = tokenizer
        self._train_all = train_on == "all"
        self._end = tokenizer.eos_token
        self._terminators = find_terminators(tokenizer) if template == "model" else None
        kept = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
        self.controls = {
            text: i for text, i in special_tokens(tokenizer).items() if text in kept or text not in spelled
        }
        if self._terminators is not None:
            for text in (self._terminators.last, self._terminators.middle):
                if text is not None:
                    self.controls[text] = int(tokenizer.convert_tokens_to_ids(text))
        self._control_pattern = any_of(self.controls)

    def render(self, rows: Sequence[Row], faults: Faults) -> list[Rendered | None]:
        """Return each row's text and trained spans; None for a bad row, which is added to `faults`."""
        results: list[Rendered | None] = [None] * len(rows)
        chats: list[tuple[int, Chat, bool]] = []
        for index, row in enumerate(rows):
            if isinstance(row, Text):
                results[index] = self._render_text(row)
                continue
            chat, broken = self._protect(row)
            if broken and any(_RESERVED.search(message.content) for message in row.messages):
                faults.add(
                    f"{row.where}: holds control tokens and Unicode noncharacters (remove U+FDD0 to U+FDD2)"
                )
            elif self._terminators is None:
                results[index] = self._render_plain(chat, broken, row.where)
            else:
                chats.append((index, chat, broken))
        if self._terminators is not None:
            wheres = [rows[index].where for index, _, _ in chats]
            rendered = self._render_model([chat for _, chat, _ in chats], wheres, self._terminators, faults)
            for (index, _, broken), found in zip(chats, rendered, strict=True):
                if found is not None:
                    results[index] = Rendered(found[0], found[1], False, broken, rows[index].where)
        return results

    def _protect(self, row: Conversation) -> tuple[Chat, bool]:
        """Return the messages with user-typed control tokens broken, and whether there were any."""
        chat: Chat = []
        broken = False
        for message in row.messages:
            content, count = self._control_pattern.subn(
                lambda match: f"{match[0][0]}{BREAK}{match[0][1:]}", message.content
            )
            broken = broken or count > 0
            chat.append({"role": message.role, "content": content})
        return chat, broken

    def _render_text(self, row: Text) -> Rendered:
        text = row.text if row.text.endswith(self._end) else row.text + self._end
        return Rendered(text, ((0, len(text)),), True, False, row.where)

    def _render_plain(self, chat: Chat, broken: bool, where: str) -> Rendered:
        text = ""
        spans: list[Span] = []
        for message in chat:
            role, content = message["role"], message["content"]
            joined = text[-1:].isspace() or (role == "assistant" and content[:1].isspace())
            if text and not joined:
                text += "\n"
            start = len(text)
            text += content
            if role == "assistant":
                text += self._end
                spans.append((start, len(text)))
        return Rendered(text, ((0, len(text)),) if self._train_all else tuple(spans), True, broken, where)

    def _apply(
        self, chats: list[Chat], wheres: list[str], faults: Faults, *, generation_prompt: bool
    ) -> list[str | None]:
        """Render all at once; one by one where the template refuses some, to name them."""
        try:
            return list(apply_template(self._tokenizer, chats, generation_prompt=generation_prompt))
        except TEMPLATE_ERRORS:
            pass
        results: list[str | None] = []
        for chat, where in zip(chats, wheres, strict=True):
            try:
                results += apply_template(self._tokenizer, [chat], generation_prompt=generation_prompt)
            except TEMPLATE_ERRORS as error:
                faults.add(f"{where}: the chat template refuses this conversation: {error}")
                results.append(None)
        return results

    def _render_model(
        self, chats: list[Chat], wheres: list[str], terminators: Terminators, faults: Faults
    ) -> list[tuple[str, tuple[Span, ...]] | None]:
        texts = self._apply(chats, wheres, faults, generation_prompt=False)
        if self._train_all:
            return [None if text is None else (text, ((0, len(text)),)) for text in texts]
        turns = [
            (row, turn)
            for row, chat in enumerate(chats)
            if texts[row] is not None
            for turn, message in enumerate(chat)
            if message["role"] == "assistant"
        ]
        # k turns are rendered k + 1 times; a rendering costs about a twentieth of encoding the same text.
        heads = self._apply(
            [chats[row][:turn] for row, turn in turns],
            [wheres[row] for row, _ in turns],
            faults,
            generation_prompt=True,
        )
        spans: list[list[Span] | None] = [[] for _ in chats]
        for (row, turn), head in zip(turns, heads, strict=True):
            found, text = spans[row], texts[row]
            if found is None or text is None:
                continue
            if head is None:
                spans[row] = None
                continue
            try:
                found.append(
                    _turn_span(text, head, chats[row], turn, terminators, found[-1][1] if found else 0)
                )
            except InputError as fault:
                faults.add(f"{wheres[row]}: {fault}")
                spans[row] = None
        return [
            None if text is None or found is None else (text, tuple(found))
            for text, found in zip(texts, spans, strict=True)
        ]


def _turn_span(
    text: str, head: str, chat: Chat, turn: int, terminators: Terminators, previous_end: int
) -> Span:
    """Return where in `text` the assistant turn `turn` is trained; `head` is what inference feeds before it.

    Raises:
        InputError: if the template is not consistent with itself for this conversation.
    """
    if not text.startswith(head):
        raise InputError(
            f"turn {turn + 1}: the chat template renders what stands before this answer otherwise than "
            "the prompt for it, so training would not match inference (use data.template plain, or another "
            "template)"
        )
    start = len(head)
    is_last = turn == len(chat) - 1
    terminator = terminators.last if is_last else terminators.middle
    answer = chat[turn]["content"].strip()
    place = text.find(answer, start)
    place = start if place < 0 else place + len(answer)  # a template may rewrite the answer
    end = -1 if terminator is None else text.find(terminator, place)
    if end < 0 or start < previous_end:
        raise InputError(f"turn {turn + 1}: the chat template writes no terminator after this answer")
    return start, end + len(terminator or "")
