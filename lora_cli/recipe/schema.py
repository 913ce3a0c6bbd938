"""Every key a user may write, with its type, default, bounds and documentation under the field.

The JSON Schema for editors, `lora recipe explain` and the did-you-mean of error messages all come from these models.
A key exists only if some code reads it. Rules that join keys live in the `conflicts` of their section, or of `Recipe`
where they join two sections. They yield instead of raising, so that one pass reports all of them.

An objective is added as one block in `objective_blocks.py`, joined to the union `Objective`; an adapter method in
`adapter_blocks.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr

from lora_cli.recipe.adapter_blocks import AdaLoraAdapter as AdaLoraAdapter
from lora_cli.recipe.adapter_blocks import Adapter as Adapter
from lora_cli.recipe.adapter_blocks import DoraAdapter as DoraAdapter
from lora_cli.recipe.adapter_blocks import FullAdapter as FullAdapter
from lora_cli.recipe.adapter_blocks import ReloraAdapter as ReloraAdapter
from lora_cli.recipe.adapter_blocks import VeraAdapter as VeraAdapter
from lora_cli.recipe.constitution_block import Constitution as Constitution
from lora_cli.recipe.constitution_block import Critic as Critic
from lora_cli.recipe.constitution_block import Judge as Judge
from lora_cli.recipe.data_block import Data as Data
from lora_cli.recipe.data_block import DataSource as DataSource
from lora_cli.recipe.data_block import Fields as Fields
from lora_cli.recipe.evaluate_block import Evaluate as Evaluate
from lora_cli.recipe.evaluate_block import WinRate as WinRate
from lora_cli.recipe.export_block import Export as Export
from lora_cli.recipe.export_block import format_conflicts
from lora_cli.recipe.lora_block import LoraAdapter as LoraAdapter
from lora_cli.recipe.lora_block import QloraAdapter as QloraAdapter
from lora_cli.recipe.objective_blocks import Objective as Objective
from lora_cli.recipe.objective_blocks import SftObjective as SftObjective
from lora_cli.recipe.objective_blocks import objective_conflicts
from lora_cli.recipe.rollout_blocks import Reward
from lora_cli.recipe.rollout_blocks import RolloutObjective as RolloutObjective
from lora_cli.recipe.section import Conflict as Conflict
from lora_cli.recipe.section import Fraction, NonNegativeInt, PositiveInt
from lora_cli.recipe.section import Section as Section


class Model(Section):
    """The base model."""

    base: str = "tiny"
    """Local folder, hub id, or `tiny` (the bundled 4 M parameter model for trying things out)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id. null: the default branch. Not for local folders."""
    trust_remote_code: bool = False
    """Let Python code that comes with the base run, where its config.json names some (`auto_map`): read it before. Of a
    hub id, only with a commit as `revision`. A tokenizer's code is never run. Files of a model cannot set it."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the base weights and of the computation. Trained weights are kept in float32 besides."""
    quantize: Literal["auto", "none", "nf4", "fp4", "int8"] = "auto"
    """How the linear layers of the base are stored, all but the output head. nf4, fp4: 4 bits a weight. int8: 8 bits.
    They compute in `dtype`. none: as they are. auto: nf4 with the method qlora, else none."""
    double_quant: bool = True
    """Store the scales of a quantized base in 8 bits too: 4.13 bits a weight in place of 4.5. Means nothing where
    the base is not quantized."""


