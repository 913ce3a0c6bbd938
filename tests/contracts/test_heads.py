"""For every method the losses and gradients without all logits are those of all logits, trained heads included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import make_model, make_rows
from test_adapters import BASES, SETTINGS
from torch import Tensor, nn
from toy import write_base, write_recipe

from lora_cli import adapters, pipeline, without_training
from lora_cli.models import linear_cross_entropy
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.linear_cross_entropy import is_frozen_linear
from lora_cli.models.output_head import OutputHead, find_head
from lora_cli.models.packing import keep_apart
from lora_cli.objectives.sft import Sft
from lora_cli.recipe import schema
from lora_cli.recipe.load import load_recipe
from lora_cli.types import Progress

HEADS: dict[str, schema.Section] = {
    "lora on the head": schema.LoraAdapter(rank=4, alpha=8.0, targets=["lm_head", "q_proj"]),
    "pissa on the head": schema.LoraAdapter(rank=4, init="pissa", targets=["lm_head", "q_proj"]),
    "dora on the head": schema.DoraAdapter(rank=4, alpha=8.0, targets=["lm_head", "q_proj"]),
    "vera on the head": schema.VeraAdapter(rank=16, targets=["lm_head", "q_proj"]),
    "adalora on the head": schema.AdaLoraAdapter(
        initial_rank=6, target_rank=5, targets=["lm_head", "q_proj"]
    ),
    "relora on the head": schema.ReloraAdapter(
        rank=4, alpha=8.0, restart_every=2, targets=["lm_head", "q_proj"]
    ),
    "whole head": schema.LoraAdapter(rank=4, targets=["q_proj"], train_also=["lm_head"]),
    "norm and embedding": schema.LoraAdapter(rank=4, targets=["q_proj"], train_also=["norm", "embed_tokens"]),
    "rows": schema.LoraAdapter(rank=4, targets=["q_proj"], train_tokens=["7", "90"]),
    "full, the head alone": schema.FullAdapter(parameters=".*(lm_head|embed_tokens).*"),
    "full, without the head": schema.FullAdapter(parameters=".*layers.*"),
}
"""What is trained in or around the output head, of a llama whose head is tied and a qwen2 whose head is not."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make chunks so small that a batch has several."""
    for name, value in (("ROWS", 20), ("TRAINED_ROWS", 20), ("_BLOCK_BYTES", 4000)):
        monkeypatch.setattr(linear_cross_entropy, name, {"cpu": value, "cuda": value})


def found(
    settings: schema.Section, architecture: str, *, own: bool, packs: bool = False, base: str = "fp32"
) -> tuple[float, dict[str, Tensor], OutputHead | None]:
    """Return loss and gradients of eight rows, by the model's own logits or by its head, with no update at zero."""
    model = make_model(architecture, **BASES[base])
    method = adapters.build(settings, seed=3)  # type: ignore[arg-type]
    method.learn_tokens(lambda names: [int(name) for name in names])
    method.plan(3)
    method.inject(model)
    for key, parameter in method.trainable(model).items() if method.layers else ():
        generator = torch.Generator().manual_seed(len(key))
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    packs = packs and keep_apart(model) is None
    head = find_head(model, packs=packs)
    assert isinstance(head, OutputHead)
    adapted = AdaptedModel(model, method.placed(), packs=packs, head=None if own else head)
    objective, total = Sft(pad_id=0), 0.0
    model.train()
    rows = list(enumerate(make_rows(8, seed=5)))
    for batch in objective.micro_batches(adapted, rows, Progress(0, 1), tokens=90):
        loss, metrics = objective.loss_sum(adapted, batch)
        loss.backward()
        total += float(loss.detach())
        assert metrics == {}
    gradients = {name: parameter.grad for name, parameter in method.trainable(model).items()}
    assert all(gradient is not None for gradient in gradients.values())
    return total, gradients, adapted.head  # type: ignore[return-value]


def check(settings: schema.Section, architecture: str, allowed: float, **options: Any) -> nn.Module:
    """Compare loss and every gradient, and return the head."""
    loss, gradients, _ = found(settings, architecture, own=True, **options)
    other, others, head = found(settings, architecture, own=False, **options)
    assert other == pytest.approx(loss, rel=allowed)
    assert gradients.keys() == others.keys()
    differences = {name: others[name] - gradient for name, gradient in gradients.items()}
    flat = [torch.cat([one.flatten() for one in part.values()]) for part in (differences, gradients)]
    assert float(flat[0].norm()) <= allowed * float(flat[1].norm())
    for name, difference in differences.items():  # a small one may be a difference of large terms
        assert float(difference.norm()) <= 5 * allowed * float(gradients[name].norm()), name
    assert head is not None
    return head.head


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_every_method_has_the_same_gradients(name: str, architecture: str, packs: bool) -> None:
    """Padded and packed, loss and gradients equal those of all logits, to 1e-6 in float32."""
    head = check(SETTINGS[name], architecture, 1e-6, packs=packs)
    assert is_frozen_linear(head) is (name != "full")


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_trains_has_the_same_gradients(name: str, architecture: str) -> None:
    """With an adapter on the head, the head trained whole, or rows of it, all gradients are those of all logits."""
    head = check(HEADS[name], architecture, 1e-6)
    if name not in ("norm and embedding", "full, without the head"):
        assert not is_frozen_linear(head)


@pytest.mark.parametrize("base", ["bf16", "nf4-bf16"])
@pytest.mark.parametrize("name", ["lora", "dora", "vera"])
def test_bfloat16_bases_have_the_same_gradients(name: str, base: str) -> None:
    """On bfloat16 and NF4 bases loss and gradients agree to the rounding of bfloat16 logits and their gradients."""
    check(SETTINGS[name], "qwen2", 1e-2, base=base)


@pytest.mark.parametrize("name", ["lora", "full"])
def test_evaluation_counts_the_same_tokens(name: str, architecture: str) -> None:
    """Loss and tokens predicted right are those of all logits, for the model and, adapters off, for its reference."""
    model = make_model(architecture)
    method = adapters.build(SETTINGS[name], seed=3)  # type: ignore[arg-type]
    method.inject(model)
    with torch.no_grad():
        for parameter in method.trainable(model).values():
            parameter.add_(torch.full_like(parameter, 0.02))
    head = find_head(model, packs=False)
    assert isinstance(head, OutputHead)
    own, ours = AdaptedModel(model, method.placed()), AdaptedModel(model, method.placed(), head=head)
    rows, objective = list(enumerate(make_rows(12, seed=6))), Sft(pad_id=0)
    for reference in (False, True):
        for batch in objective.micro_batches(own, rows, Progress(0, 1), tokens=90):
            results = []
            for adapted in (own, ours):
                with adapted.evaluating():
                    if reference:
                        with adapted.reference():
                            results.append(objective.loss_sum(adapted, batch))
                    else:
                        results.append(objective.loss_sum(adapted, batch))
            (loss, counts), (other, others) = results
            assert float(other) == pytest.approx(float(loss), rel=1e-6)
            assert others == counts


def test_no_command_makes_all_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run trains and scores, and `lora-eval` scores it again, without the model's own logits."""

    def refuse(*_: Any) -> None:
        raise AssertionError("all logits were made")

    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(AdaptedModel, "trained_logits", refuse)
    recipe = load_recipe(write_recipe(tmp_path, write_base(tmp_path / "base"), train__max_steps=2))
    scores = pipeline.train(recipe)["eval"]
    again = without_training.evaluate(tmp_path / "run", recipe)
    assert again["tuned"]["loss"] == pytest.approx(scores["tuned"]["loss"], rel=1e-6)
