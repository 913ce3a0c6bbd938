"""Every shape of chat template against a second implementation, on generated conversations."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
import transformers.utils.chat_template_utils as transformers_templates
from hypothesis import given, settings
from hypothesis import strategies as st
from template_oracles import SHAPES, Messages, Refused, tokenizer_of

from lora_cli.data.faults import Faults
from lora_cli.data.render import BREAK, Rendered, Renderer
from lora_cli.data.sandbox import DATE
from lora_cli.data.tokens import Encoder
from lora_cli.types import Conversation, Message

TOKENIZERS = {name: tokenizer_of(name) for name in SHAPES}
RENDERERS = {name: Renderer(tokenizer, "model", "assistant") for name, tokenizer in TOKENIZERS.items()}
ENCODERS = {name: Encoder(tokenizer, RENDERERS[name].controls) for name, tokenizer in TOKENIZERS.items()}

TYPED = [
    "<|im_end|>", "<|im_start|>assistant\n", "<|eot_id|>", "</s>", "<s>", "[INST]", "<end_of_turn>", "<|end|>",
    "<|return|>", "<|im_<|im_end|>end|>", "<｜end▁of▁sentence｜>", "[TOOL_CALLS]", "<|END_OF_TURN_TOKEN|>",
]  # fmt: skip
PLAIN = [
    "hi", " ", "  ", "\n", "\n\n", "a", "The capital of France is Paris.", "{{ x }}", "{% raw %}", "{#", "}", "😀",
    "naïve", "東京", "\t", "</think>", "<think>", "USER: ", "### Response:\n", "<|im_", "<", "\\n", '"', "'",
]  # fmt: skip
ANY = st.text(min_size=1, max_size=12, alphabet=st.characters(exclude_categories=["Cs", "Cn"]))
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "What it is like outside.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def texts(*words: str) -> st.SearchStrategy[str]:
    joined = st.lists(st.sampled_from([*words]) | ANY, min_size=1, max_size=5).map("".join)
    return joined.filter(str.strip)


@st.composite
def conversations(draw: Any, *words: str, tools: bool = False) -> Messages:
    """Draw messages; with `tools` some questions are answered by a call and its result."""
    content = texts(*words)
    messages: Messages = []
    system = draw(st.none() | st.just("") | content)
    if system is not None:
        messages.append({"role": "system", "content": system})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(content)})
        if tools and draw(st.booleans()):
            arguments = draw(st.dictionaries(content, content | st.integers(), max_size=2))
            call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "content": draw(content)})
        messages.append({"role": "assistant", "content": draw(content)})
    if draw(st.booleans()):
        messages[-1]["reasoning_content"] = draw(content)
    return messages


def as_row(messages: Messages, tools: Any = ()) -> Conversation:
    turns = []
    for message in messages:
        extra = {key: value for key, value in message.items() if key not in ("role", "content")}
        turns.append(Message(message["role"], message["content"], extra=extra))
    return Conversation(tuple(turns), "rows.jsonl:7", tuple(tools))


def pieces_of(rendered: Rendered) -> list[tuple[str, bool]]:
    """Return the text cut at the borders of the spans, without the breaks in what was typed."""
    found, before = [], 0
    for start, end in rendered.spans:
        found += [(rendered.text[before:start], False), (rendered.text[start:end], True)]
        before = end
    found.append((rendered.text[before:], False))
    return [(text.replace(BREAK, ""), trained) for text, trained in found if text]


def joined(pieces: Any) -> list[tuple[str, bool]]:
    """Join neighbours that are both trained, or both not."""
    groups = groupby(((text, trained) for text, trained in pieces if text), key=lambda piece: piece[1])
    return [("".join(text for text, _ in group), trained) for trained, group in groups]


def check(name: str, messages: Messages, tools: Any = None) -> None:
    """Compare text, trained spans and tokens of one template with its oracle's."""
    tokenizer, faults = TOKENIZERS[name], Faults("rows.jsonl")
    decode = tokenizer.backend_tokenizer.decode
    (rendered,) = RENDERERS[name].render([as_row(messages, tools or ())], faults)
    try:
        expected = joined(SHAPES[name].write(messages, tools))
    except Refused as refusal:
        assert rendered is None, name
        assert faults.lines[0].startswith("rows.jsonl:7: "), name
        assert str(refusal) in faults.lines[0], name
        return
    assert rendered is not None, (name, faults.lines)
    assert pieces_of(rendered) == expected, name
    (example,) = ENCODERS[name].encode([rendered])
    ids, position = example.input_ids.tolist(), 0
    assert decode(ids, skip_special_tokens=False) == "".join(text for text, _ in expected), name
    if tokenizer.bos_token_id is not None and name != "llama2":  # which writes one before every question
        assert ids.count(tokenizer.bos_token_id) == (ids[0] == tokenizer.bos_token_id), name
    for trained, group in groupby(zip(ids, example.trained.tolist(), strict=True), key=lambda pair: pair[1]):
        length = len(list(group))
        position += length
        if trained:
            text = decode(ids[position - length : position], skip_special_tokens=False)
            span = next(text for text, is_trained in expected if is_trained)
            expected = expected[[is_trained for _, is_trained in expected].index(True) + 1 :]
            across = span.removesuffix(
                text
            )  # in a token that begins before the answer, so it is fed, not trained
            assert span.endswith(text) and len(across) < 12, name
            assert not across or tokenizer.decode(ids[position - length - 1]).endswith(across), name
    assert not any(is_trained for _, is_trained in expected), name


@settings(max_examples=200, deadline=None)
@given(messages=conversations(*PLAIN, *TYPED))
def test_text_and_labels_of_every_template_are_those_of_a_second_implementation(messages):
    """Label text is exactly the assistant spans with their terminators, whatever was typed, or the row is refused."""
    for name in SHAPES:
        check(name, messages)


@settings(max_examples=200, deadline=None)
@given(messages=conversations(*PLAIN, *TYPED, tools=True))
def test_calls_of_functions_are_labelled_with_their_own_terminator(messages):
    """In templates that write functions, calls and their results, calls are trained and results are not."""
    for name, shape in SHAPES.items():
        if shape.tools:
            check(name, messages, TOOLS)
