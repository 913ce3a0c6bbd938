"""The `adapter` block of each method, all joined in the union `Adapter`.

LoRA's variants are keys of its block, off by default. A block that extends another has the same constructor behind it:
`qlora` is LoRA, with all of its keys; what a method does not implement is no key of its block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from lora_cli.recipe.lora_block import Alpha, LoraAdapter, QloraAdapter, Rank, target_conflicts
from lora_cli.recipe.section import (
    Conflict,
    Fraction,
    NonNegativeInt,
    PositiveInt,
    Section,
    regex_fault,
)


class DoraAdapter(Section):
    """LoRA that trains the length of each weight row apart from its direction (arXiv 2402.09353)."""

    method: Literal["dora"] = "dora"
    """Which method adapts the model."""
    rank: Rank = 16
    """Rank r of the update B A of the direction. Parameters grow linearly with it."""
    alpha: Alpha = 32.0
    """The update of the direction is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Probability of zeroing an input of the low-rank path while training; the base path sees every input."""
    targets: str | list[str] = "all-linear"
    """Layers that get an adapter: `all-linear` (all linear layers but the output head; experts held in 3-D tensors are
    none), `attention`, `mlp`, a list of module names (`[q_proj, v_proj]`, matched at the end of the path), or a regular
    expression that matches the whole path."""
    init_from: str | None = None
    """Start from an adapter that exists, a PEFT folder or a run's folder. It settles rank, alpha and targets; a key
    written here besides must agree. null: a new adapter."""

    def conflicts(self) -> Iterator[Conflict]:
        """Yield what is wrong with the targets."""
        yield from target_conflicts(self.targets)


class VeraAdapter(Section):
    """Two trained vectors a layer, between random matrices that all layers share (arXiv 2310.11454)."""

    method: Literal["vera"] = "vera"
    """Which method adapts the model."""
    rank: Rank = 256
    """Rank r of the shared matrices; far above LoRA's, as it costs r trained numbers a layer. At most the smaller of
    the largest input and the largest output among the target layers."""
    d_initial: Annotated[float, Field(gt=0, le=10.0)] = 0.1
    """Start of the trained vector between the shared matrices. The paper's best values are 0.1 and below."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Probability of zeroing an input of the adapter while training."""
    targets: str | list[str] = "all-linear"
    """Layers that get an adapter: `all-linear` (all linear layers but the output head; experts held in 3-D tensors are
    none), `attention`, `mlp`, a list of module names (`[q_proj, v_proj]`, matched at the end of the path), or a regular
    expression that matches the whole path."""
    projection_seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """The shared matrices are a function of it (PEFT's projection_prng_key), not of run.seed."""
    save_projection: bool = True
    """Write the shared matrices into the adapter and the checkpoints. false: smaller files, whose reader draws the
    matrices again and depends on torch's generator."""
    init_from: str | None = None
    """Start from an adapter that exists, a PEFT folder or a run's folder. It settles all keys but dropout, and the
    shared matrices; a key written here besides must agree. null: a new adapter."""

    def conflicts(self) -> Iterator[Conflict]:
        """Yield what is wrong with the targets."""
        yield from target_conflicts(self.targets)


class AdaLoraAdapter(Section):
    """Low-rank adapters that share one rank budget, moved while training to the layers that need it (2303.10512)."""

    method: Literal["adalora"] = "adalora"
    """Which method adapts the model."""
    initial_rank: Rank = 12
    """Rank of every layer at the start."""
    target_rank: Rank = 8
    """Mean rank at the end; a single layer may end anywhere from 0 to initial_rank."""
    alpha: Alpha = 32.0
    """The update is scaled by alpha / initial_rank, also after pruning."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Probability of zeroing an input of the adapter while training."""
    targets: str | list[str] = "all-linear"
    """Layers that get an adapter: `all-linear` (all linear layers but the output head; experts held in 3-D tensors are
    none), `attention`, `mlp`, a list of module names (`[q_proj, v_proj]`, matched at the end of the path), or a regular
    expression that matches the whole path."""
    tinit: NonNegativeInt | None = None
    """Last step, counted from 0, before ranks begin to fall. null: a tenth of the run."""
    tfinal: PositiveInt | None = None
    """Steps at the end with final ranks, the step that settles them included. null: three tenths of the run."""
    delta_t: PositiveInt | None = None
    """Steps between two budget updates. null: so many that there are at least 100, or one at every step."""
    beta1: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.85
    """Decay rate of the average of a weight's sensitivity |w dL/dw|."""
    beta2: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.85
    """Decay rate of the average of that sensitivity's uncertainty."""
    orthogonal_weight: Annotated[float, Field(ge=0.0, le=1_000.0)] = 0.5
    """Weight of the penalty that keeps rows of A and columns of B orthogonal; it is trained on, but is no part of a
    reported loss. 0: none."""
    init_from: str | None = None
    """Start from an adapter that exists, a PEFT folder or a run's folder. It settles initial_rank, alpha and targets; a
    key written here besides must agree. target_rank is the adapter's too unless it is written here. Pruned triplets
    come back empty, and the schedule is this run's own. null: a new adapter."""

    def conflicts(self) -> Iterator[Conflict]:
        """Yield ranks that would have to grow, and targets as in LoRA."""
        if self.initial_rank < self.target_rank:
            message = (
                f"found {self.target_rank}, above adapter.initial_rank {self.initial_rank} (ranks only fall)"
            )
            yield Conflict("adapter.target_rank", message, reads=("adapter.initial_rank",))
        yield from target_conflicts(self.targets)


