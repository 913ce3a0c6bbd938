"""Every shape of chat template against a second implementation, on generated conversations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers.utils.chat_template_utils as transformers_templates
from hypothesis import HealthCheck, given, settings
from hypothesis import example as with_example
from hypothesis import strategies as st
from template_oracles import SHAPES, Messages, Refused, base_tokenizer, tokenizer_of
from transformers import AutoTokenizer

from lora_cli.data.faults import Faults
from lora_cli.data.render import BREAK, Rendered, Renderer, settle_special_tokens
from lora_cli.data.sandbox import DATE
from lora_cli.data.tokens import Encoder
from lora_cli.errors import InputError
from lora_cli.stages._companions import Companions
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


SLOW_PATH = ("chatml", "llama31", "mistral_v3", "our qwen")
"""Shapes whose tokens are compared also where somebody typed control tokens, which takes a millisecond each."""


def check(name: str, messages: Messages, tools: Any = None) -> None:
    """Compare text, trained spans and tokens of one template with its oracle's."""
    tokenizer, faults = TOKENIZERS[name], Faults("rows.jsonl")
    decode = tokenizer.backend_tokenizer.decode
    (rendered,) = RENDERERS[name].render([as_row(messages, tools or ())], faults)
    try:
        expected = joined(SHAPES[name].write(messages, tools))
    except Refused as refusal:
        reason = str(refusal)
    else:
        reason = ""
    if reason:
        assert rendered is None, name
        assert faults.lines[0].startswith("rows.jsonl:7: "), name
        assert reason in faults.lines[0], name
        return
    assert rendered is not None, (name, faults.lines)
    assert pieces_of(rendered) == expected, name
    if rendered.broken and name not in SLOW_PATH:
        return
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
            place = [is_trained for _, is_trained in expected].index(True)
            span, expected = expected[place][0], expected[place + 1 :]
            # A token that begins before the answer is fed, not trained.
            across = span.removesuffix(text)
            assert span.endswith(text), name
            assert len(across) < 12, name
            assert not across or decode([ids[position - length - 1]]).endswith(across), name
    assert not any(is_trained for _, is_trained in expected), name


