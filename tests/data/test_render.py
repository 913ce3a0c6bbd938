"""Chat templates -> ids and mask: equal to inference, terminators trained, typed control tokens harmless."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lora_cli.data.faults import Faults
from lora_cli.data.render import Renderer, choose_template
from lora_cli.errors import InputError
from lora_cli.types import Conversation, Text

SINGLE = (("user", "What is the capital of France?"), ("assistant", "The capital of France is Paris."))
MULTI = (*SINGLE, ("user", "And of 東京's country 😀?"), ("assistant", "Tokyo,\n\nof Japan. 🎉"))
SPACED = (("user", "  two spaces \n"), ("assistant", " leading and trailing \n\n"))
LONG = MULTI * 4
CASES = [SINGLE, MULTI, SPACED, LONG]


def as_dicts(row: Conversation) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in row.messages]


def inference_ids(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], **settings: bool
) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **settings)["input_ids"]


def runs(mask: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


@pytest.mark.parametrize("turns", CASES, ids=["single", "multi", "spaced", "long"])
@pytest.mark.parametrize("with_system", [False, True])
def test_ids_are_those_of_inference(shape, shape_tokenizer, chat, encode, turns, with_system):
    """The ids, and the ids before the last answer, are those transformers gives for the same messages."""
    if with_system and not shape.system:
        pytest.skip("this template has no system role")
    row = chat(*((("system", "You are a helpful assistant."),) if with_system else ()), *turns)
    example = encode(shape_tokenizer, row)
    messages = as_dicts(row)
    assert example.input_ids.tolist() == inference_ids(shape_tokenizer, messages)
    prompt = example.input_ids[: runs(example.trained)[-1][0]].tolist()
    assert prompt == inference_ids(shape_tokenizer, messages[:-1], add_generation_prompt=True)


@pytest.mark.parametrize("turns", CASES, ids=["single", "multi", "spaced", "long"])
def test_every_answer_ends_in_its_trained_terminator(shape, shape_tokenizer, chat, encode, turns):
    """Each assistant turn is one trained run: the answer, and the terminator as its last token."""
    example = encode(shape_tokenizer, chat(*turns))
    found = runs(example.trained)
    answers = [content for role, content in turns if role == "assistant"]
    assert len(found) == len(answers)
    for (start, end), answer in zip(found, answers, strict=True):
        text = shape_tokenizer.decode(example.input_ids[start:end])
        assert text.endswith(shape.terminator)
        body = text.removesuffix(shape.terminator).removeprefix("<think>\n\n</think>\n\n")
        assert body.strip() == answer.strip()
        assert example.input_ids[end - 1] == shape_tokenizer.convert_tokens_to_ids(shape.terminator)


@pytest.mark.parametrize("turns", CASES, ids=["single", "multi", "spaced", "long"])
def test_mask_equals_the_generation_marks(make_tokenizer, chat, encode, turns):
    """Where a template has generation marks, the mask is the one transformers derives from them."""
    # transformers goes by the tokenizer's offsets; trimmed ones would hide leading white space
    tokenizer = make_tokenizer("generation", trim_offsets=False)
    row = chat(*turns)
    expected = tokenizer.apply_chat_template(
        as_dicts(row), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )["assistant_masks"]
    assert encode(tokenizer, row).trained.astype(int).tolist() == expected


CONTENT = st.one_of(
    st.text(min_size=1, max_size=30, alphabet=st.characters(exclude_categories=["Cs", "Cn"])),
    st.lists(
        st.sampled_from(
            [
                "<|im_end|>",
                "<|im_start|>assistant\n",
                "<|im_",
                "end|>",
                "hi",
                " ",
                "\n",
                "<",
                "😀",
                "é",
                "<|im_<|im_end|>end|>",
            ]
        ),
        min_size=1,
        max_size=6,
    ).map("".join),
).filter(str.strip)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    system=st.none() | CONTENT,
    turns=st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=4),
    trim_offsets=st.booleans(),
)
def test_chatml_against_a_second_implementation(make_tokenizer, chat, encode, system, turns, trim_offsets):
    """For any conversation, typed control tokens included, ids and mask are those of ChatML built by hand."""
    roles = [("system", system)] if system is not None else []
    for prompt, answer in turns:
        roles += [("user", prompt), ("assistant", answer)]
    tokenizer = make_tokenizer("chatml", trim_offsets=trim_offsets)
    oracle = make_tokenizer("chatml", trim_offsets=False)
    opening, closing = (oracle.convert_tokens_to_ids(text) for text in ("<|im_start|>", "<|im_end|>"))

    def ordinary(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = oracle(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        return found["input_ids"], found["offset_mapping"]

    ids: list[int] = []
    mask: list[bool] = []
    for place, (role, content) in enumerate(roles):
        part, offsets = ordinary(("\n" if place else "") and "\n")
        ids, mask = [*ids, *part, opening], [*mask, *[False] * len(part), False]
        part, offsets = ordinary(f"{role}\n{content}")
        answer = role == "assistant"
        ids, mask = ids + part, mask + [answer and start > len(role) for start, _ in offsets]
        ids, mask = [*ids, closing], [*mask, answer]
    part, _ = ordinary("\n")
    example = encode(tokenizer, chat(*roles))
    assert example.input_ids.tolist() == ids + part
    assert example.trained.tolist() == mask + [False] * len(part)


INJECTIONS = ["{t}", "x{t}", "{t}x", "{t}{t}", "a {t} b {s} c", "{s}"]


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_typed_control_tokens_stay_text(shape, shape_tokenizer, chat, encode, injection, role):
    """A control token typed by anyone adds no control token, and its text is kept."""
    typed = injection.format(t=shape.terminator, s="<|im_start|>")
    clean = {"user": "ask", "assistant": "reply"}
    injected = {**clean, role: f"please {typed} now"}
    special = np.array(shape_tokenizer.convert_tokens_to_ids(sorted(set(shape_tokenizer.all_special_tokens))))
    special = np.union1d(special, list(shape_tokenizer.added_tokens_decoder))
    expected = encode(shape_tokenizer, chat(*clean.items()))
    example = encode(shape_tokenizer, chat(*injected.items()))
    keep = np.isin(example.input_ids, special)
    assert (
        example.input_ids[keep].tolist() == expected.input_ids[np.isin(expected.input_ids, special)].tolist()
    )
    assert f"please {typed} now" in shape_tokenizer.decode(example.input_ids)
    start, end = runs(example.trained)[-1]
    answer = shape_tokenizer.decode(example.input_ids[start:end])
    assert answer.endswith(injected["assistant"] + shape.terminator)


def test_broken_and_ordinary_rows_keep_their_order(make_tokenizer, chat):
    """Rows that need the slow path come back at their own place among the others."""
    from lora_cli.data.tokens import Encoder

    tokenizer = make_tokenizer("chatml")
    contents = ["a", "<|im_end|>", "b", "c", "<|im_start|>", "d"]
    rows = [chat(("user", content), ("assistant", content)) for content in contents]
    renderer = Renderer(tokenizer, "model", "assistant")
    rendered = renderer.render(rows, Faults("rows"))
    examples = Encoder(tokenizer, renderer.controls).encode([row for row in rendered if row])
    decoded = [tokenizer.decode(example.input_ids[example.trained]) for example in examples]
    assert decoded == [f"{content}<|im_end|>" for content in contents]


@pytest.mark.parametrize("name", ["llama3", "gemma", "mistral"])
def test_exactly_one_begin_token(make_tokenizer, chat, encode, name):
    """A begin token that template and tokenizer would both write stands once, untrained."""
    tokenizer = make_tokenizer(name)
    rows = [
        (chat(*MULTI), "model"),
        (chat(*MULTI), "plain"),
        (Text("The quick brown fox.", "w:1"), "plain"),
        (Text(f"{tokenizer.bos_token}The quick brown fox.", "w:1"), "plain"),
    ]
    for row, template in rows:
        example = encode(tokenizer, row, template)
        assert example.input_ids.tolist().count(tokenizer.bos_token_id) == 1
        assert example.input_ids[0] == tokenizer.bos_token_id
        assert not example.trained[0]


def test_no_begin_token_where_the_tokenizer_adds_none(make_tokenizer, chat, encode):
    """A tokenizer that has a begin token but does not add it gets none from us."""
    tokenizer = make_tokenizer("phi3")
    for template in ("model", "plain"):
        assert tokenizer.bos_token_id not in encode(tokenizer, chat(*SINGLE), template).input_ids


def test_text_rows_are_trained_from_their_second_token_through_the_end_token(make_tokenizer, encode):
    """A document has every token trained but the first, which nothing precedes, and ends in one end token."""
    tokenizer = make_tokenizer("chatml_default_system")
    for text in ("The quick brown fox.", "The quick brown fox.<|endoftext|>"):
        example = encode(tokenizer, Text(text, "w:1"), "plain")
        assert tokenizer.decode(example.input_ids) == "The quick brown fox.<|endoftext|>"
        assert example.trained.tolist() == [False] + [True] * (len(example.trained) - 1)


def test_text_rows_keep_their_control_tokens(make_tokenizer, encode):
    """A conversation that was rendered beforehand keeps its control tokens in a text row."""
    tokenizer = make_tokenizer("chatml_default_system")
    text = "<|im_start|>user\nhi<|im_end|>\n"
    expected = tokenizer(text + "<|endoftext|>", add_special_tokens=False)["input_ids"]
    assert encode(tokenizer, Text(text, "w:1"), "plain").input_ids.tolist() == expected


@pytest.mark.parametrize(
    ("turns", "text", "trained"),
    [
        ((("user", "Q"), ("assistant", "A")), "Q\nA<|endoftext|>", ["A<|endoftext|>"]),
        ((("user", "Q: 1\nA:"), ("assistant", " 42")), "Q: 1\nA: 42<|endoftext|>", [" 42<|endoftext|>"]),
        ((("user", "Q\n"), ("assistant", "A")), "Q\nA<|endoftext|>", ["A<|endoftext|>"]),
        (
            (("system", "S"), ("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B")),
            "S\nQ\nA<|endoftext|>\nR\nB<|endoftext|>",
            ["A<|endoftext|>", "B<|endoftext|>"],
        ),
    ],
)
def test_plain_rendering(make_tokenizer, chat, encode, turns, text, trained):
    """The plain template puts turns on their own lines unless the row brings white space; answers end."""
    tokenizer = make_tokenizer("chatml_default_system")
    example = encode(tokenizer, chat(*turns), "plain")
    assert tokenizer.decode(example.input_ids) == text
    found = [tokenizer.decode(example.input_ids[start:end]) for start, end in runs(example.trained)]
    assert found == trained


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_a_token_across_the_border_is_not_trained(make_tokenizer, chat, encode, trim_offsets):
    """The token that holds the prompt's last and the answer's first character is fed but not trained."""
    tokenizer = make_tokenizer("chatml_default_system", trim_offsets=trim_offsets)
    example = encode(tokenizer, chat(("user", "The "), ("assistant", "capital of France")), "plain")
    whole = tokenizer("The capital of France<|endoftext|>", add_special_tokens=False)["input_ids"]
    assert example.input_ids.tolist() == whole
    tokens = tokenizer.convert_ids_to_tokens(example.input_ids)
    assert tokens[1] == "Ġcapital"
    assert example.trained.tolist() == [False, False] + [True] * (len(whole) - 2)


def test_train_on_all(shape_tokenizer, chat, encode):
    """With train_on all every token but the first is trained, the ids being the same."""
    example = encode(shape_tokenizer, chat(*MULTI), train_on="all")
    assert example.input_ids.tolist() == encode(shape_tokenizer, chat(*MULTI)).input_ids.tolist()
    assert example.trained.tolist() == [False] + [True] * (len(example.trained) - 1)


BAD_TEMPLATES = {
    "no terminator": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}",
        "no control token",
    ),
    "syntax": ("{% for m in messages %}", "the chat template fails"),
    "drops turns": ("{{ messages[-1]['content'] }}<|im_end|>", "does not write the turns in order"),
}


@pytest.mark.parametrize("name", list(BAD_TEMPLATES))
def test_a_template_that_cannot_teach_to_stop_is_refused(make_tokenizer, name):
    """A template without terminator, or that does not render, is refused before any row is read."""
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template, message = BAD_TEMPLATES[name]
    with pytest.raises(InputError, match=message):
        Renderer(tokenizer, "model", "assistant")


def test_a_prompt_that_training_would_not_see_is_refused(make_tokenizer, chat, encode):
    """A generation prompt that the whole rendering does not continue is refused, naming row and turn."""
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "assistant\\n' }}", "assistant\\n<think>\\n' }}"
    )
    with pytest.raises(InputError, match=r"rows\.jsonl:1: turn 2: .* would not match inference"):
        encode(tokenizer, chat(*SINGLE))


def test_a_missing_terminator_between_turns_is_refused_only_there(make_tokenizer, chat, encode):
    """A template that ends only the last answer serves single questions, not longer conversations."""
    tokenizer = make_tokenizer("phi3")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
    )
    example = encode(tokenizer, chat(*SINGLE))
    assert tokenizer.decode(example.input_ids[example.trained]) == f"{SINGLE[1][1]}<|endoftext|>"
    with pytest.raises(InputError, match="turn 2: the chat template writes no terminator"):
        encode(tokenizer, chat(*MULTI))


def test_a_terminator_before_the_answer_does_not_end_the_turn(make_tokenizer, chat, encode):
    """Where a template closes a thought by the same token, the span runs through the answer's own."""
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>"
        "{% if m['role'] == 'assistant' %}{{ 'thought\n<|im_end|>\n<|im_start|>' }}{% endif %}"
        "{{ m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    example = encode(tokenizer, chat(*MULTI))
    expected = [f"thought\n<|im_end|>\n<|im_start|>assistant\n{MULTI[i][1]}<|im_end|>" for i in (1, 3)]
    assert [
        tokenizer.decode(example.input_ids[start:end]) for start, end in runs(example.trained)
    ] == expected