class ReloraAdapter(Section):
    """LoRA that is merged and restarted, so that its updates add up to a higher rank (arXiv 2307.05695)."""

    method: Literal["relora"] = "relora"
    """Which method adapts the model."""
    rank: Rank = 16
    """Rank of the update of one cycle; the sum over n cycles has up to n times this rank."""
    alpha: Alpha = 32.0
    """Each update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Probability of zeroing an input of the adapter while training; what was merged before is not affected."""
    targets: str | list[str] = "all-linear"
    """Layers that get an adapter: `all-linear` (all linear layers but the output head; experts held in 3-D tensors are
    none), `attention`, `mlp`, a list of module names (`[q_proj, v_proj]`, matched at the end of the path), or a regular
    expression that matches the whole path."""
    restart_every: PositiveInt | None = None
    """Steps from one restart to the next. null: a quarter of all low-rank steps; give a number if the run may be
    prolonged."""
    restart_warmup: NonNegativeInt | None = None
    """Steps after each restart in which the learning rate climbs back to the schedule. null: a tenth of
    `restart_every`. The run's own warm-up is `train.warmup`."""
    reset: Literal["magnitude", "random", "zero"] = "magnitude"
    """What a restart does to the optimizer's moments of the adapters. magnitude: zeroes the smallest entries. random:
    zeroes drawn entries. zero: zeroes all."""
    reset_fraction: Fraction = 0.9
    """Part of the moments' entries that a restart zeroes. Not used by reset zero."""
    warm_start_steps: NonNegativeInt = 0
    """Steps at the begin in which the target layers are trained at full rank, in the memory of full fine-tuning (16
    bytes a weight); the first low-rank cycle follows, with a re-warm-up. For bases that are hardly trained. Whole, the
    exported PEFT adapter then has the full rank of its layers: better merged, or with an `export_rank`. 0: none."""
    export_rank: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Largest rank of the exported PEFT adapter, which holds all updates in one; less than their whole rank loses
    something, and the error is printed (`export.formats: [merged]` loses nothing). null: their whole rank."""

    def conflicts(self) -> Iterator[Conflict]:
        """Yield faults of the targets, a re-warm-up as long as a cycle, and a fraction that is not used."""
        yield from target_conflicts(self.targets)
        every, warmup = self.restart_every, self.restart_warmup
        if every is not None and warmup is not None and warmup >= every:
            message = f"found {warmup} steps, but a restart comes every {every} steps (at most {every - 1})"
            yield Conflict("adapter.restart_warmup", message, reads=("adapter.restart_every",))
        if self.reset == "zero" and self.reset_fraction not in (0.9, 1.0):
            message = (
                f"found {self.reset_fraction}, but reset zero zeroes everything (use magnitude or random)"
            )
            yield Conflict("adapter.reset_fraction", message, reads=("adapter.reset",))


class FullAdapter(Section):
    """Full fine-tuning: no adapter, the model's own weights are trained."""

    method: Literal["full"] = "full"
    """Which method adapts the model."""
    parameters: str = "all"
    """`all`, or a regular expression that matches the whole name of each parameter to train."""
    masters: Literal["float32", "stochastic_rounding"] = "float32"
    """How small updates of a bfloat16 weight are kept. float32: in a copy of it. stochastic_rounding: there is no copy,
    and the updated weight is rounded up or down with odds that keep its mean: 4 bytes a parameter less."""

    def conflicts(self) -> Iterator[Conflict]:
        """Yield an expression that does not compile."""
        if fault := regex_fault(self.parameters):
            yield Conflict("adapter.parameters", fault)


Adapter = Annotated[
    LoraAdapter | QloraAdapter | DoraAdapter | VeraAdapter | AdaLoraAdapter | ReloraAdapter | FullAdapter,
    Field(discriminator="method"),
]
