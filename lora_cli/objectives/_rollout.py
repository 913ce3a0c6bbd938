"""One rollout, and its tokens as micro-batches. S completions of N tokens together, K rewards, P prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lora_cli.errors import ResourceError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.memory import attempt, forget
from lora_cli.objectives._base import Items, pad_batches
from lora_cli.objectives._packing import pack_batches
from lora_cli.objectives._prompts import joined, split_answer
from lora_cli.types import Batch

Ids = npt.NDArray[np.int32]
_FACTS = ("index", "rows", "lengths", "ids", "ended", "entropies", "rewards")
"""What a saved rollout has besides its columns."""


@dataclass(slots=True)
class RolloutBatch(Batch):
    """Some completions of a rollout; their tokens' columns are in the order of `AdaptedModel.token_losses`."""

    samples: tuple[int, ...] = ()
    """Which ones."""
    lengths: tuple[int, ...] = ()
    """Tokens of each, without the prompt."""
    ended: tuple[bool, ...] = ()
    whose: Tensor | None = None  # (N,) int64: the place in `samples` of each token
    columns: dict[str, Tensor] = field(default_factory=dict)  # (N,) float32 each
    rewards: Tensor | None = None  # (S, K) float64: of held-out completions, which are not trained on
    real_tokens: int = 0
    """Of prompts and completions."""


