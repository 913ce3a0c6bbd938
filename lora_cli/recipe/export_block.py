"""The `export` block of the recipe, and what each format cannot hold of what the adapter block asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field

from lora_cli.recipe.adapter_blocks import Adapter, FullAdapter
from lora_cli.recipe.lora_block import LoraAdapter
from lora_cli.recipe.section import Conflict, Fraction, Section


class Export(Section):
    """What is written at the end."""

    formats: Annotated[list[Literal["peft", "portable", "merged"]], Field(min_length=1)] | None = None
    """peft: `adapter/`, a PEFT adapter that stands alone. portable: `portable/`, the update of any method as a plain
    LoRA of one rank, for readers of LoRA alone such as vLLM and llama.cpp. merged: `merged/`, a plain model with the
    update in its weights. null: peft, or merged for full fine-tuning."""
    portable_rank: Annotated[int, Field(ge=1, le=512)] | None = None
    """Largest rank of the portable adapter; less than an update's own loses something, and the error is printed. null:
    the largest rank of any layer, with which nothing but rounding is lost; for a method that changes whole rows of the
    base's weight, as DoRA does, twice its rank. 512 is the most that vLLM reads; its default is 16."""
    max_portable_error: Fraction | None = None
    """Refuse a portable adapter that misses more than this part of any layer's update (relative error in the Frobenius
    norm). null: it is only stated."""
    max_shard_bytes: Annotated[int, Field(ge=1_000_000)] = 5_000_000_000
    """Largest weight file of a merged model, in bytes."""
    merge_base: Literal["auto", "full", "dequantized"] = "auto"
    """What the update of a quantized base is merged into. full: the base as it is on disk. dequantized: the weights it
    was trained on. auto: both are measured against the live model on sample rows, and the nearer is taken."""
    max_merge_kl: Annotated[float, Field(ge=0.0)] | None = None
    """Refuse a merged model of a quantized base whose mean KL divergence from the live model on the sample rows, in
    nats a token, is above this. null: it is only stated."""

    def conflicts(self) -> Iterator[Conflict]:
        """Yield settings of a portable adapter that is not written."""
        if "portable" in (self.formats or ()):
            return
        for key in ("portable_rank", "max_portable_error"):
            if (value := getattr(self, key)) is not None:
                message = (
                    f"found {value}, but no portable adapter is written (add portable to export.formats)"
                )
                yield Conflict(f"export.{key}", message, reads=("export.formats",))


def format_conflicts(formats: Sequence[str], adapter: Adapter) -> Iterator[Conflict]:
    """Yield the formats that cannot hold what `adapter` trains."""
    if isinstance(adapter, FullAdapter):
        for form in ("peft", "portable"):
            if form in formats:
                message = f"found {form}, but full fine-tuning has no adapter to write (use merged)"
                yield Conflict("export.formats", message, reads=("adapter.method",))
    elif isinstance(adapter, LoraAdapter) and "portable" in formats:
        if adapter.bias != "none":
            message = (
                f"found portable, which holds no biases, but adapter.bias is {adapter.bias} (use merged)"
            )
            yield Conflict("export.formats", message, reads=("adapter.bias",))
        if adapter.train_also:
            message = (
                f"found portable, which holds adapters alone, but adapter.train_also trains"
                f" {', '.join(adapter.train_also)} whole (use merged)"
            )
            yield Conflict("export.formats", message, reads=("adapter.train_also",))
        for key in ("train_tokens", "add_tokens"):
            if tokens := getattr(adapter, key):
                message = (
                    f"found portable, which holds no single rows, but adapter.{key} trains {tokens[0]!r}"
                )
                yield Conflict("export.formats", f"{message} (use merged)", reads=(f"adapter.{key}",))
