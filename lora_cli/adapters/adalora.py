"""AdaLoRA: one rank budget for the whole model, moved to the layers that need it (arXiv 2303.10512).

    h = W x + (alpha / r0) P Lambda Q x          section 3.1

Q (r, in) is `lora_A`, the diagonal of Lambda `lora_E` (r, 1), P (out, r) is `lora_B`. While training, a triplet of a
row of Q, an entry of Lambda and a column of P is scored by sensitivity times uncertainty (section 3.2), and a cubic
schedule lowers the number of entries of Lambda that stay (section 3.3). r0 is the rank before pruning, also after it.

Where we follow PEFT rather than the paper: the scale is alpha / (r0 + 1e-5); the penalty is the mean Frobenius norm of
P'P - I and QQ' - I over all matrices, where the paper has the sum of squares, so that its weight means the same
whatever the size of the model; steps count from 0, and tinit is the last one that does not prune. Between two budget
updates a pruned entry may grow again, which lets a triplet come back (the paper's reason not to remove rows at once).
Where we depart from PEFT: equal scores are kept in the model's order, so that the budget is met exactly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli.adapters import _adalora_config
from lora_cli.adapters._adalora_budget import Importance, Schedule, budget, settle_schedule
from lora_cli.adapters._base import AdapterLinear, BaseLinear, Method, OptimizerState
from lora_cli.adapters._fused import cast
from lora_cli.errors import InputError
from lora_cli.seeding import stream_seed
from lora_cli.types import Progress

TENSORS = ("lora_A", "lora_E", "lora_B")


class AdaLoraLinear(AdapterLinear):
    """A linear layer with an update P Lambda Q of `rank` triplets: (..., in) -> (..., out).

    `initial_rank` sets the scale; it differs from `rank` in an adapter that was read after pruning.
    """

    kept: Tensor | None

    def __init__(
        self,
        base: BaseLinear,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        initial_rank: int | None = None,
    ) -> None:
        super().__init__(base)
        self.scale = alpha / ((rank if initial_rank is None else initial_rank) + 1e-5)
        self.dropout = dropout
        self.lora_A = nn.Parameter(torch.zeros(rank, self.in_features, device=self.device))
        self.lora_E = nn.Parameter(torch.zeros(rank, 1, device=self.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=self.device))
        # (rank,) bool, the triplets of the last budget update; None before the first
        self.register_buffer("kept", None, persistent=False)

    def reset(self, seed: int) -> None:
        """Draw A and B from N(0, 0.02^2) and set E to zero; equal on every device for equal `seed`."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in (self.lora_A, self.lora_B):
                parameter.copy_(torch.empty(parameter.shape).normal_(std=0.02, generator=generator))
            self.lora_E.zero_()

    def adapt(self, x: Tensor) -> Tensor:
        """Return W x, the update of x and the bias: (..., in) -> (..., out)."""
        # E is put into A, r x in, and not into the product, r x tokens, which is larger.
        right = self.lora_A * (self.lora_E * self.scale)
        return self.product(x, right, self.lora_B, 1.0, cast(right, self.lora_B, x.dtype))

    def merged_weight(self) -> Tensor:
        """Return W + scale B diag(E) A, (out, in) float32."""
        diagonal = torch.diag(self.lora_E[:, 0])
        return self.base_weight().float() + self.scale * (self.lora_B @ diagonal @ self.lora_A)

    def written(self) -> Tensor | None:
        """Return which triplets are stored, (rank,) bool, or None before the first budget update: all.

        An entry that has grown again since the last update acts in the model, and so is stored.
        """
        return None if self.kept is None else self.kept | (self.lora_E.detach()[:, 0] != 0)

    def disk_tensors(self) -> dict[str, Tensor]:
        """Return A (r', in), E (r', 1) and B (out, r') by PEFT's names, without the pruned triplets."""
        rows = self.written()
        if rows is None:
            return {"lora_A": self.lora_A, "lora_E": self.lora_E, "lora_B": self.lora_B}
        return {"lora_A": self.lora_A[rows], "lora_E": self.lora_E[rows], "lora_B": self.lora_B[:, rows]}

    def plain_factors(self) -> tuple[Tensor, Tensor]:
        """Return A (r', in) and B (out, r') float32 whose product B A is the whole update, scale and E in B."""
        tensors = {name: tensor.detach() for name, tensor in self.disk_tensors().items()}
        return tensors["lora_A"], tensors["lora_B"] * (self.scale * tensors["lora_E"]).T

    @torch.no_grad()
    def widen(self, rows: Tensor, seed: int) -> None:
        """Put the triplets back where they stood among len(rows), and fresh ones with an entry of 0 between them."""
        held = {name: getattr(self, name).detach() for name in TENSORS}
        for name, size in (("lora_A", (len(rows), self.in_features)), ("lora_E", (len(rows), 1))):
            setattr(self, name, nn.Parameter(held[name].new_zeros(size)))
        self.lora_B = nn.Parameter(held["lora_B"].new_zeros(self.out_features, len(rows)))
        self.reset(seed)
        self.lora_A[rows], self.lora_E[rows], self.lora_B[:, rows] = (held[name] for name in TENSORS)

    @torch.no_grad()
    def prune(self) -> None:
        """Set the entries of E that were not kept to zero."""
        if self.kept is not None:
            self.lora_E.masked_fill_(~self.kept[:, None], 0.0)


