"""Every key a user may write, with its type, default, bounds and documentation under the field.

The JSON Schema for editors, `lora recipe explain` and the did-you-mean of error messages all come from these models.
A key exists only if some code reads it. Rules that join keys live in the `conflicts` of their section, or of `Recipe`
where they join two sections. They yield instead of raising, so that one pass reports all of them.

An adapter method or objective is added as one block here, joined to the union `Adapter` or `Objective`. LoRA's, which
has the most keys, stands in `lora_block.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr

from lora_cli.recipe.lora_block import LoraAdapter as LoraAdapter
from lora_cli.recipe.section import Conflict as Conflict
from lora_cli.recipe.section import Section as Section
from lora_cli.recipe.section import regex_fault as _regex_fault

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1, le=2**31 - 1)]
NonNegativeInt = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Model(Section):
    """The base model."""

    base: str = "tiny"
    """Local folder, hub id, or `tiny` (the bundled 4 M parameter model for trying things out)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id. null: the default branch. Not for local folders."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the base weights and of the computation. Trained weights are kept in float32 either way."""


class Fields(Section):
    """Templates that turn any row into a prompt and its completion; `{name}` is replaced by the row's column."""

    prompt: str
    """What the model is given, e.g. `"{question}"`."""
    completion: str
    """What the model must answer, e.g. `"{answer}"`."""
    system: str | None = None
    """System message before the prompt. null: none."""


class Data(Section):
    """Where rows come from and how they become tokens."""

    train: str | None = None
    """Training rows: a .jsonl, .json, .csv, .parquet or .txt file, or a hub data set id. Required to train."""
    eval: str | None = None
    """Held-out rows, same choices. null: no held-out evaluation."""
    train_split: str = "train"
    """Split of a hub data set that is trained on. Not used for files."""
    eval_split: str = "test"
    """Split of a hub data set that is held out. Not used for files."""
    format: Literal["auto", "text", "prompt_completion", "alpaca", "chat"] = "auto"
    """How to read a row. auto: decided from the first rows, and stated in the log."""
    fields: Fields | None = None
    """Column templates for rows of any other shape; with it, `format` stays `auto`."""
    template: Literal["auto", "model", "plain"] = "auto"
    """How a conversation becomes text. model: the tokenizer's chat template. plain: prompt, then answer, then the
    end token. auto: model where the tokenizer has a template, else plain. Text rows are never templated."""
    max_length: Annotated[int, Field(ge=8, le=1_048_576)] = 1024
    """Longest row, in tokens."""
    overlong: Literal["drop", "truncate", "error"] = "drop"
    """What happens to longer rows. drop: left out and counted. truncate: cut at the right, the lost trained tokens
    counted. error: stop and name the row."""
    max_train_rows: PositiveInt | None = None
    """Use only the first so many training rows. null: all."""
    max_eval_rows: PositiveInt | None = None
    """Use only the first so many held-out rows. null: all."""

    def conflicts(self) -> Iterator[Conflict]:
        """Yield every broken rule that joins keys of this block."""
        if self.fields is not None and self.format != "auto":
            message = (
                f"found {self.format}, but data.fields already says how to read a row (remove one of them)"
            )
            yield Conflict("data.format", message, reads=("data.fields",))


class FullAdapter(Section):
    """Full fine-tuning: no adapter, the model's own weights are trained."""

    method: Literal["full"] = "full"
    """Which method adapts the model."""
    parameters: str = "all"
    """`all`, or a regular expression that matches the whole name of each parameter to train."""

    def conflicts(self) -> Iterator[Conflict]:
        """Yield an expression that does not compile."""
        if fault := _regex_fault(self.parameters):
            yield Conflict("adapter.parameters", fault)


Adapter = Annotated[LoraAdapter | FullAdapter, Field(discriminator="method")]


class SftObjective(Section):
    """Supervised fine-tuning: cross-entropy of the trained tokens."""

    name: Literal["sft"] = "sft"
    """Which loss is minimised."""
    train_on: Literal["assistant", "all"] = "assistant"
    """Which tokens are trained. assistant: every assistant turn and its terminator. all: every token of the row."""


Objective = SftObjective


