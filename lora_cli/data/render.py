"""A conversation -> its text, and which characters of it are trained.

A chat template, the tokenizer's or the recipe's, runs in `sandbox.py`. For each assistant turn that is trained the
conversation before it is rendered with the generation prompt, exactly what inference feeds the model; the
whole rendering must begin with it, and the trained span runs from its end through the turn's terminator
(ChatML: `<|im_end|>` is trained, the line break after it is not; `answers.py` finds it). So no `{% generation %}`
marks are needed, and training and inference cannot differ.

Which turns are trained is `train_on`'s choice, and the row's own (`train: false`).

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

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_cli.data.answers import Span, answer_span
from lora_cli.data.faults import Faults
from lora_cli.data.sandbox import Chat, Tools, describe
from lora_cli.data.special import (
    Terminators,
    any_of,
    choose_template,
    find_terminators,
    settle_special_tokens,
    special_tokens,
    template_of,
)
from lora_cli.errors import InputError
from lora_cli.types import Conversation, Text

__all__ = ["BREAK", "Rendered", "Renderer", "Span", "choose_template", "settle_special_tokens"]

BREAK = "\ufdd2"
"""Unicode noncharacter: no text holds it, and no template or tokenizer treats it specially."""
_RESERVED = any_of("\ufdd0\ufdd1\ufdd2")


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


@dataclass(frozen=True, slots=True)
class _Chat:
    """A conversation as the template takes it, its control tokens broken where the user typed some."""

    turns: Chat
    tools: Tools
    broken: bool
    trained: frozenset[int]
    where: str


class Renderer:
    """Renders rows by one tokenizer and template; `train_on` is assistant, last_assistant, completion or all.

    `spelled` are control tokens that a message may hold, unless they begin, end or pad a text or end an answer.
    """

    def __init__(self, tokenizer: Any, template: str, train_on: str, spelled: Sequence[str] = ()) -> None:
        self._train_on = train_on
        self._end = tokenizer.eos_token
        self._template = None if template == "plain" else template_of(tokenizer, template)
        self._terminators = find_terminators(tokenizer, self._template) if self._template else None
        kept = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
        self.controls = {
            text: i for text, i in special_tokens(tokenizer).items() if text in kept or text not in spelled
        }
        if self._terminators is not None:
            for text in (self._terminators.last, self._terminators.middle, self._terminators.call):
                if text is not None:
                    self.controls[text] = int(tokenizer.convert_tokens_to_ids(text))
        self._control_pattern = any_of(self.controls)

    def render(self, rows: Sequence[Conversation | Text], faults: Faults) -> list[Rendered | None]:
        """Return each row's text and trained spans; None for a bad row, which is added to `faults`."""
        results: list[Rendered | None] = [None] * len(rows)
        chats: list[tuple[int, _Chat]] = []
        for index, row in enumerate(rows):
            if isinstance(row, Text):
                results[index] = self._render_text(row)
                continue
            try:
                chat = self._prepare(row)
                if self._terminators is None:
                    results[index] = self._render_plain(chat)
                else:
                    chats.append((index, chat))
            except InputError as fault:
                faults.add(f"{row.where}: {fault}")
        if self._terminators is not None:
            rendered = self._render_model([chat for _, chat in chats], self._terminators, faults)
            for (index, _), found in zip(chats, rendered, strict=True):
                results[index] = found
        return results

    def _prepare(self, row: Conversation) -> _Chat:
        """Return the conversation with user-typed control tokens broken.

        Raises:
            InputError: it cannot be protected, or does not say what its completion is.
        """
        broken = False

        def protect(value: Any) -> Any:
            nonlocal broken
            if isinstance(value, str):
                value, count = self._control_pattern.subn(
                    lambda match: f"{match[0][0]}{BREAK}{match[0][1:]}", value
                )
                broken = broken or count > 0
                return value
            if isinstance(value, Mapping):
                return {protect(key): protect(inner) for key, inner in value.items()}
            return [protect(inner) for inner in value] if isinstance(value, list | tuple) else value

        turns = [
            {
                "role": turn.role,
                "content": protect(turn.content),
                **(protect(turn.extra) if turn.extra else {}),
            }
            for turn in row.messages
        ]
        for turn in turns:  # transformers gives templates both names
            if "reasoning_content" in turn:
                turn["thinking"] = turn["reasoning_content"]
        tools = protect(row.tools)
        if broken:
            said = [[turn.content, dict(turn.extra)] for turn in row.messages]
            if _RESERVED.search(json.dumps(said, ensure_ascii=False)):
                raise InputError("holds control tokens and Unicode noncharacters (remove U+FDD0 to U+FDD2)")
        if tools and self._terminators is not None and not self._terminators.tools:
            raise InputError(
                "offers functions, which the chat template does not tell the model of (use one that does, or remove"
                " the row's tools)"
            )
        return _Chat(turns, tools, broken, self._trained_turns(row), row.where)

    def _trained_turns(self, row: Conversation) -> frozenset[int]:
        answers = [index for index, turn in enumerate(row.messages) if turn.role == "assistant"]
        if self._train_on == "last_assistant":
            answers = answers[-1:]
        elif self._train_on == "completion":
            if row.prompt_turns is None:
                raise InputError(
                    "objective.train_on completion needs rows that say what the completion is, such as"
                    " prompt_completion, alpaca or data.fields (or use last_assistant)"
                )
            answers = [index for index in answers if index >= row.prompt_turns]
        return frozenset(index for index in answers if row.messages[index].trained)

    def _render_text(self, row: Text) -> Rendered:
        text = row.text if row.text.endswith(self._end) else row.text + self._end
        return Rendered(text, ((0, len(text)),), True, False, row.where)

    def _render_plain(self, chat: _Chat) -> Rendered:
        if chat.tools or any("tool_calls" in turn for turn in chat.turns):
            raise InputError(
                "calls functions, which template plain cannot write (use a chat template that can)"
            )
        text = ""
        spans: list[Span] = []
        for index, message in enumerate(chat.turns):
            role, content = message["role"], message["content"]
            joined = text[-1:].isspace() or (role == "assistant" and content[:1].isspace())
            if text and not joined:
                text += "\n"
            start = len(text)
            text += content
            if role == "assistant":
                text += self._end
                spans += [(start, len(text))] if index in chat.trained else []
        if self._train_on == "all":
            spans = [(0, len(text))]
        return Rendered(text, tuple(spans), True, chat.broken, chat.where)

    def _apply(
        self, chats: Sequence[tuple[_Chat, int | None]], faults: Faults, *, generation_prompt: bool
    ) -> list[str | None]:
        """Render each chat up to its turn `end`; a chat that the template refuses joins the faults."""
        assert self._template is not None
        found = self._template.render(
            [(chat.turns[:end], chat.tools) for chat, end in chats], generation_prompt=generation_prompt
        )
        results: list[str | None] = []
        for (chat, _), text in zip(chats, found, strict=True):
            if isinstance(text, Exception):
                faults.add(f"{chat.where}: the chat template refuses this conversation: {describe(text)}")
            results.append(None if isinstance(text, Exception) else text)
        return results

    def _render_model(
        self, chats: Sequence[_Chat], terminators: Terminators, faults: Faults
    ) -> list[Rendered | None]:
        assert self._template is not None
        texts = self._apply([(chat, None) for chat in chats], faults, generation_prompt=False)
        if self._train_on == "all":
            return [
                None if text is None else Rendered(text, ((0, len(text)),), False, chat.broken, chat.where)
                for chat, text in zip(chats, texts, strict=True)
            ]
        wanted = [
            (row, turn)
            for row, chat in enumerate(chats)
            if texts[row] is not None
            for turn in sorted(chat.trained)
        ]
        # k trained turns are rendered k + 1 times; a rendering costs about a twentieth of encoding the same text.
        heads = self._apply([(chats[row], turn) for row, turn in wanted], faults, generation_prompt=True)
        spans: list[list[Span] | None] = [None if text is None else [] for text in texts]
        for (row, turn), head in zip(wanted, heads, strict=True):
            found, text, chat = spans[row], texts[row], chats[row]
            if found is None or text is None or head is None:
                spans[row] = None
                continue
            try:
                span = answer_span(self._template, terminators, chat.turns, chat.tools, turn, text, head)
                if found and span[0] < found[-1][1]:
                    raise InputError(
                        f"turn {turn + 1}: the chat template writes this answer before an earlier one"
                    )
                found.append(span)
            except InputError as fault:
                faults.add(f"{chat.where}: {fault}")
                spans[row] = None
        return [
            None
            if text is None or found is None
            else Rendered(text, tuple(found), False, chat.broken, chat.where)
            for chat, text, found in zip(chats, texts, spans, strict=True)
        ]