@settings(max_examples=200, deadline=None)
@given(messages=conversations(*PLAIN, *TYPED))
@with_example([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<think>\n"}])
@with_example([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<think>\na</think>b"}])
@with_example([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<think>\na b\n"}])
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


class Exported(dict[str, Any]):
    """The tokenizer of each shape as it is read from an exported folder."""

    def __repr__(self) -> str:
        return "exported"


def beside(base: Path, stops: Sequence[int], template: str | None = None) -> Companions:
    """Return what an export writes beside the weights."""
    return Companions(base, "base", None, stops, "card", chat_template=template)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Write and read every exported folder."""
    found = Exported()
    for name, tokenizer in TOKENIZERS.items():
        base, folder = (tmp_path_factory.mktemp("template") / part for part in ("base", "adapter"))
        base_tokenizer(SHAPES[name]).save_pretrained(base)
        folder.mkdir()
        stops = settle_special_tokens(tokenizer, "model")[1]
        beside(base, stops, tokenizer.chat_template).write(folder)
        found[name] = AutoTokenizer.from_pretrained(folder)
    return found


class FrozenDate:
    """In place of transformers' datetime: today is the day that training is told."""

    now = staticmethod(lambda: DATE)


def same_prompts(exported: Exported, name: str, messages: Messages, tools: Any = None) -> list[bool]:
    """Compare the ids before each answer; return for which this could be done."""
    if tools is None:
        messages = [turn for turn in messages if turn["role"] != "tool" and "tool_calls" not in turn]
    (rendered,) = RENDERERS[name].render([as_row(messages, tools or ())], Faults("rows.jsonl"))
    if rendered is None or rendered.broken:
        return []
    ids = ENCODERS[name].encode([rendered])[0].input_ids.tolist()
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    compared = []
    for answer, (start, _) in zip(answers, rendered.spans, strict=True):
        prompt = exported[name].apply_chat_template(
            messages[:answer], tools=tools, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        alone, whole = (
            TOKENIZERS[name](text, add_special_tokens=False)["input_ids"]
            for text in (rendered.text[:start], rendered.text)
        )
        # Else no token ends where the prompt does: an answer that begins with a line break after one.
        compared.append(whole[: len(alone)] == alone)
        assert not compared[-1] or ids[: len(prompt)] == prompt, name
    return compared


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=conversations(*PLAIN, tools=True))
def test_complaint_21_training_and_inference_see_the_same_prompt(exported, monkeypatch, messages):
    """The ids before each answer are those of the exported folder's apply_chat_template with generation prompt."""
    monkeypatch.setattr(transformers_templates, "datetime", FrozenDate)
    for name in SHAPES:
        same_prompts(exported, name, messages, TOOLS if SHAPES[name].tools else None)


def test_complaint_21_ordinary_answers_have_their_prompt_in_every_template(exported, monkeypatch):
    """Where an answer begins with a word, its prompt's ids are those of inference, without exception."""
    monkeypatch.setattr(transformers_templates, "datetime", FrozenDate)
    for name in ACCEPTED:
        assert same_prompts(exported, name, TALK) == [True, True], name


def _runs(mask: Any) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


TALK: Messages = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris."},
    {"role": "user", "content": "And of Japan?"},
    {"role": "assistant", "content": "Tokyo."},
]
ACCEPTED = [name for name in SHAPES if name != "deepseek_r1_thinking"]


def example_of(name: str, row: Conversation, train_on: str = "assistant") -> Any:
    """Render and encode one row by the shape called `name`."""
    faults = Faults("rows.jsonl")
    (rendered,) = Renderer(TOKENIZERS[name], "model", train_on).render([row], faults)
    faults.raise_if_any()
    return ENCODERS[name].encode([rendered])[0]


@pytest.mark.parametrize("name", ACCEPTED)
def test_complaint_1_exactly_one_begin_token(name):
    """Where template and tokenizer both write a begin token it stands once, first and untrained."""
    ids = example_of(name, as_row(TALK[:2])).input_ids.tolist()
    bos = TOKENIZERS[name].bos_token_id
    assert ids.count(bos) == SHAPES[name].adds_bos or (name == "harmony" and bos not in ids)


@pytest.mark.parametrize("name", ACCEPTED)
def test_complaint_3_each_answers_terminator_is_trained_and_stops_generation(name, exported, tmp_path):
    """The last label of every answer, also of one that calls a function, is among the exported eos_token_id."""
    tokenizer = TOKENIZERS[name]
    stops = settle_special_tokens(tokenizer, "model")[1]
    base = tmp_path / "base"
    tokenizer.save_pretrained(base)
    (tmp_path / "adapter").mkdir()
    beside(base, stops).write(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "generation_config.json").read_text())["eos_token_id"]
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    calling = [
        TALK[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "rain"},
        TALK[1],
    ]
    rows = [as_row(TALK)] + ([as_row(calling, TOOLS)] if SHAPES[name].tools else [])
    for row in rows:
        example = example_of(name, row)
        runs = _runs(example.trained)
        assert len(runs) == 2
        for _, end in runs:
            assert int(example.input_ids[end - 1]) in ([written] if isinstance(written, int) else written)


def test_complaint_5_stock_templates_without_generation_marks_have_a_mask():
    """Without `{% generation %}`, where transformers' own mask is all zeros, exactly the answers are trained."""
    for name in ACCEPTED:
        if name == "generation":
            continue
        example = example_of(name, as_row(TALK))
        said = [
            TOKENIZERS[name].decode(example.input_ids[start:end]) for start, end in _runs(example.trained)
        ]
        assert [TALK[place]["content"] in text for place, text in zip((1, 3), said, strict=True)] == [
            True,
            True,
        ]


@pytest.mark.parametrize("name", ACCEPTED)
def test_complaint_6_the_ids_are_those_of_the_whole_text(name):
    """What is fed is the tokenization of the whole rendering: no token is cut where the prompt ends."""
    example = example_of(name, as_row(TALK))
    (rendered,) = RENDERERS[name].render([as_row(TALK)], Faults("rows"))
    assert (
        example.input_ids.tolist() == TOKENIZERS[name](rendered.text, add_special_tokens=False)["input_ids"]
    )


@pytest.mark.parametrize("name", [name for name in SHAPES if SHAPES[name].named])
def test_complaint_22_the_exported_folder_alone_has_the_template(name, exported):
    """A named template is the only one of the exported tokenizer, whose own files say nothing else."""
    assert exported[name].chat_template == TOKENIZERS[name].chat_template


def test_complaint_22_without_a_change_the_tokenizers_files_are_the_bases(tmp_path):
    """Every file of the tokenizer, the further templates too, is copied byte for byte."""
    tokenizer = base_tokenizer(SHAPES["chatml"])
    tokenizer.chat_template = {"default": TOKENIZERS["chatml"].chat_template, "tool_use": "{{ tools }}"}
    base, folder = tmp_path / "base", tmp_path / "adapter"
    tokenizer.save_pretrained(base)
    folder.mkdir()
    beside(base, (1,)).write(folder)
    names = [path.relative_to(base) for path in base.rglob("*") if path.is_file()]
    assert len(names) == 4
    assert all((folder / one).read_bytes() == (base / one).read_bytes() for one in names)


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize(
    ("train_on", "said"),
    [("assistant", [1, 3]), ("last_assistant", [3]), ("completion", [3]), ("all", [0, 1, 2, 3])],
)
def test_train_on_chooses_the_turns(name, train_on, said):
    """assistant trains every answer, last_assistant the last, completion those after the prompt, all every token."""
    row = replace(as_row(TALK), prompt_turns=3)
    example = example_of(name, row, train_on)
    text = TOKENIZERS[name].decode(example.input_ids[example.trained])
    assert [place for place, message in enumerate(TALK) if message["content"] in text] == said
    assert train_on != "all" or example.trained.sum() == len(example.input_ids) - 1
    assert example.input_ids.tolist() == example_of(name, row).input_ids.tolist()


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("untrained", [1, 3])
def test_a_turn_that_the_row_takes_out_is_not_trained(name, untrained):
    """`train: false` takes an answer and its terminator out of the labels, and no other."""
    row = as_row(TALK)
    turns = [replace(turn, trained=place != untrained) for place, turn in enumerate(row.messages)]
    example = example_of(name, replace(row, messages=tuple(turns)))
    ((start, end),) = _runs(example.trained)
    kept = _runs(example_of(name, row).trained)[untrained == 1]
    assert (start, end) == kept


def test_completion_needs_rows_that_say_what_it_is():
    """A conversation without a prompt of its own is refused, naming what could be done."""
    with pytest.raises(InputError, match=r"rows\.jsonl:7: objective\.train_on completion needs rows"):
        example_of("chatml", as_row(TALK), "completion")


def test_functions_that_a_template_passes_over_are_refused():
    """A row that offers functions is refused by a template that does not tell the model of them."""
    with pytest.raises(
        InputError, match=r"rows\.jsonl:7: offers functions, which the chat template does not"
    ):
        example_of("our chatml", as_row(TALK, TOOLS))


def test_a_quotation_of_the_answer_does_not_move_its_end():
    """Where the template takes the thought out, the answer ends at its own terminator, though a user repeats it."""
    answer = "<think>It is on the Seine.</think>Paris"
    quoting = [TALK[0], {**TALK[1], "content": answer}, {**TALK[2], "content": f"Why {answer}?"}, TALK[3]]
    for name in ("qwen3", "deepseek_r1"):
        example = example_of(name, as_row(quoting))
        said = [
            TOKENIZERS[name].decode(example.input_ids[start:end]) for start, end in _runs(example.trained)
        ]
        assert said[0] == "Paris" + TOKENIZERS[name].eos_token


def test_a_tokenizer_with_several_templates_uses_the_one_for_functions_where_there_are_some():
    """Rows with functions are rendered by `tool_use`, others by `default`, as apply_chat_template does it."""
    tokenizer = base_tokenizer(SHAPES["our qwen"])
    tokenizer.chat_template = {
        "default": TOKENIZERS["chatml"].chat_template,
        "tool_use": TOKENIZERS["our qwen"].chat_template,
    }
    renderer = Renderer(tokenizer, "model", "assistant")
    for tools in (None, TOOLS):
        (rendered,) = renderer.render([as_row(TALK, tools or ())], Faults("rows"))
        assert rendered is not None
        assert rendered.text == tokenizer.apply_chat_template(TALK, tools=tools, tokenize=False)
    tokenizer.chat_template = {"one": "x", "two": "y"}
    with pytest.raises(InputError, match=r"there are several \(one, two\) and none is the default"):
        Renderer(tokenizer, "model", "assistant")


def test_a_template_may_be_inconsistent_where_nothing_is_trained():
    """A template that changes earlier turns is refused for their sake only if they are trained."""
    row = as_row(TALK, TOOLS)
    with pytest.raises(InputError, match="turn 2: the chat template renders what stands before this answer"):
        example_of("mistral_v3", row)
    example = example_of("mistral_v3", row, "last_assistant")
    assert TOKENIZERS["mistral_v3"].decode(example.input_ids[example.trained]) == " Tokyo.</s>"
