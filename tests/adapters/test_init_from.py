"""A start from an adapter that PEFT wrote: its values, its layout, and the steps that follow, against PEFT's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adalora_runs import STEPS, logits, pefts, train, train_pefts
from safetensors.torch import load_file, save_file
from small import make_model
from test_lora_training import adamw, follow
from transformers import PreTrainedModel

from lora_cli import adapters
from lora_cli.adapters import Method, _peft
from lora_cli.adapters.adalora import AdaLora
from lora_cli.errors import InputError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.recipe.schema import (
    AdaLoraAdapter,
    DoraAdapter,
    LoraAdapter,
    QloraAdapter,
    Section,
    VeraAdapter,
)

TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj", "up_proj"],
    "gpt2": ["c_attn", "c_fc"],
}
CASES: dict[str, tuple[Section, dict[str, Any]]] = {
    "lora": (LoraAdapter(init_from="x"), {}),
    "lora, rslora, patterns": (
        LoraAdapter(init_from="x"),
        {
            "use_rslora": True,
            "rank_pattern": {r"1\..*(q_proj|c_attn)": 2},
            "alpha_pattern": {"q_proj": 3, "c_fc": 3},
        },
    ),
    "lora of one layer, biases": (
        LoraAdapter(init_from="x"),
        {"layers_to_transform": [1], "bias": "lora_only"},
    ),
    "lora, norm": (LoraAdapter(init_from="x"), {"modules_to_save": ["norm", "ln_f"]}),
    "qlora": (QloraAdapter(init_from="x"), {}),
    "dora": (DoraAdapter(init_from="x"), {"use_dora": True}),
    "vera": (VeraAdapter(init_from="x"), {"projection_prng_key": 5}),
    "vera, drawn": (VeraAdapter(init_from="x"), {"projection_prng_key": 5, "save_projection": False}),
}
"""A block without a word on the layout, and PEFT's settings of the adapter that it starts from."""


def write(folder: Path, name: str, architecture: str) -> torch.nn.Module:
    """Write an adapter with a real update by PEFT and return its live model."""
    settings = CASES[name][1]
    values = {"target_modules": TARGETS[architecture], "task_type": "CAUSAL_LM"} | settings
    config: Any
    if name.startswith("vera"):
        config = peft.VeraConfig(r=16, fan_in_fan_out=architecture == "gpt2", **values)
    else:
        config = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, **values)
    model = peft.get_peft_model(make_model(architecture), config)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


def begin(
    folder: Path, settings: Section, architecture: str, steps: int = STEPS
) -> tuple[PreTrainedModel, Method, str]:
    """Start from the folder as a run does; return the model, the method and the line for the log."""
    start = adapters.open_start(folder, dict(settings)["method"])
    settled = start.settle(settings)
    model, method = make_model(architecture), start.build(settled, seed=5)
    method.plan(steps)
    return model, method, start.inject(method, settled, model)


def distance(one: torch.nn.Module, other: torch.nn.Module) -> float:
    """Return the largest difference of their logits."""
    return float((logits(one) - logits(other)).abs().max())


def settled(folder: Path, settings: Section) -> dict[str, Any]:
    """Return a block with what the folder settles, as it stands in the run's recipe.yaml."""
    return dict(adapters.open_start(folder, dict(settings)["method"]).settle(settings))


@pytest.mark.filterwarnings("ignore:Specified to not")
@pytest.mark.parametrize("name", CASES)
def test_a_start_computes_what_pefts_adapter_does(tmp_path: Path, name: str, architecture: str) -> None:
    """Before the first step logits equal PEFT's to 1e-5, and the reference model is the plain base bit for bit."""
    live = write(tmp_path, name, architecture)
    model, method, line = begin(tmp_path, CASES[name][0], architecture)
    model.eval()
    assert distance(model, live) <= 1e-5
    before = make_model(architecture)
    assert distance(model, before) > 0.01
    with AdaptedModel(model, method.placed()).reference():
        assert torch.equal(logits(model), logits(before))
    method_name, rank = name.split(",")[0].split(" ")[0], 16 if "vera" in name else 4
    assert line.startswith(f"adapter: starts from {tmp_path} ({method_name}, rank {rank}")
    assert line.endswith(f", {len(method.layers)} layers)")


@pytest.mark.filterwarnings("ignore:Specified to not")
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("qlora", "vera, drawn")])
def test_training_goes_on_as_pefts_does(tmp_path: Path, name: str) -> None:
    """10 steps keep the losses of PEFT training its own adapter on to 1e-4; dropout is the recipe's."""
    architecture = "qwen2" if "bias" in name else "llama"
    write(tmp_path, name, architecture)
    model, method, _ = begin(tmp_path, CASES[name][0], architecture)
    config = tmp_path / _peft.CONFIG_FILE
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"lora_dropout": 0.0} if "lora_dropout" in values else values))
    other = peft.PeftModel.from_pretrained(make_model(architecture), tmp_path, is_trainable=True)
    trained = sum(parameter.numel() for parameter in method.trainable(model).values())
    assert trained == sum(parameter.numel() for parameter in other.parameters() if parameter.requires_grad)
    assert follow(model, method, other, adamw(other), steps=10) <= 1e-4


