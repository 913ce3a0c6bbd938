"""Lists of turns, OpenAI's `role` and `content` or ShareGPT's `from` and `value` -> `Message`s in a sound order.

A turn is taken as written. What a chat template can use besides its text goes into `Message.extra`: tool calls with
their arguments as objects (templates print them as JSON themselves), names, reasoning. What would change what the model
is given and cannot be passed on is refused, not dropped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lora_cli.data.columns import kind_of, parsed, quoted, text_of
from lora_cli.errors import InputError
from lora_cli.types import Message

ROLES = ("system", "user", "assistant", "tool")
_OTHER_NAMES = {
    "developer": "system",
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
_CALLS = ("function_call", "tool_call")
"""ShareGPT's roles of an assistant turn whose text is a call."""
_FOLLOWS = {
    "user": ("", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
    "system": ("",),
}
_PASSED_ON = ("name", "tool_call_id")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_REFUSED = ("audio", "refusal", "images", "image", "videos")
_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):[ ]?")


def turns(value: Any, field: str, where: str) -> tuple[Message, ...]:
    """Return a list of turns as messages, in whatever order they are.

    Raises:
        InputError: it is no list, or a turn is none.
    """
    if not isinstance(value, list):
        raise InputError(f"{where}: {field} is {kind_of(value)} (a list of messages is needed)")
    return tuple(_message(item, f"{field}[{index}]", where) for index, item in enumerate(value))


def check_order(messages: Sequence[Message], field: str, where: str) -> None:
    """Refuse turns out of order, and conversations whose last turn is not the assistant's.

    Raises:
        InputError: a turn cannot follow the one before it, or there is nothing to learn.
    """
    before = ""
    for index, message in enumerate(messages):
        if before not in _FOLLOWS[message.role]:
            place = f"follows {before}" if before else "comes first"
            raise InputError(
                f"{where}: {field}[{index}]: role {message.role} {place}: turns are out of order"
            )
        before = message.role
    if not any(message.role == "assistant" for message in messages):
        raise InputError(f"{where}: {field}: no assistant turn (there is nothing to learn)")
    if before != "assistant":
        raise InputError(f"{where}: {field}: the last turn is {before}'s (end with the assistant's answer)")


def message(value: Any, field: str, where: str) -> Message:
    """Return one turn, an object; or a text, which is taken as the assistant's answer.

    Raises:
        InputError: it is neither.
    """
    if isinstance(value, str):
        return Message("assistant", text_of(value, field, where))
    return _message(value, field, where)


