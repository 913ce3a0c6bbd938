"""What every adapter method must keep, over every method there is, on three kinds of linear layer, and on NF4 ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from small import make_model, make_rows
from toy import write_base, write_recipe
from transformers import PreTrainedModel

from lora_cli import adapters, pipeline
from lora_cli.adapters import Method, _peft, _portable
from lora_cli.models.adapted import AdaptedModel
from lora_cli.objectives.sft import Sft
from lora_cli.recipe import schema
from lora_cli.recipe.load import load_recipe
from lora_cli.runtime.optim import MasterAdamW
from lora_cli.types import Progress

SETTINGS: dict[str, schema.Section] = {
    "lora": schema.LoraAdapter(rank=4, alpha=8.0),
    "dora": schema.DoraAdapter(rank=4, alpha=8.0),
    "vera": schema.VeraAdapter(rank=16),
    "qlora": schema.QloraAdapter(rank=4, alpha=8.0),
    "full": schema.FullAdapter(),
    # Pruned, but never to nothing: a layer that loses all its triplets is back at its start, as it should be.
    "adalora": schema.AdaLoraAdapter(initial_rank=6, target_rank=5, alpha=48.0),
    "relora": schema.ReloraAdapter(rank=4, alpha=8.0, restart_every=2),
}
"""One block per method; a method without one fails `test_every_method_is_covered`."""

CONSTANT_START = {"full", "vera"}
"""Methods whose trained parameters start from constants or from the base, whatever the seed."""

WITH_LAYERS = [name for name in sorted(SETTINGS) if name != "full"]
STEPS = 3
BASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "nf4": {"quantize": "nf4"},
    "nf4-bf16": {"quantize": "nf4", "dtype": torch.bfloat16},
}
"""How the base is made; float32 in the exact tests also as what NF4 computes in."""
EXACT = ["fp32", "nf4"]
ALL = [
    (name, base) for name in sorted(SETTINGS) for base in BASES if name in WITH_LAYERS or "nf4" not in base
]
"""Every method on every base it can stand on: full fine-tuning has none in NF4, as the schema says."""


def injected(name: str, architecture: str, base: str = "fp32") -> tuple[PreTrainedModel, Method]:
    """Return a model with the method in it."""
    model = make_model(architecture, **BASES[base])
    method = adapters.build(SETTINGS[name], seed=3)
    method.plan(STEPS)
    method.inject(model)
    return model, method


def train(model: PreTrainedModel, method: Method, rate: float = 1e-2) -> None:
    """Train a few steps the way the loop does."""
    adapted, objective = AdaptedModel(model, method.layers), Sft(pad_id=0)
    optimizer = MasterAdamW(method.trainable(model))
    rows = list(enumerate(make_rows(8)))
    model.train()
    for step in range(STEPS):
        for batch in objective.micro_batches(adapted, rows, Progress(step, STEPS), tokens=128):
            loss, _ = objective.loss_sum(adapted, batch)
            loss.backward()
        penalty = method.penalty()
        if penalty is not None:
            penalty.backward()
        optimizer.step(rate * method.schedule_factor(step))
        method.after_step(optimizer, Progress(step, STEPS))
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits of fixed tokens."""
    return model(input_ids=torch.arange(1, 41).view(2, 20), use_cache=False).logits


def test_every_method_is_covered() -> None:
    """Every file in adapters/ is in this contract, and in the recipe's schema."""
    assert adapters.names() == sorted(SETTINGS)
    tags: Any = schema.Recipe.model_json_schema()["properties"]["adapter"]["discriminator"]["mapping"]
    assert sorted(tags) == adapters.names()


@pytest.mark.parametrize(("name", "base"), ALL)
def test_injection_changes_nothing(name: str, architecture: str, base: str) -> None:
    """An injected model's output equals the base's bit for bit."""
    before = logits(make_model(architecture, **BASES[base]))
    model, _ = injected(name, architecture, base)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", WITH_LAYERS)
