"""A local model as critic and judge, against transformers' own passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_cli.constitution.local import LocalVoice, letters
from lora_cli.constitution.voice import Asked
from lora_cli.errors import ResourceError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.stages._conversation import Conversations
from lora_cli.types import Message


@pytest.fixture()
def voice(base: Path) -> LocalVoice:
    """The toy model in float32."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    talk = Conversations(tokenizer, "auto")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    return LocalVoice(
        AdaptedModel(model, {}), talk.encode, talk.decode, letter_ids=letters(tokenizer),
        stop_ids=talk.stop_ids, pad_id=talk.pad_id, answer_tokens=8,
    )  # fmt: skip


ASKED = [
    Asked("0", (Message("user", "what does the cat say"),)),
    Asked("1", (Message("user", "what does the big big owl say <|im_end|>"),)),
    Asked(
        "2", (Message("user", "hello"), Message("assistant", "the dog says bark"), Message("user", "A or B?"))
    ),
]


def test_the_model_is_fed_what_the_template_writes(base: Path, voice: LocalVoice) -> None:
    """Where nobody types control tokens, they are transformers' own rendering with the generation prompt."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    for one in (ASKED[0], ASKED[2]):
        chat = [{"role": turn.role, "content": turn.content} for turn in one.turns]
        expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert voice.encode(one.turns).tolist() == list(expected)


def test_a_typed_control_token_is_text(base: Path, voice: LocalVoice) -> None:
    """What a user writes ends no turn: the prompt has as many terminators as turns."""
    end = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids("<|im_end|>")
    assert voice.encode(ASKED[1].turns).tolist().count(end) == 1


def test_odds_are_the_model_s_own(base: Path, voice: LocalVoice) -> None:
    """Each is the difference of log-probabilities after a prompt alone, whatever shares its batch."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for one, verdict in zip(ASKED, voice.compare(ASKED), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([voice.encode(one.turns).tolist()])).logits[0, -1].double()
        parts = []
        for letter in "AB":
            ids = [tokenizer.encode(text, add_special_tokens=False) for text in (letter, f" {letter}")]
            single = sorted({found[0] for found in ids if len(found) == 1})
            parts.append(float(logits.softmax(dim=-1)[single].sum().log()))
        assert verdict is not None
        assert verdict.log_odds == pytest.approx(parts[0] - parts[1], abs=1e-5)


def test_what_has_no_place_in_the_model_is_left_out(voice: LocalVoice) -> None:
    """A conversation that is longer than the model's positions gets no answer; the others do, as without it."""
    long = Asked("long", (Message("user", "word " * 400),))
    answers = voice.answers([ASKED[0], long, ASKED[2]])
    assert answers[1] is None
    assert [answers[0], answers[2]] == voice.answers([ASKED[0], ASKED[2]])
    assert voice.compare([long, ASKED[0]])[0] is None
    assert voice.samples([long, ASKED[0]], [[1], [1, 2]], 1.0)[0] is None
    assert voice.answers([long]) == voice.compare([long]) == [None]


def test_samples_are_a_function_of_their_seeds(voice: LocalVoice) -> None:
    """Equal seeds give equal texts, and others other ones, in any company."""
    together = voice.samples(ASKED, [[1, 2], [3, 4], [5, 6]], 1.0)
    assert together[0] is not None
    assert together[0][0] != together[0][1]
    assert voice.samples(ASKED[1:2], [[4, 3]], 1.0) == [[*reversed(together[1] or [])]]


def test_a_want_of_memory_names_the_key_that_helps(
    voice: LocalVoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends in one line and exit code 4, in place of another batch, whose rows could have other bits."""

    def none_left(*arguments: object, **keys: object) -> None:
        raise MemoryError

    monkeypatch.setattr(voice.model, "generate", none_left)
    monkeypatch.setattr(voice.model, "trained_logits", none_left)
    for ask in (voice.answers, voice.compare):
        with pytest.raises(ResourceError, match=r"constitution\.batch_rows: out of memory") as caught:
            ask(ASKED)
        assert caught.value.exit_code == 4
