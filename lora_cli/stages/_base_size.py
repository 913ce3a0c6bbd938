"""How large a base is, counted before a method adds to it, and what is told of it and of what is trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedModel

from lora_cli.adapters import Method
from lora_cli.adapters._targets import expert_tensors
from lora_cli.models.load import DTYPES
from lora_cli.models.nf4 import Quantization, QuantizedLinear, quantized_layers

_NAMES_OF_EXPERTS = frozenset(("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"))
"""Layers of experts as they were called before a mixture held them in 3-D tensors; dense layers still are."""


@dataclass(frozen=True)
class BaseSize:
    """Parameters of a base; those of quantized layers are counted as the weights that they stand for."""

    total: int
    experts: int
    """Those in 3-D tensors that hold several experts."""
    in_quantized: int
    quantized: dict[str, QuantizedLinear]
    """The quantized layers by path."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> BaseSize:
        """Count a model in which no method has been placed yet."""
        quantized = quantized_layers(model)
        in_quantized = sum(layer.in_features * layer.out_features for layer in quantized.values())
        return cls(
            total=in_quantized + sum(parameter.numel() for parameter in model.parameters()),
            experts=sum(parameter.numel() for parameter in expert_tensors(model).values()),
            in_quantized=in_quantized,
            quantized=quantized,
        )

    def lines(
        self,
        model: PreTrainedModel,
        method: Method,
        name: str,
        method_name: str,
        dtype: str,
        quantization: Quantization | None,
    ) -> Iterator[str]:
        """Yield what is told once the method `method_name` has been placed in `model`, the base called `name`."""
        if quantization is not None:
            stored = sum(layer.weight_bytes() for layer in self.quantized.values())
            yield (
                f"base: {len(self.quantized)} linear layers in {quantization.form}, {stored / 1e6:,.1f} MB for what"
                f" takes {self.in_quantized * DTYPES[dtype].itemsize / 1e6:,.1f} MB in {dtype}"
            )
        trained = sum(parameter.numel() for parameter in method.trainable(model).values())
        layers = f" in {len(method.layers)} layers" if method.layers else ""
        yield (
            f"model: {name}, {self.total:,} parameters in {dtype} on {model.device.type};"
            f" {method_name} trains {trained:,} ({trained / self.total:.2%}){layers}"
        )
        if method.layers and self.experts:
            yield from self._of_experts(method)

    def _of_experts(self, method: Method) -> Iterator[str]:
        """Yield that experts get no adapter, and where PEFT would take adapted layers for theirs."""
        yield f"model: {self.experts:,} of its parameters are experts held in 3-D tensors; they get no adapter"
        alike = sorted({path.rpartition(".")[2] for path in method.layers} & _NAMES_OF_EXPERTS)
        if alike and method.peft_type not in ("ADALORA", "VERA"):
            yield (
                f"model: on some mixtures PEFT 0.21 takes {', '.join(alike)} for names of the experts, and opens the"
                " adapter without these layers (export merged besides, or choose targets: attention)"
            )
