"""What an objective is, and how rows become padded micro-batches.

An objective returns a SUM of losses and the number of UNITS in it (trained tokens, or pairs). The loop divides once
by the count over all micro-batches and processes, so that accumulation and data parallelism are exact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.score_head import ScoreHead
from lora_cli.targets import Targets
from lora_cli.types import (
    IGNORED,
    Batch,
    Conversation,
    Example,
    Examples,
    Item,
    Prepared,
    Progress,
    Scores,
    Text,
)

Rows = Sequence[tuple[int, Example]]
"""Tokenized rows with their index in the data set."""

Items = Sequence[tuple[int, Item]]
"""What an objective learns from, each with its index in the data set."""

Metrics = dict[str, Tensor]
"""Named sums over a batch's units, 0-d on its device, e.g. how many tokens were predicted right."""


class Scorer(Protocol):
    """A reward model, which is loaded when it first scores."""

    @property
    def fingerprint(self) -> str:
        """A sha256 of what it was made from."""

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Return the score of each row, the tokens of a prompt with an answer."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What an objective may need to know of the run."""

    decode: Callable[[Sequence[int], bool], str]
    """Tokens -> text, with control tokens where the second is true."""
    stop_ids: tuple[int, ...]
    seed: int
    allow_code: bool
    """Whether Python code that the recipe names may run."""
    sum: Callable[[Sequence[float]], list[float]]
    """Each value summed over all processes."""
    stopping: Callable[[], bool]
    """Whether this process was asked to stop; asked between tokens and passes."""
    gather: Callable[[bytes], list[bytes]] = lambda content: [content]
    """What every process has, by its rank."""
    rank: int = 0
    open_scorer: Callable[[str], Scorer] | None = None
    """The folder of a reward model -> what scores by it.

    Raises:
        InputError: it is none, or one of another tokenizer.
    """

    def text(self, ids: Iterable[int], *, keep_special: bool = False) -> str:
        """Return the text of tokens, with control tokens where `keep_special`."""
        return self.decode([int(token) for token in ids], keep_special)


