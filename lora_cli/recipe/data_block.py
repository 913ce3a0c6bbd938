"""The `data` block: where rows come from, how they are read, and how they become tokens."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from lora_cli.recipe.section import Conflict, Fraction, PositiveInt, Section

FormatName = Literal[
    "auto",
    "text",
    "prompt_completion",
    "alpaca",
    "chat",
    "sharegpt",
    "preference",
    "sharegpt_preference",
    "labelled",
]

TEMPLATES = ("chatml", "llama3", "gemma", "mistral", "phi", "qwen", "alpaca", "vicuna")
"""Chat templates of ours, a file each in assets/templates."""
CHOICES = ("auto", "model", "plain")
"""Values of data.template that name no template of their own."""


def is_template_file(template: str) -> bool:
    """Say whether a value of data.template can only be meant as a path."""
    return (
        "/" in template or template.startswith(("~", ".")) or template.endswith((".jinja", ".jinja2", ".j2"))
    )


class Fields(Section):
    """Templates that turn any row into a prompt and its completion; `{name}` is replaced by the row's column."""

    prompt: str
    """What the model is given, e.g. `"{question}"`."""
    completion: str
    """What the model must answer, e.g. `"{answer}"`."""
    system: str | None = None
    """System message before the prompt. null: none."""


class DataSource(Section):
    """One of several sources of training rows."""

    path: str | list[str]
    """Rows of this source: a file, a folder, a pattern, a hub data set id, or a list of them, as in data.train."""
    weight: Annotated[float, Field(gt=0.0, le=1_000_000.0)] | None = None
    """Its share of an epoch, in proportion to the other weights; rows are repeated or left out to fit it. All sources
    have one, or none. null: every row once."""
    format: FormatName = "auto"
    """How to read a row of this source; see data.format."""
    fields: Fields | None = None
    """Column templates for this source; see data.fields."""
    split: str | None = None
    """Split of a hub data set. null: data.train_split."""
    max_rows: PositiveInt | None = None
    """Use only the first so many rows of this source. null: all."""

    def rules(self, name: str) -> Iterator[Conflict]:
        """Yield every broken rule of the source called `name`."""
        if self.fields is not None and self.format != "auto":
            message = (
                f"found {self.format}, but its fields already say how to read a row (remove one of them)"
            )
            yield Conflict(f"data.sources.{name}.format", message)


class Data(Section):
    """Where rows come from and how they become tokens."""

    train: str | list[str] | None = None
    """Training rows: a .jsonl, .json, .csv, .parquet or .txt file (text formats also as .gz or .zst), a folder of such
    files, a pattern such as `rows/*.jsonl`, a hub data set id (`owner/name`, or `owner/name:configuration`), or a list
    of these, one after the other. Required to train, unless there are sources."""
    sources: dict[str, DataSource] = Field(default={})
    """Several sources of training rows by a name of your own, each read in its own way, and mixed by weight. In place
    of train."""
    eval: str | list[str] | None = None
    """Held-out rows, same choices as train. null: those of eval_fraction or eval_rows, else no held-out evaluation."""
    eval_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Hold out about this part of the training rows. Each row's content decides, so that the choice stays the same when
    rows are added or their order changes, and equal rows stay together. null: none."""
    eval_rows: PositiveInt | None = None
    """Hold out so many of the training rows, by their content as eval_fraction does. null: none."""
    train_split: str = "train"
    """Split of a hub data set that is trained on, e.g. `train` or `train[:10%]`. Not used for files."""
    eval_split: str = "test"
    """Split of a hub data set that is held out. Not used for files."""
    revision: str | None = None
    """Branch, tag or commit of the hub data sets. null: the default branch. Not for files."""
    format: FormatName = "auto"
    """How to read a row. auto: decided from the first rows, and stated in the log."""
    fields: Fields | None = None
    """Column templates for rows of any other shape; with it, `format` stays `auto`."""
    template: Annotated[str, Field(min_length=1)] = "auto"
    """How a conversation becomes text. model: the tokenizer's chat template. plain: prompt, then answer, then the
    end token. auto: model where the tokenizer has a template, else plain. chatml, llama3, gemma, mistral, phi, qwen,
    alpaca, vicuna: one of ours in its place. A path such as `./my.jinja`: the template in that file. What is exported
    carries the template. Text rows are never templated, and a template that writes the date is given 26 July 2024."""
    max_length: Annotated[int, Field(ge=8, le=1_048_576)] = 1024
    """Longest row, in tokens."""
    overlong: Literal["drop", "truncate_right", "truncate_left", "split", "error"] = "drop"
    """What happens to longer rows. drop: left out. truncate_right, truncate_left: cut at that end. split: text rows are
    cut into pieces. error: stop and name the row. Rows and trained tokens that are lost are counted."""
    packing: Literal["auto"] | bool = "auto"
    """How rows are laid out in a forward pass of training or held-out loss. true: several in one sequence without
    padding, each with positions of its own and blind to the others; refused where a trial on the model shows otherwise.
    false: padded to the longest, rows of like length together. The loss and its gradient are the same; the draws of a
    dropout are not. auto: true where the model passes the trial, else false."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What happens to rows that cannot be used as they are. stop: nothing is trained; the first five are named. skip:
    they are left out and counted, up to max_bad_rows."""
    max_bad_rows: Fraction = 0.01
    """Part of the rows of a split that on_bad_row skip may leave out."""
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
        if self.sources and self.train is not None:
            yield Conflict("data.sources", "found beside data.train (use one of them)", reads=("data.train",))
        if self.sources and self.max_train_rows is not None:
            message = "found beside data.sources (write max_rows into each source)"
            yield Conflict("data.max_train_rows", message, reads=("data.sources",))
        for name, source in self.sources.items():
            yield from source.rules(name)
        weighted = [name for name, source in self.sources.items() if source.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            without = next(name for name in self.sources if name not in weighted)
            yield Conflict(
                "data.sources", f"{weighted[0]} has a weight and {without} has none (give all, or none)"
            )
        known = (*CHOICES, *TEMPLATES)
        if self.template not in known and not is_template_file(self.template):
            near = difflib.get_close_matches(self.template.lower(), known, n=3)
            advice = f"did you mean {' or '.join(near)}?" if near else f"one of {', '.join(known)}, or a path"
            yield Conflict("data.template", f"found {self.template[:60]!r}, which is no template ({advice})")
        for key in ("eval_fraction", "eval_rows"):
            other = "eval" if self.eval is not None else "eval_fraction" if key == "eval_rows" else None
            if getattr(self, key) is not None and other and getattr(self, other) is not None:
                yield Conflict(
                    f"data.{key}", f"found beside data.{other} (use one of them)", reads=(f"data.{other}",)
                )
        if self.on_bad_row == "stop" and self.max_bad_rows != 0.01:
            message = (
                f"found {self.max_bad_rows}, but the first bad row stops the run (set data.on_bad_row: skip)"
            )
            yield Conflict("data.max_bad_rows", message, reads=("data.on_bad_row",))

    def holds_out(self) -> bool:
        """Return whether there are held-out rows."""
        return any(value is not None for value in (self.eval, self.eval_fraction, self.eval_rows))

    def trains(self) -> bool:
        """Return whether there are training rows."""
        return self.train is not None or bool(self.sources)
