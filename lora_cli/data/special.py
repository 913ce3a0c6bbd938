"""Tokens with a meaning of their own: which exist, which one ends an answer, which one pads.

The terminator of an answer is not guessed from the tokenizer's configuration: the chat template is rendered
with a known conversation, and the first control token that it writes after the answer is the one a model must
learn to write and generation must stop at. It often differs from the end token (`<|im_end|>` against
`<|endoftext|>`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lora_cli.data.sandbox import Chat, ChatTemplate, Tools, describe
from lora_cli.errors import InputError

_PAD = (r"pad", r"reserved", r"unk")
_PROBE: Chat = [
    {"role": "user", "content": "First probe of lora-cli."},
    {"role": "assistant", "content": "First reply of lora-cli."},
    {"role": "user", "content": "Second probe of lora-cli."},
    {"role": "assistant", "content": "Second reply of lora-cli."},
]
PROBE: list[tuple[Chat, Tools]] = [(_PROBE, [])]
"""Two questions with their answers: what every template must be able to render."""
_CALL = {"type": "function", "function": {"name": "probe", "arguments": {"of": "lora-cli"}}}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {"of": {"type": "string"}}},
    },
}


@dataclass(frozen=True, slots=True)
class Terminators:
    """Control tokens that a chat template writes after an answer.

    `middle`: where another turn follows. `call`: after an answer that calls a function, where templates can do that.
    """

    last: str
    middle: str | None
    call: str | None = None
    direct: bool = True
    """The first such token after the prompt is the answer's own: the template writes none before it (for a thought)."""
    tools: bool = True
    """The template tells the model which functions it may call."""


def any_of(strings: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of `strings`, a longer one before one that it contains."""
    longest_first = sorted(strings, key=len, reverse=True)
    return re.compile("|".join(re.escape(string) for string in longest_first) or r"(?!)")


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Return text -> id of the tokenizer's special tokens."""
    return {token.content: int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def template_of(tokenizer: Any, template: str) -> ChatTemplate:
    """Return the tokenizer's chat template, which the recipe calls `template`.

    Raises:
        InputError: if it is no valid template, or the tokenizer has several and none is the default.
    """
    name = "model.base: chat_template" if template in ("auto", "model") else f"data.template: {template}"
    found = tokenizer.chat_template
    if not isinstance(found, dict):
        return ChatTemplate(found, name, tokenizer.special_tokens_map)
    if "default" not in found:
        raise InputError(f"{name}: there are several ({', '.join(sorted(found))}) and none is the default")
    return ChatTemplate(
        found["default"], name, tokenizer.special_tokens_map, with_tools=found.get("tool_use")
    )


def probe(template: ChatTemplate) -> str:
    """Return a known conversation, rendered.

    Raises:
        InputError: if the template fails, or does not write the turns in order.
    """
    (text,) = template.render(PROBE, generation_prompt=False)
    if isinstance(text, Exception):
        raise InputError(
            f"{template.name}: the chat template fails: {describe(text)} (use another data.template)"
        )
    places = [text.find(message["content"]) for message in _PROBE]
    if -1 in places or places != sorted(places):
        raise InputError(
            f"{template.name}: the chat template does not write the turns in order (use another data.template)"
        )
    return text


def find_terminators(tokenizer: Any, template: ChatTemplate) -> Terminators:
    """Find what the chat template writes at the end of an answer.

    Raises:
        InputError: if the template fails, does not write the turns in order, or writes no control token after
            the answer.
    """
    text = probe(template)
    places = [text.find(message["content"]) for message in _PROBE]
    ends = [place + len(message["content"]) for place, message in zip(places, _PROBE, strict=True)]
    last = _first_control(tokenizer, text[ends[3] :])
    if last is None:
        raise InputError(
            f"{template.name}: the chat template writes no control token after an assistant turn, so the model "
            "could not learn to stop (use another data.template)"
        )
    middle = _first_control(tokenizer, text[ends[1] : places[2]])
    closes = _first_control(tokenizer, text[ends[0] : places[1]]) == middle  # a question too
    if middle != last and middle is not None and middle in text[: places[0]] and not closes:
        middle = None  # it opens the next user turn, as it opened the first
    (head,) = template.render([(_PROBE[:3], [])], generation_prompt=True)
    direct = not isinstance(head, str) or last not in text[len(head) : places[3]]
    call, tools = _calls(tokenizer, template)
    return Terminators(last, middle, call, direct, tools)


def _calls(tokenizer: Any, template: ChatTemplate) -> tuple[str | None, bool]:
    """Return what ends an answer that calls a function (None: it cannot write one), and if it writes functions."""
    chat: Chat = [_PROBE[0], {"role": "assistant", "content": "", "tool_calls": [_CALL]}]
    text, offered = template.render([(chat, [_TOOL]), (_PROBE, [_TOOL])], generation_prompt=False)
    tools = isinstance(offered, str) and _TOOL["function"]["description"] in offered
    if isinstance(text, Exception):
        return None, tools
    call = text.rfind("lora-cli")
    if call < text.find(_PROBE[0]["content"]) + len(_PROBE[0]["content"]):
        return None, tools  # it passes over the call
    controls = any_of(special_tokens(tokenizer)).findall(text, call)
    return controls[-1] if controls and text.rstrip().endswith(controls[-1]) else None, tools


def _first_control(tokenizer: Any, text: str) -> str | None:
    """Return the first special token in `text`; where there is none, the first of the other added tokens."""
    for candidates in (special_tokens(tokenizer), tokenizer.get_added_vocab()):
        found = any_of(candidates).search(text)
        if found:
            return found.group()
    return None


def added_bos(tokenizer: Any) -> int | None:
    """Return the begin token if the tokenizer puts one before a text by itself, else None."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return None
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return int(bos) if full[:1] == [bos] and full != bare else None


def choose_template(tokenizer: Any, wanted: str) -> str:
    """Return `plain`, or which chat template is used: `model`, or the name or file of the recipe's data.template.

    Raises:
        InputError: if `model` is wanted and the tokenizer has no chat template.
    """
    has_template = bool(tokenizer.chat_template)
    if wanted == "model" and not has_template:
        raise InputError("data.template: the model's tokenizer has no chat template (use plain)")
    if wanted == "auto":
        return "model" if has_template else "plain"
    return wanted


def settle_special_tokens(tokenizer: Any, template: str) -> tuple[int, tuple[int, ...]]:
    """Return the padding token, and the tokens that end an answer (the end token first); changes nothing.

    `template` is the recipe's data.template, or what it was settled to. Labels never depend on the padding
    token: only positions beyond a row's length are masked. So where nothing better exists the end token pads,
    and an end token inside a row is trained all the same.

    Raises:
        InputError: if the tokenizer has no end token, or its template is used and writes no terminator.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError(
            "model.base: the tokenizer has no end token (eos_token): a model could not learn to stop"
        )
    stops = [int(eos)]
    if choose_template(tokenizer, template) != "plain":
        found = find_terminators(tokenizer, template_of(tokenizer, template))
        for text in (found.last, found.middle, found.call):
            if text is not None:
                stops.append(int(tokenizer.convert_tokens_to_ids(text)))
    stop_ids = tuple(dict.fromkeys(stops))
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id), stop_ids
    used = {*stop_ids, tokenizer.bos_token_id}
    free = {text: i for text, i in special_tokens(tokenizer).items() if i not in used}
    for word in _PAD:
        for text, i in free.items():
            if re.search(rf"(?<![a-z]){word}", text, re.IGNORECASE):
                return i, stop_ids
    return int(eos), stop_ids
