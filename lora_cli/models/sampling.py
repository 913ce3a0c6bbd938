"""Completions drawn from the live model, many at a time, with a cache of keys and values.

A token is the inverse of the cumulative distribution at a number from [0, 1). These numbers are a stream of the
completion's own seed (Philox, a counter-based generator), so what is drawn depends on the seed and the prompt alone,
not on what shares its batch, on padding, on the device or on the number of processes: up to the rounding of the
logits, which moves a draw only if its number lies within that of a border between two tokens.

Log-probabilities and entropies are those of the model itself, at temperature 1 and over the whole vocabulary, whatever
the temperature and the cuts that the tokens were drawn with.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import DynamicCache

from lora_cli.errors import InputError, ResourceError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.memory import attempt, forget

_COMPACTED = 8
"""The batch loses its ended rows when they are more than one in so many: a smaller batch costs a copy of the cache."""

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Draw:
    """How tokens are chosen: `temperature` 0 takes the most likely one, `top_k` None and `top_p` 1 cut nothing."""

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """What was drawn: T tokens, the terminator among them if one `ended` it, and what the model gave each."""

    ids: Ids  # (T,)
    logps: npt.NDArray[np.float32]  # (T,), nats
    entropies: npt.NDArray[np.float32]  # (T,), nats
    ended: bool

    def answer(self) -> list[int]:
        """Return the tokens without the terminator."""
        kept = self.ids[:-1] if self.ended else self.ids
        return [int(token) for token in kept]


def sample(
    model: AdaptedModel,
    prompts: Sequence[Ids],
    seeds: Sequence[int],
    draw: Draw,
    *,
    pad_id: int,
    tokens: int,
    stopping: Callable[[], bool] = lambda: False,
) -> list[Completion]:
    """Return a completion of each prompt, in their order; equal prompts that follow each other are read once.

    The model must be in evaluation. A pass has at most `tokens` padded tokens of prompts and completions, or one row;
    one that does not fit into memory is made again in halves. Where it is `stopping`, which is asked before each token,
    nothing is returned.

    Raises:
        InputError: the model keeps no cache of keys and values.
        ResourceError: a single row does not fit.
    """
    _require_cache(model)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    waiting = _batches([len(prompts[index]) + draw.max_new_tokens for index in order], tokens)
    found: dict[int, Completion] = {}
    while waiting:
        batch = waiting.pop()
        chosen = [order[place] for place in batch]
        with attempt() as tried, torch.no_grad():
            drawing = _Drawing(model, draw, pad_id, [seeds[index] for index in chosen], stopping)
            drawn = drawing.run([prompts[index] for index in chosen])
        if stopping():
            return []
        if not tried.failed:
            found.update(zip(chosen, drawn, strict=True))
            continue
        forget(model.device)
        if len(batch) == 1:
            length = len(prompts[chosen[0]])
            raise ResourceError(
                f"out of memory: one prompt of {length:,} tokens and {draw.max_new_tokens:,} new ones do not fit"
                " (lower objective.sampling.max_new_tokens or data.max_length)"
            )
        half = len(batch) // 2
        waiting += [batch[half:], batch[:half]]
    return [found[index] for index in range(len(prompts))]


def choose(logits: Tensor, uniforms: Tensor, draw: Draw) -> Tensor:
    """Return the token of each row, (B,): logits (B, V) float32, uniforms (B,) float64 in [0, 1).

    The cuts are made as transformers makes them: temperature, then the `top_k` most likely with all that equal the last
    of them, then of the rest the fewest that have `top_p` of the probability together.
    """
    if draw.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits / draw.temperature, dim=-1)  # (B, V)
    if draw.top_k is not None and draw.top_k < probabilities.shape[-1]:
        least = probabilities.topk(draw.top_k, dim=-1).values[:, -1:]
        probabilities = probabilities.where(probabilities >= least, 0.0)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    if draw.top_p < 1:
        ordered, places = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        ordered = ordered.where(before < draw.top_p, 0.0)
        probabilities = torch.zeros_like(ordered).scatter(-1, places, ordered)
    # float64: in float32 the cumulative sum over 10^5 tokens is off by more than many of them have.
    cumulated = probabilities.cumsum(dim=-1, dtype=torch.float64)
    total = cumulated[:, -1:]
    found = torch.searchsorted(cumulated, uniforms[:, None] * total, right=True)
    # Where the product rounds up to the total, the token is the last one that has any probability.
    last = torch.searchsorted(cumulated, total.contiguous())
    return torch.minimum(found, last).squeeze(1)


def _require_cache(model: AdaptedModel) -> None:
    accepted = inspect.signature(model.model.forward).parameters
    missing = [name for name in ("past_key_values", "position_ids") if name not in accepted]
    if missing:
        kind = model.model.config.model_type
        raise InputError(
            f"model.base: a {kind} model takes no {' and no '.join(missing)}, so nothing can be sampled from it (choose"
            " a base with a cache of keys and values)"
        )


def _batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Return places in `lengths`, which fall, in batches of at most `tokens` when padded; the last batch first."""
    batches: list[list[int]] = []
    for place, length in enumerate(lengths):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(place)
        else:
            assert length > 0
            batches.append([place])
    return batches[::-1]


