"""ReLoRA: LoRA merged and restarted, so that the sum of its updates outgrows the rank of one (arXiv 2307.05695).

    W x + P x + s B A x,   every T steps:   P += s B A,   A drawn anew,   B = 0        algorithm 1; s = alpha / rank
    W x + P x              in the first `warm_start_steps`: P is trained itself        section 3, "warm start"

At a restart most of the optimizer state of A and B is zeroed, and the learning rate climbs again from near zero to
where the ordinary schedule stands: the jagged schedule of section 3. The full-rank warm start is for a base that is
hardly trained, or for data far from what it was trained on. It trains the target layers, as the cycles do, where the
paper trains all weights. At its end the moments of P are released, and the learning rate climbs as after a restart.

Where we depart from the paper, and why:

- P stays beside the base, as float32 factors of all merges so far, instead of being added to W. The base keeps its
  bits, so that the unadapted model is still there to compare with. Nothing is rounded at a merge either: in bfloat16
  W + P would lose every part of P below 1/256 of its weight, and a quantized base would have to be requantized. After a
  warm start, and once the factors would be wider than the layer's smaller side, P is one float32 matrix.
- One mask zeroes both moments of an entry, where the authors' code masks each by its own size. A first moment that
  outlives its second would be divided by nearly nothing and make a leap.
- AdamW's step count runs on, as in the authors' code: zeroed moments then make a first step about 3 times too long
  (0.1 / sqrt(0.001)), which is one reason for the re-warm-up.

Memory: A and B with gradient and moments, 16 bytes a parameter, as LoRA; and P, 4 bytes times the parameters of one
adapter for each restart, on the device and in a checkpoint. 3 restarts at rank 16 cost a (4096, 4096) layer 1.6 MB,
where P as a float32 matrix would cost 67 MB. A step computes a frozen update of rank `restarts x rank` besides: 2 % of
such a layer's product. As a matrix P costs 4 bytes a weight of the layer, 2 more in a bfloat16 pass, and a second
product like the base's own; that many restarts are better spent on a higher rank. In the warm start it has a gradient
and moments besides, 16 bytes a weight: the memory of full fine-tuning, which is the peak of the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_cli.adapters import _portable
from lora_cli.adapters._base import AdapterLinear, BaseLinear, Method, OptimizerState
from lora_cli.adapters._relora_layer import ReloraLinear
from lora_cli.errors import InputError
from lora_cli.seeding import stream_seed
from lora_cli.types import Progress

CYCLES = 4
"""Cycles of a run that does not say `restart_every`."""


class Relora(Method):
    """LoRA restarted every `restart_every` steps, also at the run's last step: a restart depends on the step alone.

    The steps are counted from the end of the warm start.
    """

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
        warm_start_steps: int = 0,
        export_rank: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.targets, self.seed, self.export_rank = targets, seed, export_rank
        self.reset, self.reset_fraction = reset, 1.0 if reset == "zero" else reset_fraction
        self.restart_every, self.restart_warmup = restart_every, restart_warmup
        self.warm_start_steps = warm_start_steps
        self.every, self.warmup = 0, 0
        """The two as settled by `plan`."""
        self.restarts = 0

    def plan(self, total_steps: int) -> None:
        """Settle when to restart.

        Raises:
            InputError: the warm start is as long as the run, the run has no restart before its last step, or a
                re-warm-up is longer than a cycle.
        """
        warm = self.warm_start_steps
        if warm >= total_steps:
            raise InputError(
                f"adapter.warm_start_steps: found {warm}, but the run has {total_steps} steps: no low-rank step would"
                " be left (train longer, warm up for less, or use method: full)"
            )
        low_rank = total_steps - warm
        every = math.ceil(low_rank / CYCLES) if self.restart_every is None else self.restart_every
        warmup = every // 10 if self.restart_warmup is None else self.restart_warmup
        if every >= low_rank:
            found = every if self.restart_every is not None else f"null, which gives {every}"
            left = f", {low_rank} of them after adapter.warm_start_steps {warm}" if warm else ""
            raise InputError(
                f"adapter.restart_every: found {found}, but the run has {total_steps} steps{left}: no restart would"
                " come before its end (train longer, restart earlier, or use method: lora)"
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
        if self.warm_start_steps:
            layer.warm_start()
        return layer

    def schedule_factor(self, step: int) -> float:
        """Return 1, or the part of the learning rate that the re-warm-up has reached."""
        assert self.every
        low_rank = step - self.warm_start_steps
        first = self.every if self.warm_start_steps == 0 else 0
        since = low_rank % self.every if low_rank >= first else self.warmup
        return min((since + 1) / (self.warmup + 1), 1.0)

    def after_step(self, optimizer: OptimizerState, progress: Progress) -> None:
        """Restart all layers at the end of a cycle; at the end of the warm start, begin the first."""
        assert self.every
        low_rank = progress.step + 1 - self.warm_start_steps
        if low_rank == 0:
            for layer in self._layers().values():
                layer.end_warm_start()
        if low_rank <= 0 or low_rank % self.every:
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
        """Return the number of restarts and what was merged, float32: nothing before the end of the first cycle."""
        state = {"restarts": torch.tensor(self.restarts)}
        for path, layer in self._layers().items():
            state |= {f"{path}.{name}": value for name, value in layer.past().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.restarts = int(state["restarts"])
        for path, layer in self._layers().items():
            names = {name: f"{path}.{name}" for name in ("past_A", "past_B", "past_delta")}
            past = {name: state[whole] for name, whole in names.items() if whole in state}
            if self.warm_start_steps and not past:
                layer.warm_start()
                # A and B are not trained yet, and so not in a checkpoint; from a later step there may be others here.
                layer.reset(stream_seed(self.seed, "adapter", path))
            else:
                layer.end_warm_start()
            layer.set_past(past)

    def as_peft(self) -> tuple[Method, dict[str, float]]:
        """Return the whole update as one plain LoRA of scale 1 and of one rank, and each layer's relative error.

        The rank is that of the widest layer's update, which loses nothing but rounding, or `export_rank` if that is
        less; updates of a lower rank are padded with zeros. After a warm start the rank is that of a whole layer.
        """
        return _portable.plain_lora(self, self.export_rank)

    def disk_bytes(self) -> int:
        """Return about how many bytes `as_peft` takes: a rank for each cycle of a run of CYCLES, if not fewer."""
        rank = self.export_rank or CYCLES * self.rank
        sides = [(layer.in_features, layer.out_features) for layer in self.layers.values()]
        return sum(4 * min(rank, *side) * sum(side) for side in sides)

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


METHOD = Relora
