"""No gradient flows where nothing is trained, and the losses of a step are read once."""

from __future__ import annotations

import pytest
import torch
from small import make_model, make_rows
from test_adapters import SETTINGS
from torch import Tensor

from lora_cli import adapters
from lora_cli.models.adapted import AdaptedModel
from lora_cli.objectives.sft import Sft
from lora_cli.runtime.dist import Runtime
from lora_cli.runtime.optim import MasterAdamW
from lora_cli.stages._activations import Activations
from lora_cli.stages._micro_batches import MicroBatches, Passes
from lora_cli.types import Progress


def passes_of(name: str, tokens: int) -> tuple[Passes, list[bool], list[int]]:
    """Return a step's passes of eight rows, whether each embedding output had a gradient, and each read's values."""
    model = make_model("llama")
    method = adapters.build(SETTINGS[name], seed=3)
    method.plan(3)
    method.inject(model)
    adapted, flows, reads = AdaptedModel(model, method.layers), [], []
    model.get_input_embeddings().register_forward_hook(lambda *call: flows.append(call[2].requires_grad))
    optimizer = MasterAdamW(method.trainable(model))
    objective = Sft(pad_id=0)
    keep = Activations("keep", adapted, objective, 1, print)
    step = MicroBatches(
        adapted, method, objective, [], optimizer, keep, tokens, 0, Runtime(torch.device("cpu")), print
    )  # type: ignore[arg-type]
    rows = list(enumerate(make_rows(8, seed=5)))
    batches = step.split(rows, Progress(0, 1))
    whole, one = Tensor.tolist, Tensor.__float__

    def read(self: Tensor, how: object) -> object:
        if self.requires_grad or self.is_floating_point():
            reads.append(self.numel())
        return how(self)  # type: ignore[operator]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "tolist", lambda self: read(self, whole))
        patch.setattr(Tensor, "__float__", lambda self: read(self, one))
        patch.setattr(Tensor, "item", lambda self: read(self, whole))
        passes = step.add_up(rows, batches, Progress(0, 1), 100.0)
    return passes, flows, reads


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_nothing_flows_into_a_frozen_embedding(name: str) -> None:
    """The output of the embedding has a gradient only where the embedding itself is trained."""
    _, flows, _ = passes_of(name, 10_000)
    assert flows == [name == "full"]


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_losses_are_read_once_a_step(name: str) -> None:
    """However many passes a step has, its losses come from the device together, after the last."""
    passes, flows, reads = passes_of(name, 1)
    assert len(flows) == len(passes.batches) == 8
    assert reads == [8]
