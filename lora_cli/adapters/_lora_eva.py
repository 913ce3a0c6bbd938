"""EVA: LoRA that starts at the directions in which the inputs of its layers vary most (arXiv 2410.07170).

    A = the leading right singular vectors of a layer's inputs, B = 0          section 3, theorem 3.1
    ranks: the largest explained variances of all layers, as many as there are ranks to give

The inputs are those of the run's own rows in the base model, padding left out. They come batch by batch, and only the
vectors, their values and the mean are kept: r x in a layer, and layers that read the same tensor share them. Ranks are
shared out again until the vectors that they need stand still from one batch to the next, or a number of tokens is seen.

As in the authors' code and PEFT's, the mean is taken off, so that the vectors are principal components; the paper's
formula has no mean. A layer may get rank 0, and then has no adapter. PEFT reads positions with a trained label by
default; here every real token counts, since the adapter sees them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli.adapters._base import StartSource
from lora_cli.errors import DivergedError, InputError
from lora_cli.types import Batch

SIMILAR = 0.99
"""Cosine between a component and its predecessor from which on it stands still; the authors' and PEFT's."""

_EXACT = 512
"""Shorter side of a matrix up to which its singular values are computed exactly; beyond it by random projection."""

_UNCALLED = (
    "adapter.init: eva reads a layer's input at every token, but the model does not call {} for each of them"
    " (leave it out of adapter.targets, or choose another init)"
)

_ROUNDS = 4
"""Power iterations of the random projection."""


Take = Callable[[str, Tensor], None]
"""What is done with a layer's path and its input (..., in)."""


class IncrementalSvd:
    """The `count` leading principal components of rows that come in batches (Ross et al. 2008, section 3)."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.seen = 0
        self.variance = 0.0
        """Squared distances of all rows from their mean, summed."""
        self.vectors = torch.zeros(0)  # (k, in), k = count once there were so many rows
        self.values = torch.zeros(0)  # (k,), singular values
        self.mean = torch.zeros(0)  # (in,) float64
        self.cosines = torch.zeros(0)  # (k,), of each vector with the one before the last batch

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Take in rows (n, in) float32."""
        number, mean = len(rows), rows.mean(dim=0, dtype=torch.float64)
        matrix = rows - mean.float()
        gained = float(matrix.square().sum(dtype=torch.float64))
        before = self.vectors
        if self.seen == 0:
            self.mean = mean
        else:
            # The two means differ by one more direction, weighted by how many rows stand behind them.
            weight = self.seen * number / (self.seen + number)
            shift = self.mean - mean
            gained += weight * float(shift.square().sum())
            matrix = torch.cat([self.values[:, None] * before, matrix, weight**0.5 * shift.float()[None]])
            self.mean = self.mean - shift * (number / (self.seen + number))
        self.seen += number
        self.variance += gained
        self.values, vectors = _leading(matrix, self.count)
        # A singular vector has no sign of its own: its largest entry is made positive.
        largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
        self.vectors = vectors * largest.sign()
        same = before.shape == self.vectors.shape
        self.cosines = (before * self.vectors).sum(dim=1) if same else torch.zeros(len(vectors))

    def ratios(self) -> Tensor:
        """Return each component's share of the variance, (k,) float32, largest first."""
        return self.values.square() / max(self.variance, torch.finfo(torch.float32).tiny)

    def whole(self) -> bool:
        """Say whether there are as many components as were asked for."""
        return len(self.values) == self.count

    def settled(self, needed: int) -> bool:
        """Say whether the first `needed` components stand still."""
        return needed <= len(self.cosines) and bool((self.cosines[:needed] >= SIMILAR).all())