def budget(**changes: Any) -> AdaLoraAdapter:
    """Return AdaLoRA's block with the schedule of the runs beside PEFT's, and no word on ranks, alpha and targets."""
    return AdaLoraAdapter(init_from="x", tinit=5, tfinal=8, delta_t=3, **changes)


def written_by_peft(folder: Path, steps: int, architecture: str = "llama") -> Any:
    """Return PEFT's AdaLoRA, trained for some steps and saved."""
    live = pefts(architecture)
    for _ in train_pefts(live, steps):
        pass
    live.eval().save_pretrained(folder)
    return live


def test_adalora_goes_on_as_pefts_does(tmp_path: Path) -> None:
    """10 steps with two budget updates keep the losses of PEFT training its own unpruned adapter on to 1e-4."""
    live = written_by_peft(tmp_path, 3)
    model, method, _ = begin(tmp_path, budget(), "llama")
    assert isinstance(method, AdaLora)
    assert distance(model, live) <= 1e-5
    assert method.target_rank == 3
    other = peft.PeftModel.from_pretrained(make_model("llama"), tmp_path, is_trainable=True)
    both: Iterator[Any] = zip(train(model, method, 10), train_pefts(other, 10), strict=True)
    for (step, loss, penalty), (_, theirs) in both:
        assert abs(loss + penalty - theirs) / theirs <= 1e-4, step
    assert any(layer.kept is not None for layer in method.layers.values())


def test_pruned_adalora_gets_its_room_back(tmp_path: Path) -> None:
    """Every layer has all triplets again, those that PEFT pruned at 0: the logits are the same, and ranks move anew."""
    architecture = "gpt2"
    live = written_by_peft(tmp_path, STEPS, architecture)
    held = load_file(tmp_path / _peft.TENSOR_FILE)
    before = {key.removeprefix(_peft.PREFIX): len(value) for key, value in held.items() if "lora_E" in key}
    assert len(set(before.values())) > 1
    model, method, line = begin(tmp_path, budget(target_rank=2), architecture)
    assert "rank 6 with a rank pattern" in line
    assert isinstance(method, AdaLora)
    assert distance(model.eval(), live) <= 1e-5
    for path, layer in method.layers.items():
        assert len(layer.lora_A) == len(layer.lora_E) == layer.lora_B.shape[1] == 6
        assert int((layer.lora_E != 0).sum()) == before[f"{path}.lora_E"]
        assert bool(layer.lora_A.norm(dim=1).gt(0).all())
    rose = False
    for step, *_ in train(model, method):
        ranks = {path: int((layer.lora_E != 0).sum()) for path, layer in method.layers.items()}
        rose |= step > 5 and any(rank > before[f"{path}.lora_E"] for path, rank in ranks.items())
    assert rose
    assert sum(ranks.values()) == 2 * len(ranks)
    _peft.write(tmp_path, method, base_name="base", revision=None)
    reread = peft.PeftModel.from_pretrained(make_model(architecture), tmp_path).eval()
    assert distance(reread, model.eval()) <= 1e-5


def test_the_folder_settles_what_the_recipe_does_not_say(tmp_path: Path) -> None:
    """Layout comes from the folder, written or not as the method's default; keys of training alone from the recipe."""
    write(tmp_path / "lora", "lora, rslora, patterns", "llama")
    lora = settled(
        tmp_path / "lora", LoraAdapter(init_from="x", dropout=0.3, plus_ratio=4.0, scaling="rslora")
    )
    assert (lora["rank"], lora["alpha"], lora["scaling"], lora["bias"]) == (4, 6.0, "rslora", "none")
    assert sorted(lora["targets"]) == ["down_proj", "q_proj"]
    assert lora["rank_pattern"] == {r"1\..*(q_proj|c_attn)": 2}
    assert (lora["dropout"], lora["plus_ratio"]) == (0.3, 4.0)
    write(tmp_path / "layer", "lora of one layer, biases", "qwen2")
    layer = settled(tmp_path / "layer", LoraAdapter(init_from="x"))
    assert (layer["layers"], layer["bias"]) == ([1], "adapter")
    write(tmp_path / "vera", "vera, drawn", "llama")
    vera = settled(tmp_path / "vera", VeraAdapter(init_from="x"))
    assert (vera["rank"], vera["projection_seed"], vera["save_projection"]) == (16, 5, False)
    written_by_peft(tmp_path / "adalora", 0)
    adalora = settled(tmp_path / "adalora", budget(beta1=0.5))
    assert (adalora["initial_rank"], adalora["target_rank"], adalora["beta1"]) == (6, 3, 0.5)
    assert settled(tmp_path / "adalora", budget(target_rank=5))["target_rank"] == 5


