"""Tokenizers in the shapes that real models have: one small byte-level BPE, several chat templates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lora_cli.data.faults import Faults
from lora_cli.data.render import Renderer
from lora_cli.data.tokens import Encoder
from lora_cli.types import Conversation, Example, Message, Row

TEMPLATES = Path(__file__).parent / "templates"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<bos>",
    "<eos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<s>",
    "</s>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
]
SENTENCES = [
    "The quick brown fox jumps over the lazy dog. How many clips did she sell altogether in April and May?",
    "user assistant system model You are a helpful assistant. Natalia sold 48/2 = 24 clips in May.",
    "What is the capital of France? The capital of France is Paris. unhappy unhappy unhappy islands islands",
    "naïve café über 東京 is the capital of Japan 😀 😀 🎉\n\nNew line.\n Indented  twice   thrice.",
]


@dataclass(frozen=True)
class Shape:
    """A chat template and the tokenizer settings it comes with; it writes `terminator` after an answer."""

    template: str
    bos: str | None
    eos: str
    terminator: str
    adds_bos: bool = False
    system: bool = True


SHAPES = {
    "chatml": Shape("chatml", None, "<|im_end|>", "<|im_end|>"),
    "chatml_default_system": Shape("chatml_default_system", None, "<|endoftext|>", "<|im_end|>"),
    "generation": Shape("generation", None, "<|endoftext|>", "<|im_end|>"),
    "llama3": Shape("llama3", "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>", adds_bos=True),
    "gemma": Shape("gemma", "<bos>", "<eos>", "<end_of_turn>", adds_bos=True, system=False),
    "mistral": Shape("mistral", "<s>", "</s>", "</s>", adds_bos=True),
    "phi3": Shape("phi3", "<s>", "<|endoftext|>", "<|end|>"),
    "strips": Shape("strips", None, "<|endoftext|>", "<|im_end|>"),
    "thinking": Shape("thinking", None, "<|im_end|>", "<|im_end|>"),
}


@lru_cache(maxsize=1)
def _trained_backend() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES * 3, trainer)
    return backend.to_str()


def build_tokenizer(shape: Shape, *, trim_offsets: bool = True) -> PreTrainedTokenizerFast:
    """Return a fresh tokenizer of a shape."""
    backend = Tokenizer.from_str(_trained_backend())
    steps: list[processors.PostProcessor] = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if shape.adds_bos:
        assert shape.bos is not None
        bos = (shape.bos, backend.token_to_id(shape.bos))
        steps.append(processors.TemplateProcessing(single=f"{shape.bos} $A", special_tokens=[bos]))
    backend.post_processor = processors.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=shape.bos, eos_token=shape.eos)
    tokenizer.chat_template = (TEMPLATES / f"{shape.template}.jinja").read_text(encoding="utf-8")
    return tokenizer


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Return `make(shape name, trim_offsets=True)`."""

    def make(name: str, *, trim_offsets: bool = True) -> PreTrainedTokenizerFast:
        return build_tokenizer(SHAPES[name], trim_offsets=trim_offsets)

    return make


@pytest.fixture(params=list(SHAPES))
def shape(request: pytest.FixtureRequest) -> Shape:
    """Each chat template shape in turn."""
    return SHAPES[request.param]


@pytest.fixture
def shape_tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """Return the tokenizer of `shape`."""
    return build_tokenizer(shape)


def conversation(*turns: tuple[str, str]) -> Conversation:
    """Return a conversation of (role, content) turns."""
    return Conversation(tuple(Message(role, content) for role, content in turns), "rows.jsonl:1")


def encode(
    tokenizer: PreTrainedTokenizerFast, row: Row, template: str = "model", train_on: str = "assistant"
) -> Example:
    """Render and encode one row; a bad row raises its fault."""
    renderer = Renderer(tokenizer, template, train_on)
    faults = Faults("rows.jsonl")
    (rendered,) = renderer.render([row], faults)
    faults.raise_if_any()
    assert rendered is not None
    (example,) = Encoder(tokenizer, renderer.controls).encode([rendered])
    return example


@pytest.fixture
def chat() -> Callable[..., Conversation]:
    """Return `chat((role, content), ...)`."""
    return conversation


@pytest.fixture(name="encode")
def encode_fixture() -> Callable[..., Example]:
    """Return `encode(tokenizer, row, template="model", train_on="assistant")`."""
    return encode


@pytest.fixture
def shared() -> Path:
    """Return the folder of real data, or skip."""
    if not SHARED.is_dir():
        pytest.skip("real data folder ../shared/data is absent")
    return SHARED