class Train(Section):
    """The training loop."""

    epochs: Annotated[float, Field(gt=0, le=10_000)] = 3.0
    """Passes over the training rows; 0.5 is half a pass. Not used when `max_steps` is given."""
    max_steps: PositiveInt | None = None
    """Optimizer steps in all. null: as many as `epochs` needs."""
    batch_size: PositiveInt = 32
    """Sequences per optimizer step, over all processes and micro-batches."""
    micro_batch_tokens: Literal["auto"] | PositiveInt = "auto"
    """Tokens per forward pass, padding counted; a step is split into as many passes as needed, with the same result (up
    to the draws of a dropout). auto: 4096 on a CPU and 16384 on a GPU, less for a large vocabulary where a
    model's code allows its losses only from all logits."""
    activations: Literal["auto", "keep", "recompute", "offload"] = "auto"
    """What a pass keeps of the decoder layers for its backward pass; a gradient has the same bits either way. keep: all
    that it needs. recompute: each layer's input, from which it is computed again, in about 1.4 times the time. offload:
    the same, and on a GPU the inputs wait in the CPU's memory. auto: keep what has room, recompute the rest."""
    compile: bool = False
    """Compile the decoder layers with torch.compile before the first step: one layer's code for all, for rows of any
    length. A loss may change in its last bits. Where a layer cannot be compiled, or there is no compiler, a line says
    so and the run goes on without."""
    learning_rate: Annotated[float, Field(gt=0, le=10.0)] = 2.0e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine", "wsd", "polynomial", "inverse_sqrt"] = "cosine"
    """How the learning rate falls after the warm-up. wsd: constant, then linear decay over the last `decay` part."""
    warmup: Fraction | NonNegativeInt = 0.03
    """Linear warm-up: steps (an integer) or a fraction of all steps (a decimal number up to 1.0)."""
    floor: Fraction = 0.0
    """Lowest learning rate after the warm-up, as a fraction of the peak. Not used by constant."""
    decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Part of all steps over which wsd decays."""
    power: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0
    """Exponent of the polynomial schedule."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw: moments in float32. adamw_8bit: in 8 bits (arXiv 2110.02861), but for weights below 4096 values: 2 bytes
    a parameter in place of 8, a slower step."""
    weight_decay: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    """Decoupled weight decay of AdamW. It acts on matrices, and on VeRA's vectors, which are the update itself; not on
    biases, norms and DoRA's row lengths, which begin as the base's own: decay would draw them to zero."""
    betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]] = (
        0.9,
        0.999,
    )
    """AdamW's decay rates of the first and second moment."""
    eps: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0e-8
    """AdamW's term against division by zero."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] | None = 1.0
    """Gradients are scaled down to this global norm. null: no clipping."""
    skip_spikes: Annotated[float, Field(ge=2.0, le=1000.0)] | None = None
    """Do not apply a step whose loss or gradient norm is more than so many standard deviations above the mean of the
    last 128 applied steps; from 64 of these on. 6 is usual. More than 10 skipped in a row end the run. null: apply
    all."""
    log_every: PositiveInt = 10
    """Steps between lines of metrics.jsonl and of the plain log; the first and the last step are logged besides."""
    eval_every: PositiveInt | None = None
    """Steps between held-out losses while training. null: only at the end."""
    save_every: PositiveInt | None = None
    """Steps between checkpoints. null: one at the end of training, and one when stopped by a signal. Where the best
    weights are exported, one at each better held-out loss besides."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints kept. The one with the best held-out loss is kept besides, where there is one."""
    early_stopping: PositiveInt | None = None
    """Stop after so many held-out evaluations in a row without a better loss. null: never."""
    final_weights: Literal["auto", "last", "best"] = "auto"
    """Which weights are evaluated and exported. best: those with the lowest held-out loss. auto: best with
    `early_stopping`, else last."""

    def conflicts(self) -> Iterator[Conflict]:
        """Yield every broken rule that joins keys of this block."""
        if self.max_steps is not None and isinstance(self.warmup, int) and self.warmup > self.max_steps:
            message = (
                f"found {self.warmup} warm-up steps, more than train.max_steps {self.max_steps} (lower one)"
            )
            yield Conflict("train.warmup", message, reads=("train.max_steps",))
        if self.floor > 0 and self.schedule == "constant":
            message = f"found {self.floor}, but the constant schedule has no floor (choose another schedule)"
            yield Conflict("train.floor", message, reads=("train.schedule",))
        if self.eval_every is None:
            if self.early_stopping is not None:
                message = (
                    f"found {self.early_stopping}, but nothing is evaluated meanwhile (set train.eval_every)"
                )
                yield Conflict("train.early_stopping", message, reads=("train.eval_every",))
            if self.final_weights == "best":
                message = "found best, but nothing is evaluated while training (set train.eval_every)"
                yield Conflict("train.final_weights", message, reads=("train.eval_every",))


class Run(Section):
    """Where the run is kept, and how it is computed."""

    output: str = "runs/latest"
    """Folder of the run."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Adapter initialisation, row order, dropout and stochastic rounding are functions of it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one, else cpu."""
    deterministic: bool = False
    """Compute on a GPU by algorithms that repeat their bits, some of them slower. A CPU repeats them anyway."""
    allow_code: bool = False
    """Let Python code run that the recipe names, as a reward may: read it before."""