class Inputs:
    """What target layers read in a model: layers that are given the same tensor belong to one group."""

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module], example: Batch) -> None:
        self.model, self.layers = model, layers
        found: dict[str, Tensor] = {}
        # A few tokens will do, and keep alive what would else be the inputs of a whole model.
        ids = example.input_ids[:1, :8]
        self._forward(ids, torch.ones_like(ids), layers, found.__setitem__)
        missing = [path for path in layers if path not in found]
        if missing:
            raise InputError(_UNCALLED.format(missing[0]))
        owners: dict[int, list[str]] = {}
        for path in layers:
            owners.setdefault(id(found[path]), []).append(path)
        self.groups = {paths[0]: paths for paths in owners.values()}
        """Paths of each group by the first of them."""
        self.sizes = {path: x.shape[-1] for path, x in found.items()}
        """Numbers that a layer reads for each token."""

    def read(self, batch: Batch, firsts: Iterable[str], parts: dict[str, IncrementalSvd]) -> int:
        """Give the inputs of these groups at the real tokens of a padded batch to their parts; return how many.

        Raises:
            DivergedError: they are not finite.
            InputError: a layer was not given all tokens.
        """
        assert batch.attention_mask is not None
        real = batch.attention_mask.bool().flatten()

        def take(path: str, x: Tensor) -> None:
            rows = x.reshape(-1, x.shape[-1])
            if len(rows) != len(real):
                raise InputError(_UNCALLED.format(path))
            rows = rows[real].float()
            if not bool(torch.isfinite(rows).all()):
                raise DivergedError(
                    f"adapter.init: eva: inputs of {path} are not finite, in rows {list(batch.rows)}"
                )
            parts[path].add(rows)

        self._forward(batch.input_ids, batch.attention_mask, firsts, take)
        return int(real.sum())

    @torch.no_grad()
    def _forward(self, ids: Tensor, mask: Tensor, paths: Iterable[str], take: Take) -> None:
        hooks = [self.layers[path].register_forward_pre_hook(_giving(take, path)) for path in paths]
        try:
            self.model(input_ids=ids, attention_mask=mask, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()


def start(
    model: PreTrainedModel, ranks: dict[str, int], *, rho: float, limit: int, source: StartSource
) -> tuple[dict[str, int], dict[str, Tensor], str]:
    """Return the rank of each layer, A (r, in) of those that have one, and a line that says what came out.

    `ranks` are those before: their sum is kept, and no layer gets more than `rho` times its own.

    Raises:
        InputError: a rank is above what a layer reads, or the model does not call a layer for every token.
        DivergedError: the base computes inputs that are not finite.
    """
    layers = {path: model.get_submodule(path) for path in ranks}
    # Without the output head, whose logits nobody reads, unless it is a target itself.
    inside = all(path.startswith(f"{model.base_model_prefix}.") for path in layers)
    inputs = Inputs(model.base_model if inside else model, layers, next(source.batches()))
    for path, rank in ranks.items():
        if rank > inputs.sizes[path]:
            raise InputError(
                f"adapter.rank: eva takes {rank} directions of the input of {path}, which has {inputs.sizes[path]}"
                " (lower it, or set adapter.rank_pattern for this module)"
            )
    most = {path: min(round(rank * rho), inputs.sizes[path]) for path, rank in ranks.items()}
    budget = sum(ranks.values())
    parts, told = components(inputs, source.batches(), most, budget, limit)
    ratios = {first: part.ratios() for first, part in parts.items()}
    # What differs between processes in a last bit could give them different ranks.
    source.agree([part.vectors for part in parts.values()] + list(ratios.values()))
    shared = distribute(layer_ratios(inputs, ratios, most), budget)
    vectors = {path: parts[first].vectors for first, paths in inputs.groups.items() for path in paths}
    starts = {path: vectors[path][:rank] for path, rank in shared.items() if rank}
    left_out = len(shared) - len(starts)
    without = f"; {left_out} layers have no adapter" if left_out else ""
    return shared, starts, f"eva: {told}; ranks {summary(shared)}{without}"


def components(
    inputs: Inputs, batches: Iterable[Batch], most: dict[str, int], budget: int, limit: int
) -> tuple[dict[str, IncrementalSvd], str]:
    """Return the components of each group's inputs, and a line on how many tokens they come from.

    `most` is the largest rank of each layer, `budget` the sum of all ranks, `limit` the most tokens to read.
    """
    wanted = {first: max(most[path] for path in paths) for first, paths in inputs.groups.items()}
    parts = {first: IncrementalSvd(count) for first, count in wanted.items()}
    needed, tokens = wanted, 0
    for batch in batches:
        moving = [first for first, part in parts.items() if not part.settled(needed[first])]
        if not moving or (tokens >= limit and all(map(IncrementalSvd.whole, parts.values()))):
            break
        tokens += inputs.read(batch, moving, parts)
        ratios = {first: part.ratios() for first, part in parts.items()}
        ranks = distribute(layer_ratios(inputs, ratios, most), budget)
        needed = {first: max(ranks[path] for path in paths) for first, paths in inputs.groups.items()}
    open_ = sum(not part.settled(needed[first]) for first, part in parts.items())
    told = f"{open_} of {len(parts)} inputs still moved" if open_ else "all components stand still"
    return parts, f"{tokens:,} tokens read, {told}"


def layer_ratios(inputs: Inputs, ratios: dict[str, Tensor], most: dict[str, int]) -> dict[str, Tensor]:
    """Return the explained variances that each layer may have a rank for, in the order of the layers."""
    by_path = {path: ratios[first] for first, paths in inputs.groups.items() for path in paths}
    return {path: by_path[path][: most[path]] for path in inputs.layers}


def distribute(ratios: dict[str, Tensor], budget: int) -> dict[str, int]:
    """Return how many of the `budget` largest explained variances each layer has; of equal ones the earlier counts.

    Each layer's are in falling order, so that its rank is the number of its first components.
    """
    owner = torch.cat([torch.full((len(values),), index) for index, values in enumerate(ratios.values())])
    order = torch.cat([values.cpu() for values in ratios.values()]).argsort(descending=True, stable=True)
    counts = torch.bincount(owner[order[:budget]], minlength=len(ratios)).tolist()
    return dict(zip(ratios, counts, strict=True))


def summary(ranks: Mapping[str, int]) -> str:
    """Return the ranks by kind of module: smallest to largest and mean."""
    kinds: dict[str, list[int]] = {}
    for path, rank in ranks.items():
        kinds.setdefault(path.rpartition(".")[2], []).append(rank)
    return ", ".join(
        f"{kind} {min(found)}-{max(found)} (mean {sum(found) / len(found):.1f})"
        for kind, found in kinds.items()
    )


def _giving(take: Take, path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """Return a hook that gives a layer's input to `take`."""
    return lambda _, inputs: take(path, inputs[0])


def _leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest singular values (k,) and their right vectors (k, in), k as many as there are."""
    count = min(count, *matrix.shape)
    if min(matrix.shape) <= _EXACT or 2 * count >= min(matrix.shape):
        _, values, vectors = torch.linalg.svd(matrix, full_matrices=False)
        return values[:count], vectors[:count]
    # Halko et al. 2011, algorithm 4.4 with twice the wanted directions; drawn on the CPU, alike on every device.
    draw = torch.randn(matrix.shape[1], 2 * count, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(matrix @ draw.to(matrix.device)).Q
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    _, values, vectors = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return values[:count], vectors[:count]