class AdaLora(Method):
    """AdaLoRA on the layers that `targets` names: from `initial_rank` each to `target_rank` on average."""

    peft_type = "ADALORA"
    disk_keys = _adalora_config.KEYS
    start_keys = _adalora_config.START_KEYS
    layers: dict[str, AdaLoraLinear]  # type: ignore[assignment]

    def __init__(
        self,
        *,
        initial_rank: int,
        target_rank: int,
        alpha: float,
        dropout: float = 0.0,
        targets: str | list[str] = "all-linear",
        tinit: int | None = None,
        tfinal: int | None = None,
        delta_t: int | None = None,
        beta1: float = 0.85,
        beta2: float = 0.85,
        orthogonal_weight: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.initial_rank, self.target_rank = initial_rank, target_rank
        self.alpha, self.dropout, self.targets, self.seed = alpha, dropout, targets, seed
        self.asked = (tinit, tfinal, delta_t)
        # PEFT's reader wants a run of at least one step, also for an adapter that no run was planned for.
        self.schedule = Schedule(1, 0, 0, 1)
        self.beta1, self.beta2, self.orthogonal_weight = beta1, beta2, orthogonal_weight
        self.pattern: dict[str, list[bool]] = {}
        """Which of the initial triplets an adapter that was read still has, by layer."""
        self.importance = Importance(beta1, beta2)

    def plan(self, total_steps: int) -> None:
        """Settle the schedule.

        Raises:
            InputError: the schedule does not fit into the run.
        """
        self.schedule = settle_schedule(total_steps, *self.asked)

    def inject(self, model: PreTrainedModel) -> dict[str, AdapterLinear]:
        """Inject as every method does, and refuse a rank pattern of layers that are not adapted."""
        super().inject(model)
        strange = sorted(self.pattern.keys() - self.layers.keys())
        if strange:
            raise InputError(
                f"{self.targets_key}: rank_pattern names {strange[0]}, which is not an adapted layer of this model"
            )
        return dict(self.layers)

    def make_layer(self, path: str, base: BaseLinear) -> AdaLoraLinear:
        """Return a layer whose A and B are a function of seed and path."""
        rank = sum(self.pattern[path]) if path in self.pattern else self.initial_rank
        layer = AdaLoraLinear(
            base, rank=rank, alpha=self.alpha, dropout=self.dropout, initial_rank=self.initial_rank
        )
        layer.reset(stream_seed(self.seed, "adapter", path))
        return layer

    def continue_training(self) -> None:
        """Give every layer `initial_rank` triplets again, so that the budget can move between layers as at the start.

        An adapter on disk has lost its pruned triplets, and with them the room that another layer may have come to
        need. Fresh ones, those of a new adapter at the same places, begin at Lambda = 0: the function is unchanged.
        """
        for path, kept in self.pattern.items():
            layer = self.layers[path]
            layer.widen(torch.tensor(kept, device=layer.device), stream_seed(self.seed, "adapter", path))
        self.pattern = {}

    def penalty(self) -> Tensor | None:
        """Return the weighted mean of ||P'P - I|| and ||QQ' - I|| over all matrices, 0-d float32 (section 3.1)."""
        if self.orthogonal_weight == 0:
            return None
        groups: dict[tuple[str, torch.Size], list[Tensor]] = {}
        for layer in self.layers.values():
            groups.setdefault(("A", layer.lora_A.shape), []).append(layer.lora_A)
            groups.setdefault(("B", layer.lora_B.shape), []).append(layer.lora_B)
        norms = []
        for (kind, _), matrices in groups.items():
            stacked = torch.stack(matrices)  # (n, r, in) or (n, out, r)
            gram = stacked @ stacked.mT if kind == "A" else stacked.mT @ stacked  # (n, r, r)
            identity = torch.eye(gram.shape[-1], device=gram.device)
            norms.append(torch.linalg.matrix_norm(gram - identity))
        return self.orthogonal_weight * torch.cat(norms).mean()

    @torch.no_grad()
    def after_step(self, optimizer: OptimizerState, progress: Progress) -> None:
        """Score the triplets, and at the schedule's steps keep only the best; after its end keep those."""
        schedule, step = self.schedule, progress.step
        if step < schedule.end:
            names = [f"{path}.{tensor}" for path in self.layers for tensor in TENSORS]
            self.importance.observe({name: optimizer.masters[name] for name in names})
            if step > schedule.tinit and step % schedule.delta_t == 0:
                self._allocate(step)
        elif self.importance.sensitivity:
            # The step at the end; or the first, where a run goes on with fewer steps and is past the end already.
            self._allocate(step)
            self.importance.forget()
        else:
            for layer in self.layers.values():
                layer.prune()

    def _allocate(self, step: int) -> None:
        """Keep the triplets with the highest scores over all layers, as many as the budget has (section 3.2)."""
        score, count = self.importance.score, len(self.layers)
        scores = torch.cat([score(*(f"{path}.{tensor}" for tensor in TENSORS)) for path in self.layers])
        number = budget(step, self.schedule, self.initial_rank * count, self.target_rank * count)
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[scores.argsort(descending=True, stable=True)[:number]] = True
        for layer, mask in zip(self.layers.values(), kept.view(count, -1), strict=True):
            layer.kept = mask.clone()
            layer.prune()

    def report(self) -> list[str]:
        """Return the rank of every layer, a line for each kind, in the model's order."""
        ranks = {path: len(layer.plain_factors()[0]) for path, layer in self.layers.items()}
        kinds: dict[str, list[str]] = {}
        for path, rank in ranks.items():
            kinds.setdefault(re.sub(r"\.\d+\.", ".*.", path), []).append(str(rank))
        mean = sum(ranks.values()) / len(ranks)
        first = f"adalora: mean rank {mean:g} (from {self.initial_rank}, target {self.target_rank})"
        return [first] + [f"adalora: {kind}: rank {' '.join(values)}" for kind, values in kinds.items()]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages of the scores, and the masks of the last budget update."""
        masks = {f"{path}.kept": layer.kept for path, layer in self.layers.items()}
        return self.importance.state_dict() | {name: mask for name, mask in masks.items() if mask is not None}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        averages = dict(state)
        for path, layer in self.layers.items():
            mask = averages.pop(f"{path}.kept", None)
            layer.kept = None if mask is None else mask.clone().to(layer.lora_A.device)
        device = next(iter(self.layers.values())).lora_A.device
        self.importance.load_state_dict({name: value.clone().to(device) for name, value in averages.items()})

    def disk_config(self) -> dict[str, Any]:
        """Return PEFT's AdaLoRA keys; `r` is not used there, and its reader warns of any but 8."""
        written = {path: layer.written() for path, layer in self.layers.items()}
        pattern = self.pattern | {path: rows.tolist() for path, rows in written.items() if rows is not None}
        return {
            "r": 8,
            "init_r": self.initial_rank,
            "target_r": self.target_rank,
            "rank_pattern": {f"{path}.lora_E": rows for path, rows in pattern.items()} or None,
            "total_step": self.schedule.total_steps,
            "tinit": self.schedule.tinit,
            "tfinal": self.schedule.tfinal,
            "deltaT": self.schedule.delta_t,
            "beta1": self.beta1,
            "beta2": self.beta2,
            "orth_reg_weight": self.orthogonal_weight,
            "lora_alpha": int(self.alpha) if self.alpha == int(self.alpha) else self.alpha,
            "lora_dropout": self.dropout,
            "fan_in_fan_out": any(layer.fan_in_fan_out for layer in self.layers.values()),
            "bias": "none",
            "init_lora_weights": True,
            **dict.fromkeys(("layers_to_transform", "layers_pattern", "modules_to_save")),
        }

    @classmethod
    def disk_settings(cls, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return the constructor's arguments that an adapter_config.json holds."""
        return _adalora_config.read(config, where)

    @classmethod
    def from_disk_config(cls, config: Mapping[str, Any], where: str, **changes: Any) -> AdaLora:
        """Return the method that an adapter_config.json describes; its layers have the ranks of the pattern."""
        method = cls(**cls.disk_settings(config, where) | changes)
        pattern = config.get("rank_pattern")
        method.schedule = Schedule(config["total_step"], config["tinit"], config["tfinal"], config["deltaT"])
        method.pattern = {name.removesuffix(".lora_E"): rows for name, rows in (pattern or {}).items()}
        return method


METHOD = AdaLora