def test_training_leaves_the_base_alone(name: str, architecture: str, base: str) -> None:
    """After training every base weight is bit-equal, only the method's parameters have moved, and all of them could."""
    original = make_model(architecture, **BASES[base])
    before = {key: value.clone() for key, value in original.state_dict().items()}
    assert any(key.endswith("packed") for key in before) is base.startswith("nf4")
    model, method = injected(name, architecture, base)
    start = {key: value.detach().clone() for key, value in method.trainable(model).items()}
    train(model, method)
    after = {key.replace(".base.", "."): value for key, value in model.state_dict().items()}
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(not torch.equal(value, start[key]) for key, value in method.trainable(model).items())
    assert all(parameter.dtype == torch.float32 for parameter in method.trainable(model).values())
    trainable = {id(parameter) for parameter in method.trainable(model).values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trainable


@pytest.mark.parametrize("base", EXACT)
@pytest.mark.parametrize("name", WITH_LAYERS)
def test_merged_equals_forward(name: str, architecture: str, base: str) -> None:
    """The merged weights compute what the adapted layers compute, to 1e-5 in fp32, with and without a bias."""
    model, method = injected(name, architecture, base)
    train(model, method)
    live = logits(model)
    before = logits(make_model(architecture, **BASES[base]))
    assert float((live - before).abs().max()) > 0.01  # the update is not nothing
    for layer in method.layers.values():
        layer.merge()
    assert float((logits(model) - live).abs().max()) <= 1e-5


@pytest.mark.parametrize("base", ["bf16", "nf4-bf16"])
@pytest.mark.parametrize("name", WITH_LAYERS)
def test_merging_rounds_once(name: str, architecture: str, base: str) -> None:
    """In bfloat16 the merged weight is the float32 sum of base and update, rounded once."""
    model, method = injected(name, architecture, base)
    train(model, method)
    for layer in method.layers.values():
        expected = layer.merged_weight().to(torch.bfloat16)
        before = layer.base_weight().clone()
        layer.merge()
        stored = layer.base.weight.T if architecture == "gpt2" else layer.base.weight
        assert torch.equal(stored, expected)
        assert not torch.equal(stored, before)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", WITH_LAYERS)
def test_unmerge_restores_every_bit(name: str, architecture: str, base: str) -> None:
    """Merging and unmerging leaves the model bit-equal."""
    model, method = injected(name, architecture, base)
    train(model, method)
    live = logits(model)
    for layer in method.layers.values():
        layer.merge()
    assert not torch.equal(logits(model), live)
    for layer in method.layers.values():
        layer.unmerge()
    assert torch.equal(logits(model), live)


@pytest.mark.parametrize(("name", "base"), [(name, base) for name, base in ALL if base in EXACT])
def test_reference_is_the_base(name: str, architecture: str, base: str) -> None:
    """Inside `reference()` a trained model computes what the base did, bit for bit, and outside what it learned."""
    before = logits(make_model(architecture, **BASES[base]))
    model, method = injected(name, architecture, base)
    copies = {} if method.layers else {key: p.detach().clone() for key, p in method.trainable(model).items()}
    train(model, method)
    adapted, live = AdaptedModel(model, method.layers, copies), logits(model)
    with adapted.reference():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), live)
    assert not torch.equal(live, before)


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_gradients_do_not_depend_on_the_split(name: str) -> None:
    """Gradients of 8 x 1, 4 x 2 and 1 x 8 micro-batches of unequal lengths agree to 1e-6 relative in fp32."""
    rows = list(enumerate(make_rows(8, seed=5)))
    gradients = []
    for size in (1, 2, 8):
        model, method = injected(name, "llama")
        with torch.no_grad():  # B = 0 would leave A without a gradient
            for key, parameter in method.trainable(model).items():
                if method.layers:
                    generator = torch.Generator().manual_seed(len(key))
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        adapted, objective = AdaptedModel(model, method.layers), Sft(pad_id=0)
        batches = [
            batch
            for first in range(0, 8, size)
            for batch in objective.micro_batches(
                adapted, rows[first : first + size], Progress(0, 1), tokens=10_000
            )
        ]
        assert len(batches) == 8 // size
        units = sum(map(objective.units, batches))
        for batch in batches:
            (objective.loss_sum(adapted, batch)[0] / units).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in method.trainable(model).values()]))  # type: ignore[union-attr]
    for other in gradients[1:]:
        assert float((other - gradients[0]).norm() / gradients[0].norm()) <= 1e-6


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_initialisation_is_a_function_of_the_seed(name: str) -> None:
    """The same seed gives the same parameters bit for bit; another seed gives others where the method draws any."""
    first, second = (injected(name, "llama") for _ in range(2))
    for key, value in first[1].trainable(first[0]).items():
        assert torch.equal(value, second[1].trainable(second[0])[key])
    if name not in CONSTANT_START:
        model = make_model("llama")
        method = adapters.build(SETTINGS[name], seed=4)
        method.inject(model)
        other = method.trainable(model)
        assert any(not torch.equal(value, other[key]) for key, value in first[1].trainable(first[0]).items())


