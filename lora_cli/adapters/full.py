"""Full fine-tuning: the model's own weights are trained, all or those a pattern names; there is no adapter.

bfloat16 weights are updated through float32 masters, or rounded stochastically (`runtime/optim.py`), so that small
updates are not rounded away.
"""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

from lora_cli.adapters._base import AdapterLinear, Method
from lora_cli.errors import InputError


class Full(Method):
    """Train `parameters`: `all`, or those whose whole name the regular expression matches."""

    def __init__(self, *, parameters: str = "all", masters: str = "float32", seed: int = 0) -> None:
        super().__init__()
        del seed
        self.parameters, self.keep_masters = parameters, masters == "float32"

    def inject(self, model: PreTrainedModel) -> dict[str, AdapterLinear]:
        """Choose the trained parameters; no layer is wrapped.

        Raises:
            InputError: the pattern is not valid or matches no parameter.
        """
        try:
            pattern = re.compile(".*" if self.parameters == "all" else self.parameters)
        except re.error as error:
            raise InputError(
                f"adapter.parameters: {self.parameters!r} is not a regular expression ({error})"
            ) from error
        names = []
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(pattern.fullmatch(name) is not None)
            names.append(name)
        if not self.trainable(model):
            raise InputError(
                f"adapter.parameters: {self.parameters!r} matches no parameter (names look like {names[-1]})"
            )
        return self.layers

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the chosen parameters by name; tied weights appear once."""
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


METHOD = Full
