"""Rows of the embedding, and of the output head, that are trained alone: a few tokens and nothing else of the table.

    embed_tokens: nn.Embedding        embed_tokens: TrainedRows
                                        .base: nn.Embedding, frozen
                                        .trainable_tokens_delta: (n, dim) float32, trained

The rows take the place of the base's, so gradient and moments are those of n rows and all other rows keep their bits.
A head that shares the embedding's weight follows it; one with a weight of its own is trained in the same rows, since a
model that is to write a token needs its row there. PEFT has both as `trainable_token_indices`: a list for the input
embedding and what is tied to it, or a list for each module. Its tensor holds the rows themselves, despite its name.

Weight decay, where a run has it, draws the rows towards zero as it does any trained weight.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lora_cli.adapters._targets import embedding_scale, is_lookup
from lora_cli.adapters._whole import TrainedModule
from lora_cli.errors import InputError

DISK_NAME = "token_adapter.trainable_tokens_delta"


class TrainedRows(TrainedModule):
    """A frozen embedding or head that computes with trained rows in place of those of `ids`."""

    ids: Tensor  # (n,) int64
    trainable_tokens_delta: nn.Parameter
    places: Tensor  # (vocabulary,) int64: where each token stands in `ids`, -1 if it does not

    def __init__(self, base: nn.Module, ids: Sequence[int], leader: TrainedRows | None = None) -> None:
        super().__init__(base, [])
        weight: Tensor = base.get_parameter("weight").detach()
        self.register_buffer("ids", torch.tensor(ids, device=weight.device), persistent=False)
        places = torch.full((len(weight),), -1, device=weight.device)
        places[self.ids] = torch.arange(len(ids), device=weight.device)
        self.register_buffer("places", places, persistent=False)
        own = nn.Parameter(weight[self.ids].float()) if leader is None else leader.trainable_tokens_delta
        self.trainable_tokens_delta = own
        self.output_scale = embedding_scale(base) if isinstance(base, nn.Embedding) else None
        self._leader = (leader,)  # in a tuple, so that it is not registered
        self._replaced: Tensor | None = None

    @property
    def follows(self) -> bool:
        """True: the rows are those of another module, with which the base shares its weight."""
        return self._leader != (None,)

    @property
    def merged(self) -> bool:
        """True while the base holds the trained rows."""
        return self._replaced is not None

    @torch.no_grad()
    def start_at_mean(self, ids: Collection[int]) -> None:
        """Set the rows of these tokens to the mean row of the base."""
        mean = self.base.get_parameter("weight").mean(dim=0, dtype=torch.float32)
        for token in ids:
            self.trainable_tokens_delta[self.places[token]] = mean

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the base, and what the trained rows compute in their places."""
        y: Tensor = self.base(*args, **kwargs)
        if not self.enabled or self.merged:
            return y
        (x,) = args
        rows = self.trainable_tokens_delta.to(self.base.get_parameter("weight").dtype)
        if isinstance(self.base, nn.Linear):  # the head: hidden states (..., dim) -> logits (..., vocabulary)
            # In place: the frozen product's backward pass does not need its output, and logits are large.
            return y.index_copy_(-1, self.ids, F.linear(x, rows))
        place = self.places[x]  # token ids (...) -> (..., dim)
        looked_up = F.embedding(place.clamp(min=0), rows)
        looked_up = looked_up if self.output_scale is None else looked_up * self.output_scale
        return torch.where((place < 0)[..., None], y, looked_up)

    def base_tensor(self, name: str) -> Tensor:
        """Return the base's rows (n, dim) that the trained ones stand in for."""
        assert name == "trainable_tokens_delta"
        rows: Tensor = self.base.get_parameter("weight")[self.ids]
        return rows

    def disk_tensors(self) -> dict[str, Tensor]:
        """Return the rows (n, dim) by PEFT's name; of a module that follows another nothing is stored."""
        return {} if self.follows else {DISK_NAME: self.trainable_tokens_delta}

    @torch.no_grad()
    def merge(self) -> None:
        """Put the rows into the base weight, rounded once to its dtype; the old rows are kept for `unmerge`."""
        assert not self.merged
        weight, (leader,) = self.base.get_parameter("weight"), self._leader
        self._replaced = weight[self.ids[:0]]
        if leader is None or leader.base.get_parameter("weight") is not weight:
            self._replaced = weight[self.ids]
            weight[self.ids] = self.trainable_tokens_delta.to(weight.dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base weight bit for bit."""
        assert self._replaced is not None
        if len(self._replaced):
            self.base.get_parameter("weight")[self.ids] = self._replaced
        self._replaced = None


def place(
    model: PreTrainedModel,
    tokens: Sequence[int] | Mapping[str, Sequence[int]],
    new: Collection[int],
    where: str,
    *,
    taken: Collection[str],
    both: bool,
) -> dict[str, TrainedRows]:
    """Put a TrainedRows around the embedding, or the modules that `tokens` names, and around a head tied to it.

    With `both`, a head with a weight of its own is trained in the same rows. A table that ends before the last token
    grows. The rows of `new` tokens start at the mean. `taken` are paths of modules that are trained otherwise.

    Raises:
        InputError: such a module would be wrapped, or one that is neither a plain embedding nor a head without a bias;
            or the tokens name no module, or are so far beyond the table that it must be another model's.
    """
    embedding, head = _paths(model)
    indices = {path: ids for path, ids in _by_path(model, tokens).items() if path}
    if head is not None and both:
        indices[head] = indices[embedding]
    tied = head is not None and head not in taken and embedding not in taken
    tied = tied and _weight(model, str(head)) is _weight(model, embedding)
    if tied and embedding in indices:
        indices.setdefault(str(head), indices[embedding])
    if tied and indices.get(embedding) != indices.get(str(head)):
        raise InputError(f"{where}: {head} shares the weight of {embedding}, but not the tokens to train")
    for path in indices:
        _require_table(model, path, is_head=path == head, taken=taken, where=where)
    last = max((max(ids) for ids in indices.values()), default=-1)
    size = min((len(_weight(model, path)) for path in indices), default=0)
    fits = last < size or (last < 2 * size and not {embedding, head} & {*taken})
    if not indices or not fits:
        raise InputError(f"{where}: found {tokens}, but the model has {size} tokens there")
    if last >= size:
        grow(model, last + 1)
    made: dict[str, TrainedRows] = {}
    for path in sorted(indices, key=lambda path: path != embedding):  # the one that others follow comes first
        leader = made.get(embedding) if tied else None
        made[path] = TrainedRows(model.get_submodule(path), indices[path], leader)
        if not made[path].follows:
            made[path].start_at_mean(new)
    for path, rows in made.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, rows)
    return made


def _require_table(model: nn.Module, path: str, *, is_head: bool, taken: Collection[str], where: str) -> None:
    module = model.get_submodule(path)
    if path in taken:
        raise InputError(
            f"{where}: {path} has an adapter or is trained whole, so its rows cannot be trained alone (take it out of"
            " adapter.targets and adapter.train_also)"
        )
    if not is_lookup(module) and not (is_head and isinstance(module, nn.Linear)):
        raise InputError(f"{where}: {path} is neither a plain embedding nor the output head")
    if isinstance(module, nn.Linear) and module.bias is not None:
        short = path.rpartition(".")[2]
        raise InputError(
            f"{where}: {path} has a bias, beside which PEFT trains no single rows (use adapter.train_also with {short})"
        )


def _paths(model: PreTrainedModel) -> tuple[str, str | None]:
    """Return the paths of the input embedding and of the output head; None where the model has no head."""
    modules: dict[nn.Module | None, str] = {module: path for path, module in model.named_modules()}
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return modules[model.get_input_embeddings()], modules.get(head)  # type: ignore[no-untyped-call]


def _by_path(
    model: PreTrainedModel, tokens: Sequence[int] | Mapping[str, Sequence[int]]
) -> dict[str, Sequence[int]]:
    """Return the tokens of each module; names are matched at the end of a path, even within a word, as PEFT does."""
    if not isinstance(tokens, Mapping):
        return {_paths(model)[0]: tokens}
    paths = [path for path, _ in model.named_modules() if path]
    return {path: ids for name, ids in tokens.items() for path in paths if path.endswith(name)}


def on_disk(placed: Mapping[str, TrainedRows]) -> list[int] | dict[str, list[int]] | None:
    """Return PEFT's `trainable_token_indices`: a list where only the embedding, and what is tied to it, is trained."""
    stored = {path: rows.ids.tolist() for path, rows in placed.items() if not rows.follows}
    embeddings = [path for path in stored if isinstance(placed[path].base, nn.Embedding)]
    if len(stored) == 1 and embeddings:
        ids: list[int] = stored[embeddings[0]]
        return ids
    return stored or None


def grow(model: PreTrainedModel, size: int) -> None:
    """Give embedding and head at least `size` rows; new ones are the mean of those that were there."""
    embedding, head = _paths(model)
    old = len(_weight(model, embedding))
    if size <= old:
        return
    means = {
        path: _weight(model, path).mean(dim=0, dtype=torch.float32)
        for path in (embedding, head)
        if path is not None
    }
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for path, mean in means.items():
            _weight(model, path).requires_grad_(False)[old:] = mean


def _weight(model: nn.Module, path: str) -> nn.Parameter:
    return model.get_submodule(path).get_parameter("weight")
