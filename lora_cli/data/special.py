"""Tokens with a meaning of their own: which exist, which one ends an answer, which one pads.

The terminator of an answer is not guessed from the tokenizer's configuration: the chat template is rendered
with a known conversation, and the first control token that it writes after the answer is the one a model must
learn to write and generation must stop at. It often differs from the end token (`<|im_end|>` against
`<|endoftext|>`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from lora_cli.errors import InputError

Chat = list[dict[str, Any]]
"""Turns as chat templates take them: `role`, `content`, and what else a message has."""
Tools = Sequence[Mapping[str, Any]]

TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError)
"""What a template can raise while it is rendered: Jinja's own errors, and Python's from its expressions."""

_PAD = (r"pad", r"reserved", r"unk")
_PROBE: Chat = [
    {"role": "user", "content": "First probe of lora-cli."},
    {"role": "assistant", "content": "First reply of lora-cli."},
    {"role": "user", "content": "Second probe of lora-cli."},
    {"role": "assistant", "content": "Second reply of lora-cli."},
]
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


def any_of(strings: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of `strings`, a longer one before one that it contains."""
    longest_first = sorted(strings, key=len, reverse=True)
    return re.compile("|".join(re.escape(string) for string in longest_first) or r"(?!)")


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Return text -> id of the tokenizer's special tokens."""
    return {token.content: int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def apply_template(
    tokenizer: Any, chats: Sequence[Chat], tools: Sequence[Tools] | None = None, *, generation_prompt: bool
) -> list[str]:
    """Render conversations by the tokenizer's chat template, in transformers' own sandbox; `tools` for each of them.

    Raises:
        TEMPLATE_ERRORS: if the template refuses one of them.
    """
    settings: dict[str, Any] = {"tokenize": False, "add_generation_prompt": generation_prompt}
    if tools is None or not any(tools):
        return list(tokenizer.apply_chat_template(list(chats), **settings)) if chats else []
    return [
        str(tokenizer.apply_chat_template(chat, tools=[dict(one) for one in own] or None, **settings))
        for chat, own in zip(chats, tools, strict=True)
    ]


def find_terminators(tokenizer: Any) -> Terminators:
    """Find what the chat template writes at the end of an answer.

    Raises:
        InputError: if the template fails, does not write the turns in order, or writes no control token after
            the answer.
    """
    try:
        (text,) = apply_template(tokenizer, [_PROBE], generation_prompt=False)
    except TEMPLATE_ERRORS as error:
        raise InputError(f"model.base: the chat template fails: {error} (use data.template plain)") from error
    places = [text.find(message["content"]) for message in _PROBE]
    if -1 in places or places != sorted(places):
        raise InputError(
            "model.base: the chat template does not write the turns in order (use data.template plain)"
        )
    ends = [place + len(message["content"]) for place, message in zip(places, _PROBE, strict=True)]
    last = _first_control(tokenizer, text[ends[3] :])
    if last is None:
        raise InputError(
            "model.base: the chat template writes no control token after an assistant turn, so the model "
            "could not learn to stop (use data.template plain, or another template)"
        )
    middle = _first_control(tokenizer, text[ends[1] : places[2]])
    if middle != last and middle is not None and middle in text[: places[0]]:
        middle = None  # it opens the next user turn, as it opened the first
    return Terminators(last, middle, _call_terminator(tokenizer))


def _call_terminator(tokenizer: Any) -> str | None:
    """Return what the template writes after an answer that calls a function, None where it cannot write one."""
    chat: Chat = [_PROBE[0], {"role": "assistant", "content": "", "tool_calls": [_CALL]}]
    try:
        (text,) = apply_template(tokenizer, [chat], [[_TOOL]], generation_prompt=False)
    except TEMPLATE_ERRORS:
        return None
    call = text.rfind("lora-cli")
    if call < text.find(_PROBE[0]["content"]) + len(_PROBE[0]["content"]):
        return None  # it passes over the call
    controls = any_of(special_tokens(tokenizer)).findall(text, call)
    return controls[-1] if controls and text.rstrip().endswith(controls[-1]) else None


def _first_control(tokenizer: Any, text: str) -> str | None:
    """Return the first special token in `text`; where there is none, the first of the other added tokens."""
    for candidates in (special_tokens(tokenizer), tokenizer.get_added_vocab()):
        found = any_of(candidates).search(text)
        if found:
            return found.group()
    return None


def choose_template(tokenizer: Any, wanted: str) -> str:
    """Return `model` or `plain` for the recipe's data.template.

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
    if choose_template(tokenizer, template) == "model":
        found = find_terminators(tokenizer)
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