@dataclass(slots=True)
class Rollout:
    """What one state of the model made of some prompts."""

    index: int
    rows: list[int]
    """Of each completion the row in the data set; completions of one prompt follow each other."""
    prompts: list[Ids]
    completions: list[Ids]
    rewards: Tensor  # (S, K) float64
    ended: list[bool]
    entropies: Tensor  # (S,) float64, summed over each completion's tokens
    columns: dict[str, Tensor] = field(default_factory=dict)  # (N,) float32 each, on the CPU

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion."""
        return [len(ids) for ids in self.completions]

    @property
    def tokens(self) -> int:
        """Of all completions."""
        return sum(self.lengths)

    def split(self, name: str) -> list[Tensor]:
        """Return each completion's part of a column."""
        return list(self.columns[name].split(self.lengths))

    def spread(self, values: Tensor) -> Tensor:
        """Return each completion's value for each of its tokens: (S,) -> (N,)."""
        return values.repeat_interleave(torch.tensor(self.lengths, dtype=torch.int64))

    @classmethod
    def of_rows(cls, rows: Items) -> Rollout:
        """Return rows as if their answers had been sampled; of one that is all answer, all but the first token."""
        parts = [split_answer(*row.answers()) for _, row in rows]
        parts = [(prompt, answer) if len(prompt) else (answer[:1], answer[1:]) for prompt, answer in parts]
        count = len(rows)
        nothing = torch.zeros(count, 0, dtype=torch.float64)
        return cls(
            -1, [index for index, _ in rows], [prompt for prompt, _ in parts], [answer for _, answer in parts],
            nothing, [True] * count, torch.zeros(count, dtype=torch.float64),
        )  # fmt: skip

    @classmethod
    def restored(cls, state: Mapping[str, Tensor], rows: Items, index: int) -> Rollout | None:
        """Return the completions of these rows that a checkpoint has; None where it has another rollout, or none."""
        if not state or int(state["index"][0]) != index:
            return None
        prompts = {index: split_answer(*row.answers())[0] for index, row in rows}
        order = {row: place for place, (row, _) in enumerate(rows)}
        saved = state["rows"].tolist()
        mine = sorted(
            (place for place, row in enumerate(saved) if row in order), key=lambda place: order[saved[place]]
        )
        lengths = state["lengths"].tolist()

        def chosen(column: Tensor) -> list[Tensor]:
            parts = column.split(lengths)
            return [parts[place] for place in mine]

        return cls(
            index=index,
            rows=[saved[place] for place in mine],
            prompts=[prompts[saved[place]] for place in mine],
            completions=[ids.to(torch.int32).numpy() for ids in chosen(state["ids"])],
            rewards=state["rewards"][mine],
            ended=[bool(state["ended"][place]) for place in mine],
            entropies=state["entropies"][mine],
            columns={
                name: torch.cat([column.new_empty(0), *chosen(column)])
                for name, column in state.items()
                if name not in _FACTS
            },
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Return all of it but the prompts, which the data set has; joined along the first axis it may be several."""
        ids = [torch.from_numpy(one.astype(np.int64)) for one in self.completions]
        facts = {
            "index": torch.tensor([self.index]),
            "rows": torch.tensor(self.rows, dtype=torch.int64),
            "lengths": torch.tensor(self.lengths, dtype=torch.int64),
            "ids": torch.cat([torch.zeros(0, dtype=torch.int64), *ids]),
            "ended": torch.tensor(self.ended, dtype=torch.int64),
            "entropies": self.entropies,
            "rewards": self.rewards.contiguous(),
        }
        return facts | self.columns


def batches_of(model: AdaptedModel, rollout: Rollout, *, tokens: int, pad_id: int) -> list[RolloutBatch]:
    """Return the completions with their prompts as micro-batches of at most `tokens` tokens, or of one."""
    pairs = zip(rollout.prompts, rollout.completions, strict=True)
    whole = [(number, joined(prompt, ids)) for number, (prompt, ids) in enumerate(pairs)]
    if model.packs:
        plain = pack_batches(whole, tokens=tokens, device=model.device)
    else:
        plain = pad_batches(whole, tokens=tokens, pad_id=pad_id, device=model.device)
    columns = {name: rollout.split(name) for name in rollout.columns}
    return [_with_columns(batch, rollout, columns) for batch in plain]


def _with_columns(batch: Batch, rollout: Rollout, columns: dict[str, list[Tensor]]) -> RolloutBatch:
    samples, device = batch.rows, batch.input_ids.device
    lengths = tuple(len(rollout.completions[one]) for one in samples)
    whose = torch.arange(len(samples)).repeat_interleave(torch.tensor(lengths))
    return RolloutBatch(
        batch.input_ids, batch.attention_mask, batch.labels, tuple(rollout.rows[one] for one in samples),
        batch.position_ids, batch.documents, targets=batch.targets,
        samples=samples, lengths=lengths, ended=tuple(rollout.ended[one] for one in samples),
        whose=whose.to(device),
        columns={
            name: torch.cat([parts[one] for one in samples]).to(device) for name, parts in columns.items()
        },
        real_tokens=sum(len(rollout.prompts[one]) for one in samples) + sum(lengths),
    )  # fmt: skip


def score(
    model: AdaptedModel,
    rollout: Rollout,
    names: tuple[str, ...],
    function: Callable[[RolloutBatch], tuple[Tensor, ...]],
    *,
    tokens: int,
    pad_id: int,
    stopping: Callable[[], bool],
) -> None:
    """Add to the columns of a rollout what a function gives the tokens of a batch, (N,) each, under these names.

    Where it is `stopping`, which is asked before each batch, nothing is added.

    Raises:
        ResourceError: one completion with its prompt does not fit into memory.
    """
    while True:
        found: dict[int, list[Tensor]] = {}
        largest: RolloutBatch | None = None
        with attempt() as tried:
            for largest in batches_of(model, rollout, tokens=tokens, pad_id=pad_id):
                if stopping():
                    return
                columns = [column.cpu().split(list(largest.lengths)) for column in function(largest)]
                for place, sample in enumerate(largest.samples):
                    found[sample] = [column[place] for column in columns]
        if not tried.failed:
            break
        forget(model.device)
        if largest is None or len(largest.samples) == 1:
            raise ResourceError(
                "out of memory: one completion with its prompt does not fit"
                " (lower objective.sampling.max_new_tokens, or set model.quantize: nf4)"
            )
        tokens = max(1, tokens // 2)
    for number, name in enumerate(names):
        parts = [found[sample][number] for sample in range(len(rollout.rows))]
        rollout.columns[name] = torch.cat([torch.zeros(0), *parts])
