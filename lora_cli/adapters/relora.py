"""ReLoRA: LoRA merged and restarted, so that the sum of its updates outgrows the rank of one (arXiv 2307.05695).

    W x + P x + s B A x,   every T steps:   P += s B A,   A drawn anew,   B = 0        algorithm 1; s = alpha / rank

At a restart most of the optimizer state of A and B is zeroed, and the learning rate climbs again from near zero to
where the ordinary schedule stands: the jagged schedule of section 3. Starting from a trained model is the paper's
full-rank warm start; a base that is not one can be trained first with `method: full`.

Where we depart from the paper, and why:

- P stays beside the base, as float32 factors of all merges so far, instead of being added to W. The base keeps its
  bits, so that the unadapted model is still there to compare with. Nothing is rounded at a merge either: in bfloat16
  W + P would lose every part of P below 1/256 of its weight, and a quantized base would have to be requantized.
- One mask zeroes both moments of an entry, where the authors' code masks each by its own size. A first moment that
  outlives its second would be divided by nearly nothing and make a leap.
- AdamW's step count runs on, as in the authors' code: zeroed moments then make a first step about 3 times too long
  (0.1 / sqrt(0.001)), which is one reason for the re-warm-up.

Memory: A and B with gradient and moments, 16 bytes a parameter, as LoRA; and P, 4 bytes times the parameters of one
adapter for each restart, on the device and in a checkpoint. 3 restarts at rank 16 cost a (4096, 4096) layer 1.6 MB,
where P as a float32 matrix would cost 67 MB. A step computes a frozen update of rank `restarts x rank` besides: 2 % of
such a layer's product. Once P's factors would be wider than the layer's smaller side, they are multiplied out and stay
that wide: then P costs up to twice a float32 matrix, and that many restarts are better spent on a higher rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_cli.adapters._base import AdapterLinear, BaseLinear, Method, OptimizerState
from lora_cli.adapters._low_rank import LoraLinear
from lora_cli.adapters.lora import Lora
from lora_cli.errors import InputError
from lora_cli.seeding import stream_seed
from lora_cli.types import Progress

CYCLES = 4
"""Cycles of a run that does not say `restart_every`."""


class ReloraLinear(LoraLinear):
    """A linear layer with a live rank-r update and the sum of those merged before: (..., in) -> (..., out)."""

    past_A: Tensor  # (R, in) float32, R = 0 before the first restart
    past_B: Tensor  # (out, R) float32, with the scale in it

    def __init__(self, base: BaseLinear, *, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__(base, rank=rank, alpha=alpha, dropout=dropout)
        self.register_buffer("past_A", self.lora_A.new_empty(0, self.in_features), persistent=False)
        self.register_buffer("past_B", self.lora_B.new_empty(self.out_features, 0), persistent=False)

    def adapt(self, x: Tensor, y: Tensor) -> Tensor:
        """Add what was merged, without dropout, and the live update: (..., in), (..., out) -> (..., out)."""
        if len(self.past_A):
            y = y + F.linear(F.linear(x, self.past_A.to(x.dtype)), self.past_B.to(x.dtype))
        return super().adapt(x, y)

    def merged_weight(self) -> Tensor:
        """Return W + P + scale B A, (out, in) float32."""
        return super().merged_weight() + self.past_B @ self.past_A

    def disk_tensors(self) -> dict[str, Tensor]:
        """Fail: A and B without what was merged before are not the update; see `Relora.as_peft`."""
        raise AssertionError("ReLoRA has no disk format of its own")

    @torch.no_grad()
    def restart(self, seed: int) -> None:
        """Merge the live update into the past one and draw a new A; what the layer computes stays the same."""
        past_a, past_b = self.plain_factors()
        narrow = min(self.in_features, self.out_features)
        if len(past_a) > narrow:
            delta, unit = past_b @ past_a, torch.eye(narrow, device=past_a.device)
            past_b, past_a = (unit, delta) if self.out_features == narrow else (delta, unit)
        self.past_B, self.past_A = past_b, past_a
        self.reset(seed)

    @torch.no_grad()
    def plain_factors(self) -> tuple[Tensor, Tensor]:
        """Return the whole update, past and live, as A (R, in) and B (out, R); a live one of zero is left out."""
        if len(self.past_A) and not bool(self.lora_B.any()):
            return self.past_A, self.past_B
        a, b = (
            torch.cat([self.past_A, self.lora_A]),
            torch.cat([self.past_B, self.scale * self.lora_B], dim=1),
        )
        return a, b


class Relora(Method):
    """LoRA restarted every `restart_every` steps, also at the run's last step: a restart depends on the step alone."""

    def __init__(
        self,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        targets: str | list[str] = "all-linear",
        restart_every: int | None = None,
        restart_warmup: int | None = None,
        reset: str = "magnitude",
        reset_fraction: float = 0.9,
        export_rank: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.targets, self.seed, self.export_rank = targets, seed, export_rank
        self.reset, self.reset_fraction = reset, 1.0 if reset == "zero" else reset_fraction
        self.restart_every, self.restart_warmup = restart_every, restart_warmup
        self.every, self.warmup = 0, 0
        """The two as settled by `plan`."""
        self.restarts = 0

    def plan(self, total_steps: int) -> None:
        """Settle when to restart.

        Raises:
            InputError: the run has no restart before its last step, or a re-warm-up is longer than a cycle.
        """
        every = math.ceil(total_steps / CYCLES) if self.restart_every is None else self.restart_every
        warmup = every // 10 if self.restart_warmup is None else self.restart_warmup
        if every >= total_steps:
            found = every if self.restart_every is not None else f"null, which gives {every}"
            raise InputError(
                f"adapter.restart_every: found {found}, but the run has {total_steps} steps: no restart would come"
                " before its end (train longer, restart earlier, or use method: lora)"
            )
        if warmup >= every:
            raise InputError(
                f"adapter.restart_warmup: found {warmup} steps, but a restart comes every {every} steps"
                f" (at most {every - 1})"
            )
        self.every, self.warmup = every, warmup

    def make_layer(self, path: str, base: BaseLinear) -> AdapterLinear:
        """Return a ReloraLinear whose first A is that of LoRA: a function of seed and path."""
        layer = ReloraLinear(base, rank=self.rank, alpha=self.alpha, dropout=self.dropout)
        layer.reset(stream_seed(self.seed, "adapter", path))
        return layer

    def schedule_factor(self, step: int) -> float:
        """Return 1, or the part of the learning rate that the re-warm-up has reached."""
        assert self.every
        since = step % self.every if step >= self.every else self.warmup
        return min((since + 1) / (self.warmup + 1), 1.0)

    def after_step(self, optimizer: OptimizerState, progress: Progress) -> None:
        """Restart all layers at the end of a cycle."""
        assert self.every
        if (progress.step + 1) % self.every:
            return
        self.restarts += 1
        for path, layer in self._layers().items():
            for name in ("lora_A", "lora_B"):
                moments = optimizer.moments(f"{path}.{name}")
                seed = stream_seed(self.seed, "reset", f"{path}.{name}", self.restarts)
                prune(moments, self.reset_fraction, seed if self.reset == "random" else None)
                optimizer.set_moments(f"{path}.{name}", moments)
            layer.restart(stream_seed(self.seed, "restart", path, self.restarts))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the number of restarts and, after the first, the factors of what was merged, float32."""
        state = {"restarts": torch.tensor(self.restarts)}
        for path, layer in self._layers().items():
            if self.restarts:
                state |= {f"{path}.past_A": layer.past_A, f"{path}.past_B": layer.past_B}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.restarts = int(state["restarts"])
        for path, layer in self._layers().items():
            for name, now in (("past_A", layer.past_A[:0]), ("past_B", layer.past_B[:, :0])):
                setattr(layer, name, state[f"{path}.{name}"].to(now.device) if self.restarts else now)

    @torch.no_grad()
    def as_peft(self) -> tuple[Method, dict[str, float]]:
        """Return the whole update as one plain LoRA of scale 1 and of one rank, and each layer's relative error.

        The rank is that of the widest layer's update, which loses nothing but rounding, or `export_rank` if that is
        less; updates of a lower rank are padded with zeros.
        """
        updates = {path: layer.plain_factors() for path, layer in self._layers().items()}
        rank = max(min(len(a), len(b), a.shape[1]) for a, b in updates.values())
        rank = min(rank, self.export_rank or rank)
        written, errors = Lora(rank=rank, alpha=float(rank), targets=self.targets), {}
        written.disk_targets = self.disk_targets
        for path, (a, b) in updates.items():
            layer = LoraLinear(self.layers[path].base, rank=rank, alpha=float(rank))
            left, right, errors[path] = truncate(b, a, rank)
            layer.lora_B[:, : left.shape[1]] = left
            layer.lora_A[: len(right)] = right
            written.layers[path] = layer
        return written, errors

    def _layers(self) -> dict[str, ReloraLinear]:
        return {path: layer for path, layer in self.layers.items() if isinstance(layer, ReloraLinear)}


@torch.no_grad()
def prune(moments: Mapping[str, Tensor], fraction: float, seed: int | None) -> None:
    """Zero a fraction of the entries of both moments in place: those drawn by `seed`, or the smallest if it is None.

    The smallest are those of the first moment, by magnitude. The number of entries is rounded to the nearest.
    """
    if not moments:  # no step has been made yet
        return
    size = moments["exp_avg"].abs().flatten()
    if seed is None:
        order = size.argsort(stable=True)
    else:
        order = torch.randperm(len(size), generator=torch.Generator().manual_seed(seed)).to(size.device)
    for moment in moments.values():
        moment.view(-1)[order[: round(fraction * len(size))]] = 0.0


def truncate(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return the best approximation of b a, (out, R) (R, in), of at most `rank`, and its relative error.

    It is float32 factors (out, k), (k, in) that share the singular values evenly, k <= rank; the error is that of the
    Frobenius norm, and counts their rounding. All is computed in float64 on (R, R): the product is never formed.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, values, v = torch.linalg.svd(r_b @ r_a.T)
    root = values[:rank].sqrt()
    left = (q_b @ (u[:, : len(root)] * root)).float()
    right = ((root[:, None] * v[: len(root)]) @ q_a.T).float()
    lost = _norm(torch.cat([b, -left], dim=1), torch.cat([a, right]))
    whole = float(torch.linalg.vector_norm(values))
    return left, right, lost / whole if whole else 0.0


def _norm(b: Tensor, a: Tensor) -> float:
    """Return the Frobenius norm of b a."""
    r_b, r_a = (torch.linalg.qr(factor.double(), mode="r").R for factor in (b, a.T))
    return float(torch.linalg.matrix_norm(r_b @ r_a.T))


METHOD = Relora