@pytest.mark.parametrize(
    ("name", "settings", "lines"),
    [
        ("lora", LoraAdapter(init_from="x", rank=16), ["adapter.rank: * has 4, the recipe 16 (remove the key, or"]),
        (
            "lora",
            LoraAdapter(init_from="x", alpha=7.5, scaling="rslora", bias="all"),
            ["adapter.alpha: * 6, the recipe 7.5", "adapter.scaling: * standard, the", "adapter.bias: * none, the"],
        ),
        (
            "lora",
            LoraAdapter(init_from="x", targets="all-linear", rank_pattern={"q_proj": 8}),
            [
                "adapter.targets: * has nothing at model.layers.0.self_attn.k_proj, the recipe an adapter (remove",
                "adapter.rank_pattern: * has 4 at model.layers.0.self_attn.q_proj, the recipe 8",
            ],
        ),
        ("lora", LoraAdapter(init_from="x", layers="first 1"), ["adapter.layers: * an adapter at model.layers.1."]),
        ("lora", LoraAdapter(init_from="x", train_also=["norm"]), ["adapter.train_also: * nothing at model.norm"]),
        ("lora", LoraAdapter(init_from="x", targets=["wq"]), ["adapter.targets: 'wq' matches no linear layer"]),
        ("lora", LoraAdapter(init_from="x", rank_pattern={"wq": 2}), ["adapter.rank_pattern: 'wq' matches none"]),
        ("lora", DoraAdapter(init_from="x"), ["adapter.method: * is lora, the recipe dora (write method: lora"]),
        ("dora", QloraAdapter(init_from="x"), ["adapter.method: * is dora, the recipe qlora"]),
        ("dora", DoraAdapter(init_from="x", rank=8), ["adapter.rank: * has 4, the recipe 8"]),
        ("vera", VeraAdapter(init_from="x", projection_seed=6), ["adapter.projection_seed: * has 5, the recipe 6"]),
        ("vera", LoraAdapter(init_from="x"), ["adapter.method: * is vera, the recipe lora"]),
        ("adalora", budget(initial_rank=12), ["adapter.initial_rank: * has 6, the recipe 12"]),
        ("adalora", budget(target_rank=7), ["adapter.target_rank: found 7, above adapter.initial_rank 6"]),
    ],
)  # fmt: skip
def test_a_key_that_contradicts_the_folder_is_refused(
    tmp_path: Path, name: str, settings: Section, lines: list[str]
) -> None:
    """Every written key that disagrees is a line of its own, with both values."""
    if name == "adalora":
        written_by_peft(tmp_path, 0)
    else:
        write(tmp_path, name, "llama")
    with pytest.raises(InputError) as caught:
        begin(tmp_path, settings, "llama")
    found = [line.replace(f"the adapter in {tmp_path}", "*") for line in caught.value.lines]
    assert len(found) == len(lines), found
    for line, expected in zip(found, lines, strict=True):
        key, _, rest = expected.partition("* ")
        assert line.startswith(key), line
        assert rest in line


@pytest.mark.parametrize(
    "settings",
    [
        LoraAdapter(init_from="x", rank=4, alpha=6.0, scaling="rslora", targets=r".*(q|down)_proj", layers="0-1"),
        LoraAdapter(init_from="x", rank_pattern={r".*layers\.1.*q_proj": 2}, alpha_pattern={"self_attn.*": 3.0}),
    ],
)  # fmt: skip
def test_another_spelling_of_the_same_layout_agrees(tmp_path: Path, settings: Section) -> None:
    """Targets, layers and patterns are compared by the modules and values they come to, not by their text."""
    live = write(tmp_path, "lora, rslora, patterns", "llama")
    assert distance(begin(tmp_path, settings, "llama")[0], live) <= 1e-5


def test_settings_that_no_recipe_can_have_are_refused(tmp_path: Path) -> None:
    """A folder beyond the recipe's bounds is refused with key and value: the run's own recipe.yaml must load again."""
    write(tmp_path, "lora", "llama")
    config = tmp_path / _peft.CONFIG_FILE
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 5000}))
    with pytest.raises(
        InputError, match=r"^adapter\.rank: the adapter in .* has 5000, which no recipe can have"
    ):
        begin(tmp_path, LoraAdapter(init_from="x"), "llama")


@pytest.mark.parametrize("equal", [True, False])
def test_modules_that_share_a_weight_stay_one_where_they_are(tmp_path: Path, equal: bool) -> None:
    """A tied embedding and head, trained whole before, go on as one parameter if their values agree, else as two."""
    model = make_model("llama")
    method = adapters.build(LoraAdapter(rank=4, train_also=["lm_head"]), seed=1)
    method.inject(model)
    with torch.no_grad():
        for parameter in method.trainable(model).values():
            parameter.add_(0.1)
    _peft.write(tmp_path, method, base_name="base", revision=None)
    if not equal:
        tensors = load_file(tmp_path / _peft.TENSOR_FILE)
        tensors["base_model.model.lm_head.weight"] += 1.0
        save_file(tensors, tmp_path / _peft.TENSOR_FILE)
    again, restarted, _ = begin(tmp_path, LoraAdapter(init_from="x", train_also=["lm_head"]), "llama")
    extra = set(restarted.trainable(again)) - set(method.trainable(model))
    assert len(extra) == (0 if equal else 1)
    assert (distance(again, model) <= 1e-5) is equal