class Recipe(Section):
    """One fine-tuning run, from data to exported model."""

    model: Model = Model()
    data: Data = Data()
    adapter: Adapter = LoraAdapter()
    objective: Objective = SftObjective()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    constitution: Constitution | None = None
    run: Run = Run()

    _places: dict[str, str] = PrivateAttr(default_factory=dict)
    """Where each key was written, `file:line:column` or `override key=value`; see `at`."""

    def conflicts(self) -> Iterator[Conflict]:
        """Yield every broken rule that joins keys of two blocks."""
        yield from format_conflicts(self.export_formats(), self.adapter)
        yield from objective_conflicts(self.objective, self.export_formats(), self.train.batch_size)
        if isinstance(self.adapter, FullAdapter) and self.model.dtype == "float32" != self.adapter.masters:
            message = f"found {self.adapter.masters}, but a float32 weight is its own master (remove the key)"
            yield Conflict("adapter.masters", message, reads=("model.dtype",))
        yield from self._quantization_conflicts()
        yield from self._rollout_conflicts()
        if not self.data.holds_out() and self.train.eval_every is not None:
            message = f"found {self.train.eval_every}, but there are no held-out rows (set data.eval)"
            yield Conflict("train.eval_every", message, reads=("data.eval",))
        yield from self._answer_conflicts()

    def _answer_conflicts(self) -> Iterator[Conflict]:
        """Yield what keeps the answers from being generated that a metric is of."""
        known = isinstance(self.objective, SftObjective | RolloutObjective)
        for metric in ("exact_match", "win_rate"):
            if metric not in self.evaluate.metrics:
                continue
            if not self.data.holds_out():
                message = f"found {metric}, but there are no held-out rows (set data.eval)"
                yield Conflict("evaluate.metrics", message, reads=("data.eval",))
            if self.data.format == "text":
                message = f"found {metric}, but text rows have no answer to compare (use loss)"
                yield Conflict("evaluate.metrics", message, reads=("data.format",))
            if metric == "win_rate" and self.objective.name == "reward":
                message = "found win_rate, but a reward model gives no answers (use loss)"
                yield Conflict("evaluate.metrics", message, reads=("objective.name",))
            if metric == "exact_match" and not known:
                message = f"found exact_match, but {self.objective.name} compares answers (use loss)"
                yield Conflict("evaluate.metrics", message, reads=("objective.name",))
            elif self.train_on() == "all":
                message = (
                    f"found {metric}, which needs to know the answers (set objective.train_on: assistant)"
                )
                yield Conflict("evaluate.metrics", message, reads=("objective.train_on",))

    def _rollout_conflicts(self) -> Iterator[Conflict]:
        won = self.evaluate.win_rate
        yield from self._code_conflicts("evaluate.win_rate.rewards", (won and won.rewards) or ())
        if not isinstance(self.objective, RolloutObjective):
            return
        yield from self._code_conflicts("objective.rewards", self.objective.rewards)
        if self.data.format == "text":
            message = (
                "found text, but a text has no prompt to complete (use another format, or the objective sft)"
            )
            yield Conflict("data.format", message, reads=("objective.name",))

    def _code_conflicts(self, key: str, rewards: Sequence[Reward]) -> Iterator[Conflict]:
        code = [one for one in rewards if one.name == "python"]
        if code and not self.run.allow_code:
            message = (
                f"found {code[0].file}, Python code that would run (read it, then set run.allow_code: true)"
            )
            yield Conflict(key, message, reads=("run.allow_code",))

    def _quantization_conflicts(self) -> Iterator[Conflict]:
        form, reads = self.model.quantize, ("adapter.method",)
        if isinstance(self.adapter, FullAdapter) and form not in ("auto", "none"):
            message = (
                f"found {form}, but full fine-tuning trains the weights themselves, and a step is far smaller than"
                " the distance between two such values (use none, or a method with an adapter)"
            )
            yield Conflict("model.quantize", message, reads)
        if isinstance(self.adapter, QloraAdapter) and form == "none":
            message = "found none, but qlora is LoRA on a quantized base (use nf4, or adapter.method: lora)"
            yield Conflict("model.quantize", message, reads)
        if isinstance(self.adapter, LoraAdapter):
            yield from self.adapter.loftq_conflicts(self.quantization(), self.export.merge_base)
        if self.quantization() == "none":
            for key in ("merge_base", "max_merge_kl"):
                if (value := getattr(self.export, key)) not in ("auto", None):
                    message = f"found {value}, but the base is not quantized (remove the key, or set model.quantize)"
                    yield Conflict(f"export.{key}", message, ("model.quantize", *reads))

    def train_on(self) -> str:
        """Return which tokens of a row are trained: of answers that are compared, always the answer."""
        objective = self.objective
        return objective.train_on if isinstance(objective, SftObjective | RolloutObjective) else "completion"

    def at(self, key: str) -> str:
        """Return `file:line:column: key` where the key was written, `key` alone where it is a default."""
        return f"{self._places[key]}: {key}" if key in self._places else key

    def export_formats(self) -> list[str]:
        """Return the formats to write, with the default for the method filled in."""
        if self.export.formats is not None:
            return list(self.export.formats)
        return ["merged"] if isinstance(self.adapter, FullAdapter) else ["peft"]

    def init_from(self) -> str | None:
        """Return the folder of the adapter that the run starts from, as it is written; None for a new adapter."""
        if isinstance(self.adapter, LoraAdapter | DoraAdapter | VeraAdapter | AdaLoraAdapter):
            return self.adapter.init_from
        return None

    def quantization(self) -> str:
        """Return how the base's linear layers are stored, with the default for the method filled in."""
        if self.model.quantize != "auto":
            return self.model.quantize
        return "nf4" if isinstance(self.adapter, QloraAdapter) else "none"

    def chosen_tokens(self) -> tuple[list[str], list[str]]:
        """Return the tokens whose rows are trained alone: those of the tokenizer, and new ones."""
        block = self.adapter
        return (block.train_tokens, block.add_tokens) if isinstance(block, LoraAdapter) else ([], [])

    def resolved(self) -> dict[str, Any]:
        """Return the recipe as plain YAML values with every default written out."""
        return self.model_dump(mode="json")