class Train(Section):
    """The training loop."""

    epochs: Annotated[float, Field(gt=0, le=10_000)] = 3.0
    """Passes over the training rows; 0.5 is half a pass. Not used when `max_steps` is given."""
    max_steps: PositiveInt | None = None
    """Optimizer steps in all. null: as many as `epochs` needs."""
    batch_size: PositiveInt = 32
    """Sequences per optimizer step, over all processes and micro-batches."""
    micro_batch_tokens: Literal["auto"] | PositiveInt = "auto"
    """Padded tokens per forward pass; a step is split into as many passes as needed, with the same result.
    auto: 4096 on a CPU, 16384 on a GPU."""
    learning_rate: Annotated[float, Field(gt=0, le=10.0)] = 2.0e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine", "wsd", "polynomial", "inverse_sqrt"] = "cosine"
    """How the learning rate falls after the warm-up. wsd: constant, then linear decay over the last `decay` part."""
    warmup: Fraction | NonNegativeInt = 0.03
    """Linear warm-up: steps (an integer) or a fraction of all steps (a decimal number up to 1.0)."""
    floor: Fraction = 0.0
    """Lowest learning rate of the schedule, as a fraction of the peak. Not used by constant."""
    decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Part of all steps over which wsd decays."""
    power: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0
    """Exponent of the polynomial schedule."""
    weight_decay: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    """Decoupled weight decay of AdamW."""
    betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]] = (
        0.9,
        0.999,
    )
    """AdamW's decay rates of the first and second moment."""
    eps: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0e-8
    """AdamW's term against division by zero."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] | None = 1.0
    """Gradients are scaled down to this global norm. null: no clipping."""
    log_every: PositiveInt = 10
    """Steps between lines of metrics.jsonl and of the plain log."""
    eval_every: PositiveInt | None = None
    """Steps between held-out losses while training. null: only at the end."""
    save_every: PositiveInt | None = None
    """Steps between checkpoints. null: one at the end of training, and one when stopped by a signal."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints kept; the one with the best held-out loss is kept besides."""
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


class Evaluate(Section):
    """Scores of the base and of the tuned model on the held-out rows."""

    metrics: list[Literal["loss", "exact_match"]] = Field(default=["loss"])
    """loss: loss, perplexity and token accuracy. exact_match: generate each row's last answer and compare."""
    max_generated_rows: PositiveInt | None = None
    """Generate for only the first so many held-out rows. null: all."""
    max_new_tokens: Literal["auto"] | PositiveInt = "auto"
    """Longest generated answer, in tokens. auto: the longest reference answer, since a longer one cannot match."""
    batch_tokens: Literal["auto"] | PositiveInt = "auto"
    """Padded tokens per forward pass (prompt and answer). auto: 8192 on a CPU, 65536 on a GPU."""


class Export(Section):
    """What is written at the end."""

    formats: list[Literal["peft", "merged"]] | None = None
    """peft: `adapter/`, a PEFT adapter that stands alone. merged: `merged/`, a plain model with the update in its
    weights. null: peft, or merged for full fine-tuning."""
    max_shard_bytes: Annotated[int, Field(ge=1_000_000)] = 5_000_000_000
    """Largest weight file of a merged model, in bytes."""


class Run(Section):
    """Where the run is kept, and how it is computed."""

    output: str = "runs/latest"
    """Folder of the run."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Adapter initialisation, row order and dropout are functions of it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one, else cpu."""


class Recipe(Section):
    """One fine-tuning run, from data to exported model."""

    model: Model = Model()
    data: Data = Data()
    adapter: Adapter = LoraAdapter()
    objective: Objective = SftObjective()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    run: Run = Run()

    _places: dict[str, str] = PrivateAttr(default_factory=dict)
    """Where each key was written, `file:line:column` or `override key=value`; see `at`."""

    def conflicts(self) -> Iterator[Conflict]:
        """Yield every broken rule that joins keys of two blocks."""
        if isinstance(self.adapter, FullAdapter) and "peft" in self.export_formats():
            message = "found peft, but full fine-tuning has no adapter to write (use merged)"
            yield Conflict("export.formats", message, reads=("adapter.method",))
        if self.data.eval is None and self.train.eval_every is not None:
            message = f"found {self.train.eval_every}, but there are no held-out rows (set data.eval)"
            yield Conflict("train.eval_every", message, reads=("data.eval",))

    def at(self, key: str) -> str:
        """Return `file:line:column: key` where the key was written, `key` alone where it is a default."""
        return f"{self._places[key]}: {key}" if key in self._places else key

    def export_formats(self) -> list[str]:
        """Return the formats to write, with the default for the method filled in."""
        if self.export.formats is not None:
            return list(self.export.formats)
        return ["merged"] if isinstance(self.adapter, FullAdapter) else ["peft"]

    def resolved(self) -> dict[str, Any]:
        """Return the recipe as plain YAML values with every default written out."""
        return self.model_dump(mode="json")