@pytest.mark.parametrize("base", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("name", WITH_LAYERS)
def test_trained_on_any_base_it_opens_on_the_full_one(
    tmp_path: Path, name: str, architecture: str, base: str
) -> None:
    """What was trained on any base has on the float32 one the file's keys in PEFT, and our logits to 1e-5."""
    model, method = injected(name, architecture, base)
    train(model, method)
    written, _ = method.as_peft()
    _peft.write(tmp_path, written, base_name="base", revision=None)
    theirs = peft.PeftModel.from_pretrained(make_model(architecture), tmp_path).eval()
    assert set(peft.get_peft_model_state_dict(theirs)) == set(load_file(tmp_path / _peft.TENSOR_FILE))
    ours = make_model(architecture)
    adapters.load(tmp_path, ours)
    assert float((logits(ours) - logits(theirs)).abs().max()) <= 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("name", WITH_LAYERS)
def test_its_portable_adapter_is_as_near_as_it_says(tmp_path: Path, name: str, architecture: str) -> None:
    """As plain LoRA each layer misses what is told of its update, nothing where it has factors; PEFT reads it so."""
    model, method = injected(name, architecture)
    train(model, method)
    written, errors = _portable.plain_lora(method)
    _peft.write(tmp_path, written, base_name="base", revision=None)
    tensors = load_file(tmp_path / _peft.TENSOR_FILE)
    for path, layer in method.layers.items():
        a, b = (tensors[f"{_peft.PREFIX}{path}.lora_{which}.weight"] for which in "AB")
        assert len(a) == b.shape[1] == written.rank
        update = (layer.merged_weight() - layer.base_weight().float()).detach()
        assert errors[path] == pytest.approx(
            float((update - b @ a).norm() / update.norm()), rel=1e-3, abs=1e-5
        )
        assert layer.plain_factors() is None or errors[path] <= 1e-5
    theirs = peft.PeftModel.from_pretrained(make_model(architecture), tmp_path).eval()
    if max(errors.values()) <= 1e-5:
        assert float((logits(theirs) - logits(model)).abs().max()) <= 1e-5  # type: ignore[arg-type]
    ours = make_model(architecture)
    adapters.load(tmp_path, ours)
    assert float((logits(theirs) - logits(ours)).abs().max()) <= 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("name", WITH_LAYERS)
def test_on_nf4_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Continued from step 2 of 6 on an NF4 base, a run ends in the same checkpoint, bit for bit."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    path = write_recipe(
        tmp_path / "job", write_base(tmp_path / "base"), adapter=SETTINGS[name].model_dump(mode="json"),
        model__quantize="nf4", train__max_steps=6, train__save_every=2, train__keep_checkpoints=9,
    )  # fmt: skip
    recipe, run = load_recipe(path), tmp_path / "job" / "run"
    pipeline.train(recipe)
    shutil.copytree(run, tmp_path / "straight")
    for entry in run.iterdir():
        if entry.name in ("checkpoints", "recipe.yaml", "metrics.jsonl"):
            continue
        entry.rename(tmp_path / f"aside-{entry.name}")
    for step in (4, 6):
        (run / "checkpoints" / f"step-{step}").rename(tmp_path / f"aside-{step}")
    pipeline.train(recipe, resume=True)
    ends = [folder / "checkpoints" / "step-6" for folder in (tmp_path / "straight", run)]
    files = [file.name for file in ends[0].glob("*.safetensors")]
    assert files
    for file in files:
        straight, resumed = (load_file(folder / file) for folder in ends)
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(resumed[key], value) for key, value in straight.items())