def batch_tokens(wanted: int | str, model: AdaptedModel, *, at_most: dict[str, int]) -> int:
    """Return the padded tokens of a forward pass: as `wanted`, or for `auto` the `at_most` of the model's device.

    Where the model's own logits have to be made, all of a pass are alive at once in two types, with their gradient
    about 12 bytes each: they get 2 GB on a CPU and 16 GB on a GPU.
    """
    tokens, device = tokens_of_pass(wanted, model.device.type, at_most=at_most), model.device.type
    if isinstance(wanted, int) or model.head is not None:
        return tokens
    room = {"cpu": 2 * 10**9, "cuda": 16 * 10**9}[device]
    return max(1, min(tokens, room // (12 * model.model.config.get_text_config().vocab_size)))


def tokens_of_pass(wanted: int | str, device: str, *, at_most: dict[str, int]) -> int:
    """Return what `batch_tokens` does for a model that is not there yet; `device` is cpu or cuda."""
    return wanted if isinstance(wanted, int) else at_most[device]


class Objective(ABC):
    """What training minimises."""

    consumes: ClassVar[tuple[type, ...]] = (Conversation, Text)
    """Kinds of rows that it can learn from."""
    reported: tuple[str, ...] = ()
    """What `loss_sum` reports in evaluation."""
    watched: ClassVar[tuple[str, ...]] = ()
    """What of that it reports in training too."""
    online: ClassVar[bool] = False
    """Whether it learns from what it samples."""
    updates_per_rollout: int = 1
    """Optimizer steps in a row that get the same rows."""
    needs_reference: bool = True
    """Whether it compares with the model that training began with; an objective that does not says so."""
    has_score_head: ClassVar[bool] = False
    """Whether it makes a reward model: what is exported has a head of its own in the place of the output head."""

    @abstractmethod
    def micro_batches(
        self, model: AdaptedModel, rows: Items, progress: Progress, *, tokens: int
    ) -> list[Batch]:
        """Return the rows as batches of at most `tokens` padded tokens; a longer row is a batch of its own."""

    @abstractmethod
    def units(self, batch: Batch) -> int:
        """Return how many units the batch's loss is a sum over."""

    @abstractmethod
    def loss_sum(self, model: AdaptedModel, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return the summed loss, 0-d float32, and sums over the batch's units to report."""

    @abstractmethod
    def scores(self, means: Mapping[str, float]) -> Scores:
        """Return what evaluation reports, from the means over all units of `loss` and of what `loss_sum` reports."""

    def begin(self, around: Surroundings) -> None:  # noqa: B027
        """Take what the run is surrounded by, before any row is asked for."""

    def require_rows(self, prepared: Prepared) -> int:
        """Return the most tokens of a prompt and what is sampled of it; 0 where nothing is.

        Raises:
            InputError: a row is not one that it can learn from.
        """
        del prepared
        return 0

    def trainable(self, model: AdaptedModel) -> Mapping[str, nn.Parameter]:
        """Return the weights that it trains besides those of the model, float32."""
        del model
        return {}

    def contents(self) -> dict[str, str]:
        """Return a sha256 of what it reads besides the rows, by key."""
        return {}

    def take_score_head(self, weight: Tensor) -> None:
        """Begin with a score head, or score by it: (1, H)."""
        del weight
        raise AssertionError(f"{type(self).__name__} has no score head")

    def score_head(self) -> ScoreHead | None:
        """Return the head that is exported with the model, where it has one."""
        return None

    def begin_heldout(self, model: AdaptedModel, examples: Examples, *, tokens: int) -> None:  # noqa: B027
        """Take note of held-out rows that are about to be scored by the model as it is."""

    def trial_batches(
        self, model: AdaptedModel, rows: Items, progress: Progress, *, tokens: int
    ) -> list[Batch]:
        """Return batches that cost what those of training do, and change nothing."""
        return self.micro_batches(model, rows, progress, tokens=tokens)

    def heldout_batches(
        self, model: AdaptedModel, rows: Items, progress: Progress, *, tokens: int
    ) -> list[Batch]:
        """Return batches of held-out rows, which the model is scored by."""
        return self.micro_batches(model, rows, progress, tokens=tokens)

    def tokens(self, rows: Items, batches: Sequence[Batch]) -> int:
        """Return how many tokens a step's rows have, padding aside; a prompt that two answers share counts twice."""
        del batches
        return sum(row.tokens for _, row in rows)

    def step_metrics(self) -> dict[str, tuple[float, float]]:
        """Return sums of the step that was made and what they are divided by, of the same names in every process.

        Asked where `online`, as what follows.
        """
        return {}

    def new_lines(self) -> list[list[str]]:
        """Return what was sampled since it was asked last, a JSON line of each completion, by prompt."""
        return []

    def state_dict(self, step: int) -> dict[str, Tensor]:
        """Return what the step to come needs of this process besides the weights."""
        del step
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Take what `state_dict` returned, of all processes, joined along the first axis."""


def pad_batches(rows: Rows, *, tokens: int, pad_id: int, device: torch.device) -> list[Batch]:
    """Return right-padded batches of rows of similar length, at most `tokens` padded tokens each."""
    groups = group_by_length([len(example.input_ids) for _, example in rows], tokens)
    return [pad_rows([rows[index] for index in group], pad_id, device) for group in groups]


def group_by_length(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Return the indices of `lengths`, the longest first, in groups of at most `tokens` tokens when padded."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def pad_rows(rows: Rows, pad_id: int, device: torch.device) -> Batch:
    """Return the rows as one right-padded batch."""
    shape = (len(rows), max(len(example.input_ids) for _, example in rows))
    input_ids = torch.full(shape, pad_id)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    for index, (_, example) in enumerate(rows):
        length = len(example.input_ids)
        ids = torch.from_numpy(example.input_ids.astype("int64"))
        input_ids[index, :length] = ids
        attention_mask[index, :length] = 1
        # Labels come from the mask, never from comparing with the pad id: pad may equal eos, and eos is trained.
        labels[index, :length] = torch.where(torch.from_numpy(example.trained.copy()), ids, IGNORED)
    return Batch(
        input_ids.to(device, non_blocking=True),
        attention_mask.to(device, non_blocking=True),
        labels.to(device, non_blocking=True),
        tuple(row for row, _ in rows),
        targets=Targets.of_rows(labels).to(device),
    )