class _Drawing:
    """One batch of completions; B rows that are still drawn, L tokens of each in the cache, padding counted."""

    def __init__(
        self,
        model: AdaptedModel,
        draw: Draw,
        pad_id: int,
        seeds: Sequence[int],
        stopping: Callable[[], bool],
    ) -> None:
        self.model, self.draw, self.pad_id, self.stopping = model, draw, pad_id, stopping
        streams = [np.random.Generator(np.random.Philox(seed)).random(draw.max_new_tokens) for seed in seeds]
        self.uniforms = torch.from_numpy(np.stack(streams)).to(model.device)  # (rows, max_new_tokens)
        self.stops = torch.tensor(draw.stop_ids, dtype=torch.int64, device=model.device)
        self.cache = DynamicCache(config=model.model.config)
        accepted = inspect.signature(model.model.forward).parameters
        self._last_alone = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def run(self, prompts: Sequence[Ids]) -> list[Completion]:
        """Return the completion of each prompt; nothing where it is `stopping`."""
        logits, mask = self._read(prompts)
        count, device = len(prompts), self.model.device
        rows = torch.arange(count, device=device)  # whose the rows of the batch are
        ended = torch.zeros(count, dtype=torch.bool, device=device)
        steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # rows, tokens, log-probabilities, entropies
        for step in range(self.draw.max_new_tokens):
            if self.stopping():
                return []
            tokens = choose(logits, self.uniforms[rows, step], self.draw)
            logps = logits.log_softmax(dim=-1)
            live = ~ended[rows]
            chosen = logps.gather(1, tokens[:, None]).squeeze(1)
            entropies = -(logps.exp() * logps.clamp(min=-1e30)).sum(dim=-1)
            steps.append((rows[live], tokens[live], chosen[live], entropies[live]))
            ended[rows] |= torch.isin(tokens, self.stops)
            still = (~ended[rows]).nonzero().squeeze(1)
            if not len(still) or step + 1 == self.draw.max_new_tokens:
                break
            if len(still) < len(rows) and (len(rows) - len(still)) * _COMPACTED >= len(rows):
                self.cache.batch_select_indices(still)
                rows, tokens, mask = rows[still], tokens[still], mask[still]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            logits = self._forward(tokens[:, None], mask)
        return self._completions(steps, ended)

    def _read(self, prompts: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        """Fill the cache, and return the logits (B, V) that follow each prompt and the mask (B, L)."""
        distinct: dict[bytes, int] = {}
        whose = [distinct.setdefault(prompt.tobytes(), len(distinct)) for prompt in prompts]
        each = [prompts[whose.index(number)] for number in range(len(distinct))]
        longest = max(map(len, each))
        ids = torch.full((len(each), longest), self.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(each):  # padded at the left, so that all continue at one place
            ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask[row, longest - len(prompt) :] = 1
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        logits = self._forward(ids, mask)
        if len(each) == len(prompts):
            return logits, mask
        repeated = torch.tensor(whose, device=self.model.device)
        self.cache.batch_select_indices(repeated)
        return logits[repeated], mask[repeated]

    def _forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Append tokens (B, T) to the cache, and return the logits (B, V) float32 that follow the last."""
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self.model.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **self._last_alone,
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _completions(
        self, steps: list[tuple[Tensor, Tensor, Tensor, Tensor]], ended: Tensor
    ) -> list[Completion]:
        rows, tokens, logps, entropies = (
            torch.cat(column).cpu().numpy() for column in zip(*steps, strict=True)
        )
        order = np.argsort(rows, kind="stable")  # of each row its tokens, in the order they were drawn
        borders = np.cumsum(np.bincount(rows, minlength=len(ended)))[:-1]
        columns = [np.split(column[order], borders) for column in (tokens.astype(np.int32), logps, entropies)]
        return [
            Completion(ids, given, spread, bool(end))
            for ids, given, spread, end in zip(*columns, ended.tolist(), strict=True)
        ]