def transcript(text: str, field: str, where: str) -> tuple[Message, ...]:
    """Return the turns of a text that begins each with a blank line and `Human:` or `Assistant:` (HH-RLHF).

    Raises:
        InputError: it does not begin with such a mark, or a turn is empty.
    """
    parts = _TRANSCRIPT.split("\n\n" + text.lstrip("\n"))
    if parts[0].strip() or len(parts) < 3:
        raise InputError(
            f"{where}: {field} is no transcript, which begins with Human: or Assistant: (or give the row a prompt)"
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(
        Message(roles[name], text_of(said.strip(), f"{field}, turn {number}", where))
        for number, (name, said) in enumerate(zip(parts[1::2], parts[2::2], strict=True), start=1)
    )


def functions(value: Any, field: str, where: str) -> tuple[dict[str, Any], ...]:
    """Return the functions a row offers, each as `{"type": "function", "function": {...}}`.

    Raises:
        InputError: it is no list of function descriptions with names.
    """
    value = parsed(value or [], field, where)
    if not isinstance(value, list):
        raise InputError(f"{where}: {field} is {kind_of(value)} (a list of functions is needed)")
    found = []
    for index, item in enumerate(value):
        inner = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise InputError(f"{where}: {field}[{index}] is no function (an object with a name is needed)")
        found.append({"type": "function", "function": inner})
    return tuple(found)


def _message(item: Any, field: str, where: str) -> Message:
    if not isinstance(item, dict):
        raise InputError(f"{where}: {field} is {kind_of(item)} (an object with role and content is needed)")
    role_key, text_key = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    if role_key not in item:
        raise InputError(
            f"{where}: {field}.{role_key} is missing (an object with role and content is needed)"
        )
    role = _role(item[role_key], f"{field}.{role_key}", where)
    for key in _REFUSED:
        if item.get(key):
            raise InputError(f"{where}: {field}.{key} is not supported (remove it, or the row)")
    extra: dict[str, Any] = {
        key: text_of(item[key], f"{field}.{key}", where, empty=True)
        for key in _PASSED_ON
        if item.get(key) is not None
    }
    reasoning = next((key for key in _REASONING if item.get(key)), None)
    if reasoning is not None:
        extra["reasoning_content"] = text_of(item[reasoning], f"{field}.{reasoning}", where)
    calls = _calls(item, role_key, text_key, field, where)
    if calls:
        if role != "assistant":
            raise InputError(f"{where}: {field}: {role} calls a function (only the assistant can)")
        extra["tool_calls"] = calls
    value = item.get(text_key)
    if calls and item[role_key] in _CALLS:
        content = ""
    elif text_key not in item and not calls:
        raise InputError(f"{where}: {field}.{text_key} is missing")
    elif value is None and calls:
        content = ""
    else:
        content = _content(
            value, f"{field}.{text_key}", where, empty=bool(calls) or role in ("system", "tool")
        )
    return Message(role, content, _trained(item, role, field, where), extra)


def _role(value: Any, field: str, where: str) -> str:
    role = _OTHER_NAMES.get(value, value) if isinstance(value, str) else value
    if role in _CALLS:
        return "assistant"
    if role not in ROLES:
        raise InputError(f"{where}: {field} is {quoted(value)} (one of {', '.join(ROLES)})")
    return str(role)


def _content(value: Any, field: str, where: str, *, empty: bool) -> str:
    """Return a turn's text; parts are joined as they stand."""
    if isinstance(value, list):
        parts = []
        for index, part in enumerate(value):
            kind = part.get("type", "text") if isinstance(part, dict) else kind_of(part)
            if isinstance(part, str):
                parts.append(part)
            elif kind == "text" and isinstance(part, dict):
                parts.append(text_of(part.get("text"), f"{field}[{index}].text", where, empty=True))
            else:
                raise InputError(f"{where}: {field}[{index}] is {kind} (only text parts are supported)")
        value = "".join(parts)
    return text_of(value, field, where, empty=empty)


def _calls(
    item: dict[str, Any], role_key: str, text_key: str, field: str, where: str
) -> list[dict[str, Any]]:
    """Return the function calls of a turn, with their arguments as objects."""
    if item[role_key] in _CALLS:
        written, name = item.get(text_key), f"{field}.{text_key}"
    elif item.get("function_call") is not None:
        written, name = item["function_call"], f"{field}.function_call"
    else:
        written, name = item.get("tool_calls") or [], f"{field}.tool_calls"
    calls = []
    written = parsed(written, name, where)
    for index, call in enumerate(written if isinstance(written, list) else [written]):
        place = f"{name}[{index}]" if isinstance(written, list) else name
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise InputError(f"{where}: {place} is no call (an object with name and arguments is needed)")
        given = parsed(inner.get("arguments") or {}, f"{place}.arguments", where)
        if not isinstance(given, dict):
            raise InputError(f"{where}: {place}.arguments is {kind_of(given)} (an object is needed)")
        named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append(named | {"type": "function", "function": {"name": inner["name"], "arguments": given}})
    return calls


def _trained(item: dict[str, Any], role: str, field: str, where: str) -> bool:
    """Return whether an answer is trained, as its `train` (true, false) or `weight` (1, 0) says."""
    for key, known in {"train": (True, False), "training": (True, False), "weight": (1, 0)}.items():
        value = item.get(key)
        if value is None:
            continue
        if role != "assistant" and value:
            raise InputError(
                f"{where}: {field}.{key} is {quoted(value)} (only an assistant turn can be trained)"
            )
        if value not in known or isinstance(value, bool) is not isinstance(known[0], bool):
            listed = " or ".join(str(one).lower() for one in known)
            raise InputError(f"{where}: {field}.{key} is {quoted(value)} (write {listed})")
        return bool(value)
    return True