def test_a_row_the_template_refuses_is_named_and_the_others_kept(make_tokenizer, chat):
    """The template's own message reaches the user with the row's place; other rows are rendered."""
    tokenizer = make_tokenizer("gemma")
    faults = Faults("rows.jsonl")
    rows = [chat(*SINGLE), chat(("system", "Be kind."), *SINGLE), chat(*MULTI)]
    rendered = Renderer(tokenizer, "model", "assistant").render(rows, faults)
    assert [row is None for row in rendered] == [False, True, False]
    with pytest.raises(InputError, match=r"rows\.jsonl:1: .*System role not supported"):
        faults.raise_if_any()


def test_noncharacters_beside_control_tokens_are_refused(make_tokenizer, chat, encode):
    """The code points that the slow path reserves cannot be smuggled in."""
    with pytest.raises(InputError, match="noncharacters"):
        encode(make_tokenizer("chatml"), chat(("user", "\ufdd02\ufdd1<|im_end|>"), ("assistant", "ok")))
    example = encode(make_tokenizer("chatml"), chat(("user", "\ufdd02\ufdd1"), ("assistant", "ok")))
    assert len(runs(example.trained)) == 1


def test_choose_template(make_tokenizer):
    """auto means the tokenizer's template where it has one; model without one is refused."""
    tokenizer = make_tokenizer("chatml")
    assert [choose_template(tokenizer, wanted) for wanted in ("auto", "model", "plain")] == [
        "model",
        "model",
        "plain",
    ]
    tokenizer.chat_template = None
    assert choose_template(tokenizer, "auto") == "plain"
    with pytest.raises(InputError, match="no chat template"):
        choose_template(tokenizer, "model")


def test_many_turns_render_in_linear_text_time(make_tokenizer, chat, encode):
    """A conversation of 200 turns takes well under two seconds, with one trained run per answer."""
    import time

    row = chat(*SINGLE * 100)
    began = time.monotonic()
    example = encode(make_tokenizer("llama3"), row)
    assert time.monotonic() - began < 2
    assert len(runs(example.trained)) == 100


def test_special_tokens_are_single_tokens(make_tokenizer):
    """Every special token is one token of the test tokenizer, so the tests above test what they say."""
    tokenizer = make_tokenizer("chatml")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    assert all(re.fullmatch(r"<.*>", token["content"]) for token in spec["added_tokens"])
    assert all(tokenizer.tokenize(token["content"]) == [token["content"]] for token in spec["added_tokens"])
