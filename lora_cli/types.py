"""What the floors hand to each other. Shapes: B rows, T tokens per row (padded), R rows of a data set.

A row travels as `Conversation`, `Text`, `Pair` or `Labelled` (what the user wrote) -> `Example` (tokens and what is
trained of them) -> `Batch` (tensors). Everything else in this file is a stage's result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # a recipe and its first rows are checked without either
    import numpy as np
    import numpy.typing as npt
    import torch

    from lora_cli.targets import Targets

IGNORED = -100
"""Label of a position that is not trained (torch's `ignore_index`)."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is system, user, assistant or tool."""

    role: str
    content: str
    trained: bool = True
    """False: an answer that the row itself takes out of training."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What chat templates know besides: `tool_calls`, `tool_call_id`, `name`, `reasoning_content`; JSON values."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order; `where` is `file:line` of the row, for messages to the user."""

    messages: tuple[Message, ...]
    where: str
    tools: tuple[Mapping[str, Any], ...] = ()
    """Functions that the model may call, as JSON schemas."""
    prompt_turns: int | None = None
    """How many of the turns are the prompt, where the row says which; the rest are its completion."""


@dataclass(frozen=True, slots=True)
class Text:
    """A plain document, trained from its first to its last token."""

    text: str
    where: str


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and two answers to it, of which the first is preferred; both conversations begin with the prompt."""

    chosen: Conversation
    rejected: Conversation
    where: str
    margin: float | None = None
    """By how much the first is preferred, where the row says so."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """A prompt with one answer, and whether it is wanted."""

    conversation: Conversation
    wanted: bool
    where: str


Row = Conversation | Text | Pair | Labelled


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenized row. `trained[i]` says that token i is a target: its prediction from tokens < i enters the loss."""

    input_ids: npt.NDArray[np.int32]  # (T,)
    trained: npt.NDArray[np.bool_]  # (T,)

    @property
    def tokens(self) -> int:
        """How many there are."""
        return len(self.input_ids)

    def answers(self) -> tuple[Example, ...]:
        """Return itself: it has one."""
        return (self,)

    def head(self, tokens: int) -> Example:
        """Return the first tokens, all of them trained."""
        return Example(self.input_ids[:tokens], self.trained[:tokens] | True)


@dataclass(frozen=True, slots=True)
class PairExample:
    """Two tokenized answers to one prompt, of which the first is preferred."""

    chosen: Example
    rejected: Example
    margin: float
    """By how much; NaN where the row does not say."""

    @property
    def tokens(self) -> int:
        """How many both have, the prompt counted twice."""
        return self.chosen.tokens + self.rejected.tokens

    def answers(self) -> tuple[Example, ...]:
        """Return the chosen and the rejected one."""
        return self.chosen, self.rejected

    def head(self, tokens: int) -> PairExample:
        """Return the pair of two heads that have so many tokens together."""
        half = max(2, tokens // 2)
        return PairExample(self.chosen.head(half), self.rejected.head(half), self.margin)


@dataclass(frozen=True, slots=True)
class LabelledExample:
    """A tokenized answer, and whether it is wanted."""

    example: Example
    wanted: bool

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.example.tokens

    def answers(self) -> tuple[Example, ...]:
        """Return the one there is."""
        return (self.example,)

    def head(self, tokens: int) -> LabelledExample:
        """Return the first tokens, all of them trained."""
        return LabelledExample(self.example.head(tokens), self.wanted)


Item = Example | PairExample | LabelledExample
"""What an objective learns from."""


class Examples(Protocol):
    """A tokenized data set, read by index; `lengths` is in tokens, `fingerprint` names its content."""

    lengths: npt.NDArray[np.int64]  # (R,)
    fingerprint: str

    max_token: int
    """Largest token id in it."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Item: ...
    def where(self, index: int) -> str:
        """Return `file:line` of a row (`name: row n`, where there are no lines)."""


@dataclass(frozen=True, slots=True)
class SplitCounts:
    """What became of a split's rows; token counts are of the rows that were kept."""

    rows: int
    kept: int
    dropped: int
    bad: int
    """Rows that could not be used as they were, and were skipped because the recipe says so."""
    truncated: int
    tokens: int
    trained_tokens: int
    lost_trained_tokens: int
    """Trained tokens of dropped and truncated rows that will not be seen."""


@dataclass(frozen=True, slots=True)
class SourceReport:
    """How one source was read, and what became of its rows; a pair counts as one row."""

    key: str
    """Where the recipe names it: data.train, data.eval, or data.sources.NAME."""
    files: tuple[str, ...]
    format: str
    detected: bool
    kind: str
    """`texts`, `conversations`, `preference pairs` or `labelled answers`."""
    counts: SplitCounts
    too_long: int
    untrained: int
    """Rows that were dropped since they have nothing to train."""
    longest: int
    """Tokens of the longest row as written."""
    firsts: Mapping[str, str]
    """`file:line` of the first row that is `too_long`, `untrained` or `truncated`, and of the `longest`."""
    bad_lines: tuple[str, ...]
    """Messages of the first bad rows that were skipped."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Result of the prepare stage."""

    train: Examples | None
    eval: Examples | None
    tokenizer: Any
    """The transformers fast tokenizer, a copy with another chat template if the recipe names one; how it pads and ends
    an answer is in the next two."""
    pad_id: int
    stop_ids: tuple[int, ...]
    """Terminators: the tokens that end an answer, in training and in generation."""
    formats: dict[str, str]
    """How each split's rows were read, by split."""
    template: str
    """Which rendering was used: `plain`, `model`, or the chat template that the recipe names."""
    counts: dict[str, SplitCounts]
    changed: Callable[[], list[str]]
    """Names the files that do not hold any more what was read of them."""
    contents: Mapping[str, str]
    """A sha256 of what each split's rows were read from, by split: the bytes of its files, wherever they lie."""
    sources: tuple[SourceReport, ...] = ()

    def sample(self) -> list[Example]:
        """Return the rows that a merge into a quantized base is measured on: held-out ones, where there are any.

        Of a pair it is the chosen answer.
        """
        examples = self.eval or self.train
        rows = [examples[row] for row in range(min(16, len(examples)))] if examples is not None else []
        return [row.answers()[0] for row in rows]


@dataclass(frozen=True, slots=True)
class Documents:
    """Where the documents of a packed sequence lie, one after the other."""

    lengths: tuple[int, ...]
    offsets: torch.Tensor  # (documents + 1,) int32: where each begins, and where the last ends
    common: tuple[int, ...] = ()
    """How many first tokens of each are those of the document before it and stand in the sequence once, where `offsets`
    count them in each (`models/prefixes.py`); (): none of any."""


@dataclass(slots=True)
class Batch:
    """One micro-batch: right-padded rows, or with `documents` all of its rows in one sequence, (1, T), unpadded.

    Behind the rows' documents there may be one that fills the sequence up, of which nothing is trained.

    `labels[b, t]` is the token at t if it is trained, else IGNORED (not shifted). In a packed sequence the first token
    of a document is IGNORED: nothing before it may predict it.
    """

    input_ids: torch.Tensor  # (B, T) int64
    attention_mask: torch.Tensor | None  # (B, T) int64, 1 = real token; None: packed
    labels: torch.Tensor  # (B, T) int64
    rows: tuple[int, ...]
    """Index of each row in the data set, so that a fault can be traced to it."""
    position_ids: torch.Tensor | None = None  # (1, T) int64: places in their documents; None: padded
    documents: Documents | None = None
    targets: Targets = field(kw_only=True)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where training stands: everything random is a function of this and the seed."""

    step: int
    total_steps: int


@dataclass(slots=True)
class Trained:
    """Result of the train stage."""

    steps: int
    tokens: int
    trained_tokens: int
    tokens_per_second: float
    best_step: int | None = None
    stopped_early: bool = False
    skipped: int = 0
    """Steps that were not applied, as they stood out."""


Scores = dict[str, float]


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Result of the evaluate stage: scores of the base and of the tuned model on the same rows."""

    base: Scores
    tuned: Scores
