"""What a method may start from besides a seed: the run's own rows, the base's files, the checkpoint it goes on from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from lora_cli.models.load_quantized import FullWeights
from lora_cli.objectives._base import pad_batches
from lora_cli.runtime import order
from lora_cli.runtime.dist import Runtime
from lora_cli.types import Batch, Prepared

TOKENS = 2048
"""Padded tokens of a batch. Not those of a training pass, which may differ from machine to machine, and a start must
not."""


class StartSource:
    """See `adapters._base.StartSource`; nothing is read before it is asked for."""

    def __init__(
        self,
        folder: Path,
        prepared: Prepared,
        *,
        batch_size: int,
        seed: int,
        resumed: Callable[[], Mapping[str, Tensor] | None],
        rt: Runtime,
    ) -> None:
        self.folder, self.prepared, self.batch_size, self.seed, self.rt = (
            folder,
            prepared,
            batch_size,
            seed,
            rt,
        )
        self.resumed = resumed
        self._weights: FullWeights | None = None

    def batches(self) -> Iterator[Batch]:
        """Yield the rows of step after step, as batches of one padded length."""
        examples = self.prepared.train
        assert examples is not None
        for step in itertools.count():
            rows = order.rows_of_step(
                step, num_rows=len(examples), batch_size=self.batch_size, seed=self.seed
            )
            chosen = [(row, answer) for row in rows for answer in examples[row].answers()]
            yield from pad_batches(chosen, tokens=TOKENS, pad_id=self.prepared.pad_id, device=self.rt.device)

    def full_weight(self, path: str) -> Tensor:
        """Return the weight (out, in) of a linear layer as the base's files hold it.

        Raises:
            InputError: it cannot be read.
        """
        if self._weights is None:
            self._weights = FullWeights(self.folder)
        return self._weights.read(path)

    def agree(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite each tensor with the main process's."""
        self.rt.from_main(tensors)
