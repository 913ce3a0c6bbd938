"""Where in a rendered conversation an answer stands: from the end of its prompt through its terminator.

The prompt is what inference feeds the model, so where the answer begins is known. Its end is the first terminator
after the answer's text. What a user typed holds no control token (`render.py` breaks it), so that terminator is the
template's own. Some templates write one before the answer too, to close a thought, and some rewrite the answer, to take
a thought out of it. There the conversation is rendered again with a mark in the answer's place, and the text after the
mark's terminator, which must be the same, tells where the answer ends.
"""

from __future__ import annotations

from lora_cli.data.sandbox import Chat, ChatTemplate, Tools
from lora_cli.data.special import Terminators
from lora_cli.errors import InputError

Span = tuple[int, int]
"""Characters [start, end)."""

_MARK = "\ufdd3the answer\ufdd3"
"""Stands between Unicode noncharacters, which no text holds."""


def answer_span(
    template: ChatTemplate,
    terminators: Terminators,
    chat: Chat,
    tools: Tools,
    turn: int,
    text: str,
    head: str,
) -> Span:
    """Return where in `text`, the whole conversation rendered, the assistant turn `turn` is trained.

    `head` is what inference feeds the model before it.

    Raises:
        InputError: if the template is not consistent with itself for this conversation.
    """
    start = len(head)
    if not text.startswith(head):
        raise InputError(
            f"turn {turn + 1}: the chat template renders what stands before this answer otherwise than "
            "the prompt for it, so training would not match inference (use another data.template)"
        )
    message = chat[turn]
    if "tool_calls" in message:
        return start, _end_of_call(template, terminators, chat[: turn + 1], tools, text, start)
    terminator = terminators.last if turn == len(chat) - 1 else terminators.middle
    if terminator is not None:
        end = text.find(terminator, start)
        direct = terminators.direct and "reasoning_content" not in message
        if direct and end >= 0 and text.find(message["content"].strip(), start, end) >= 0:
            return start, end + len(terminator)
        if end >= 0:
            return start, _end_by_mark(template, chat, tools, turn, text, start, terminator)
    raise InputError(f"turn {turn + 1}: the chat template writes no terminator after this answer")


def _end_of_call(
    template: ChatTemplate, terminators: Terminators, chat: Chat, tools: Tools, text: str, start: int
) -> int:
    """Return where a turn that calls functions ends; `chat` ends with it.

    The call's text is the template's own. It ends where the conversation up to it ends; where the template writes that
    otherwise (without its thought), at the first terminator of a call.
    """
    known = [one for one in (terminators.call, terminators.last, terminators.middle) if one is not None]
    (whole,) = template.render([(chat, tools)], generation_prompt=False)
    if isinstance(whole, str) and len(whole) > start and text.startswith(whole.rstrip()):
        end = len(whole.rstrip())
    else:
        place = -1 if terminators.call is None else text.find(terminators.call, start)
        end = place + len(terminators.call or "") if place >= 0 else -1
    if end < start or not text[:end].endswith(tuple(known)):
        raise InputError(
            f"turn {len(chat)}: the chat template does not write this function call with a terminator after it"
        )
    return end


def _end_by_mark(
    template: ChatTemplate, chat: Chat, tools: Tools, turn: int, text: str, start: int, terminator: str
) -> int:
    """Return where an answer ends that does not stand in the text as it is, or has a terminator before it."""
    marked = [*chat[:turn], {**chat[turn], "content": _MARK}, *chat[turn + 1 :]]
    (found,) = template.render([(marked, tools)], generation_prompt=False)
    if isinstance(found, str) and found.count(_MARK) == 1:
        place = found.find(terminator, found.index(_MARK))
        rest = found[place + len(terminator) :]
        end = len(text) - len(rest)
        if place >= 0 and end > start and text.endswith(rest) and text[:end].endswith(terminator):
            return end
    raise InputError(
        f"turn {turn + 1}: the chat template does not write this answer in one place with a terminator after it"
    )
