"""Of every method's update: its size, its spectrum, the verdicts, and what is suggested for the recipe."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lora_variants import ours, stir
from pydantic import TypeAdapter
from small import make_model
from torch import Tensor
from transformers import PreTrainedModel

from lora_cli import adapters
from lora_cli.adapters import Method
from lora_cli.adapters._low_rank import LoraLinear
from lora_cli.adapters.adalora import AdaLoraLinear
from lora_cli.adapters.lora import Lora
from lora_cli.adapters.relora import ReloraLinear
from lora_cli.errors import InputError
from lora_cli.recipe.schema import Adapter, LoraAdapter, ReloraAdapter
from lora_cli.stages import _inspection, inspect
from lora_cli.stages._inspection import Module, Spectrum

SMALL = {"rank": 4, "initial_rank": 6, "target_rank": 4, "restart_every": 2}
"""Keys of the methods' blocks; each block takes those it has."""
WITH_LAYERS = [name for name in adapters.names() if name != "full"]
MODULE_KEYS = {*Module.__dataclass_fields__, "kind"}


def block(name: str, **changes: Any) -> Any:
    """Return a method's block of the recipe, small."""
    fields = adapters_block(name)
    values = {key: value for key, value in SMALL.items() if key in fields}
    return TypeAdapter(Adapter).validate_python({"method": name} | values | changes)


def adapters_block(name: str) -> set[str]:
    """Return the keys of a method's block."""
    return set(type(TypeAdapter(Adapter).validate_python({"method": name})).model_fields)


def adapted(settings: Any, architecture: str = "llama", **base: Any) -> tuple[PreTrainedModel, Method]:
    """Return a model with a method in it whose every parameter has moved."""
    model = make_model(architecture, **base)
    method = adapters.build(settings, seed=0)
    method.plan(8)
    method.inject(model)
    stir(method.trainable(model).values())
    for layer in method.layers.values():
        if isinstance(layer, ReloraLinear):
            layer.restart(seed=1)
            stir([layer.lora_B])
    return model, method


def svdvals(matrix: Tensor) -> Tensor:
    """Return torch's singular values, float64."""
    return torch.linalg.svdvals(matrix.detach().double())


def largest_difference(values: list[float], oracle: Tensor) -> float:
    """Return by how much the values differ, as a part of the first; what they lack must be zero."""
    padded = torch.zeros_like(oracle)
    padded[: len(values)] = torch.tensor(values, dtype=torch.float64)
    return float((padded - oracle).abs().max() / oracle[0])


@pytest.mark.parametrize(("architecture", "quantize"), [("llama", None), ("gpt2", None), ("llama", "nf4")])
@pytest.mark.parametrize("name", WITH_LAYERS)
def test_singular_values_are_those_of_the_dense_update(
    name: str, architecture: str, quantize: str | None
) -> None:
    """Of every method and kind of layer they are torch's of merged less base weight; norms and sums follow."""
    settings = block(name)
    model, method = adapted(settings, architecture, quantize=quantize)
    found = inspect.run(method.as_peft()[0], model, settings)
    assert [module["path"] for module in found["modules"]] == list(method.layers)
    for module, layer in zip(found["modules"], method.layers.values(), strict=True):
        weight = layer.base_weight().detach().float()
        dense = layer.merged_weight().detach() - weight
        values = module["update"]["singular_values"]
        assert largest_difference(values, svdvals(dense)) <= 1e-5
        assert module["update_norm"] == pytest.approx(float(dense.norm()), rel=1e-5)
        assert module["weight_norm"] == pytest.approx(float(weight.norm()), rel=1e-5)
        assert module["relative_change"] == pytest.approx(float(dense.norm() / weight.norm()), rel=1e-5)
        assert (module["out_features"], module["in_features"]) == tuple(weight.shape)
        assert module["update_norm"] ** 2 == pytest.approx(math.fsum(value**2 for value in values))
        assert module.keys() == MODULE_KEYS
    assert math.fsum(kind["share"] for kind in found["kinds"]) == pytest.approx(1.0)
    assert math.fsum(layer["share"] for layer in found["layers"]) == pytest.approx(1.0)
    assert sum(kind["parameters"] for kind in found["kinds"]) == found["parameters"]
    if name not in ("adalora", "relora"):  # of which less or more is stored than is trained
        trained = sum(parameter.numel() for parameter in method.trainable(model).values())
        assert found["parameters"] == trained


def test_full_fine_tuning_is_compared_with_its_base(architecture: str) -> None:
    """Of trained weights the values are torch's of the difference; what is no linear layer has its relative change."""
    base, tuned = make_model(architecture), make_model(architecture)
    before = {name: parameter.detach() for name, parameter in base.named_parameters()}
    names = list(before)
    stir(parameter for name, parameter in tuned.named_parameters() if name != names[1])
    found = inspect.run(tuned, base)
    assert (found["method"], found["unchanged"], found["suggestion"]) == ("full", 1, {})
    after = {name: parameter.detach() for name, parameter in tuned.named_parameters()}
    assert found["modules"]
    for module in found["modules"]:
        name = f"{module['path']}.weight"
        oracle = svdvals(after[name] - before[name])
        assert largest_difference(module["update"]["singular_values"], oracle) <= 1e-6
        assert (module["rank"], module["verdict"]) == (None, None)
        layer: Any = tuned.get_submodule(module["path"])
        sizes = (layer.nf, layer.nx) if architecture == "gpt2" and "lm_head" not in name else None
        assert sizes in (None, (module["out_features"], module["in_features"]))
    for tensor in found["whole"]:
        change = (after[tensor["name"]] - before[tensor["name"]]).norm() / before[tensor["name"]].norm()
        assert tensor["relative_change"] == pytest.approx(float(change), rel=1e-5)
    assert len(found["modules"]) + len(found["whole"]) == len(names) - 1


def test_another_model_is_refused() -> None:
    """A model whose weights have other names or shapes than the base's was not trained from it."""
    with pytest.raises(InputError, match="is not what this model was trained from"):
        inspect.run(make_model("llama"), make_model("gpt2"))


def test_a_weight_that_is_not_finite_is_refused() -> None:
    """It is named; no spectrum is made of it."""
    tuned = make_model("llama")
    with torch.no_grad():
        tuned.model.norm.weight[0] = float("nan")
    with pytest.raises(InputError, match=r"model\.norm\.weight: holds values that are not finite"):
        inspect.run(tuned, make_model("llama"))


CONFIGS: dict[str, tuple[peft.PeftConfig, int]] = {
    "lora": (peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]), 4),
    "rslora": (peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj"]), 4),
    "dora": (peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj", "v_proj"]), 4),
    "vera": (peft.VeraConfig(r=8, target_modules=["q_proj", "o_proj"]), 8),
    "adalora": (
        peft.AdaLoraConfig(init_r=4, lora_alpha=8, total_step=10, target_modules=["q_proj", "up_proj"]),
        4,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_of_an_adapter_that_peft_wrote_the_update_is_what_peft_merges(tmp_path: Path, name: str) -> None:
    """Singular values are torch's of the difference that PEFT's own merge makes to each weight."""
    config, rank = CONFIGS[name]
    theirs = peft.get_peft_model(make_model("llama"), config)
    stir(
        parameter
        for key, parameter in theirs.named_parameters()
        if parameter.requires_grad and "magnitude" not in key
    )
    theirs.save_pretrained(tmp_path)
    model = make_model("llama")
    found = inspect.run(adapters.load(tmp_path, model), model)
    merged = theirs.merge_and_unload()
    base = make_model("llama")
    assert len(found["modules"]) == 2 * len(config.target_modules or ())
    for module in found["modules"]:
        weights = [one.get_submodule(module["path"]).weight for one in (merged, base)]
        oracle = svdvals(weights[0].detach().double() - weights[1].detach().double())
        assert largest_difference(module["update"]["singular_values"], oracle) <= 1e-5
        assert module["rank"] == rank
    assert found["method"] == name.removeprefix("rs")


def planted(ranks: dict[str, int], rank: int = 16, **options: Any) -> dict[str, Any]:
    """Return what is found of a LoRA whose kinds of modules have flat updates of these ranks."""
    settings = LoraAdapter(**{"rank": rank, "alpha": float(rank), "targets": sorted(ranks)} | options)
    model = make_model("llama")
    method = adapters.build(settings, seed=0)
    assert isinstance(method, Lora)
    method.inject(model)
    with torch.no_grad():
        for index, (path, layer) in enumerate(method.layers.items()):
            generator = torch.Generator().manual_seed(index)
            number = ranks[path.rpartition(".")[2]]
            a, b = layer.disk_tensors().values()
            for factor, side in ((a, a), (b.T, b)):
                flat = torch.linalg.qr(torch.randn(max(side.shape), len(factor), generator=generator)).Q.T
                factor.copy_(flat)
            b[:, number:] = 0.0
    return inspect.run(method, model, settings)


def test_an_update_of_rank_2_in_16_is_wasted_and_a_flat_one_short() -> None:
    """The kinds get their verdicts, and the suggestion is a rank_pattern that the recipe and the model take."""
    found = planted({"q_proj": 2, "up_proj": 16, "k_proj": 10})
    by_name = {module["path"]: module for module in found["modules"]}
    first = by_name["model.layers.0.self_attn.q_proj"]
    assert (first["verdict"], first["suggested_rank"]) == ("wasted", 2)
    assert first["update"]["effective_rank"] == pytest.approx(2.0, rel=1e-4)
    second = by_name["model.layers.1.mlp.up_proj"]
    assert (second["verdict"], second["suggested_rank"]) == ("short", 32)
    assert {kind["kind"]: kind["verdict"] for kind in found["kinds"]} == {
        "q_proj": "wasted",
        "k_proj": "fits",
        "up_proj": "short",
    }
    assert found["suggestion"] == {
        "rank_pattern": {"q_proj": 2, "up_proj": 32},
        "alpha_pattern": {"q_proj": 2, "up_proj": 32},
    }
    settings = LoraAdapter(targets=["q_proj", "k_proj", "up_proj"], **found["suggestion"])
    adapters.build(settings, seed=0).inject(make_model("llama"))


def test_the_suggestion_keeps_what_other_kinds_need_of_the_pattern() -> None:
    """A present rank_pattern is part of the line, but for entries that only meant the kinds that get another rank."""
    pattern = {r"0\..*q_proj": 16, "k_proj": 12}
    found = planted({"q_proj": 2, "k_proj": 8}, 16, rank_pattern=pattern)
    assert found["suggestion"]["rank_pattern"] == {"q_proj": 2, "k_proj": 12}


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_the_suggested_alpha_keeps_the_scale(scaling: str) -> None:
    """A layer of the suggested rank and alpha multiplies B A by what the present one does, in rsLoRA too."""
    found = planted({"q_proj": 2, "k_proj": 10}, alpha=24.0, scaling=scaling)
    assert found["suggestion"]["rank_pattern"] == {"q_proj": 2}
    alphas = [24.0, found["suggestion"]["alpha_pattern"]["q_proj"]]
    before, after = (
        LoraLinear(torch.nn.Linear(4, 4), rank=rank, alpha=alpha, rslora=scaling == "rslora").scale
        for rank, alpha in zip((16, 2), alphas, strict=True)
    )
    assert after == pytest.approx(before, rel=1e-4)


def test_where_nothing_is_clear_nothing_is_suggested() -> None:
    """An update that fits has no suggestion."""
    assert planted({"q_proj": 10, "k_proj": 10})["suggestion"] == {}


def module(path: str, verdict: str | None, used: int, rank: int = 16) -> Module:
    """Return a module with a flat update of `used` directions."""
    spectrum = Spectrum.of([1.0] * used + [0.0] * (rank - used))
    suggested = {"wasted": used, "short": 2 * rank}.get(verdict or "")
    return Module(
        path, _inspection.layer_of(path), 64, 64, 2048, rank, 32.0, None, rank,
        10.0, math.sqrt(used), 0.1 * math.sqrt(used), spectrum, None, verdict, suggested,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("modules", "verdict", "rank"),
    [
        ([("wasted", 3), ("wasted", 5), ("wasted", 2), ("fits", 7)], "wasted", 8),
        ([("wasted", 3), ("wasted", 5), ("wasted", 2), ("fits", 12)], "wasted", None),
        ([("wasted", 3), ("wasted", 5), ("fits", 7), ("fits", 7)], None, None),
        ([("wasted", 3), ("wasted", 5), ("wasted", 2), ("short", 16)], None, None),
        ([("short", 16), ("short", 16), ("short", 16), ("fits", 14)], "short", 32),
        ([("fits", 9), ("fits", 9), ("fits", 9), ("short", 16)], "fits", None),
        ([("zero", 0), ("zero", 0)], "zero", None),
        ([(None, 3), (None, 3)], None, None),
    ],
)
def test_a_kind_has_a_verdict_where_it_is_clear(
    modules: list[tuple[str | None, int]], verdict: str | None, rank: int | None
) -> None:
    """Three quarters must agree and none say the opposite; a lower rank must hold every module's update."""
    group = [module(f"h.{index}.attn.q", *one) for index, one in enumerate(modules)]
    (kind,) = _inspection.by_kind(group)
    assert (kind["verdict"], kind["suggested_rank"]) == (verdict, rank)


def test_methods_of_one_rank_get_one_rank_if_all_kinds_agree() -> None:
    """With no rank_pattern in the block, `rank` is suggested where every kind is wasted or every kind is short."""
    wasted = [module("h.0.attn.q", "wasted", 2), module("h.0.mlp.up", "wasted", 5)]
    mixed = [*wasted, module("h.0.mlp.down", "short", 16)]
    suggested = [
        _inspection.suggest(_inspection.by_kind(group), group, {"rank", "alpha"}, {}, 1.0)
        for group in (wasted, mixed)
    ]
    assert suggested == [{"rank": 8, "alpha": 16}, {}]


def test_kinds_of_one_name_are_told_apart_by_their_parents() -> None:
    """GPT-2 has a c_proj in attention and one in the MLP; an expert's number is no parent."""
    paths = ["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.mlp.c_fc", "h.0.experts.3.w1", "lm_head"]
    assert list(_inspection.kind_names(paths).values()) == [
        "attn.c_proj", "mlp.c_proj", "c_fc", "w1", "lm_head",
    ]  # fmt: skip
    assert [_inspection.layer_of(path) for path in paths] == [0, 0, 0, 0, None]


def test_adalora_says_the_rank_it_began_with_and_the_one_it_has() -> None:
    """A pruned layer has the rank that is left, one pruned to nothing is `zero`."""
    settings = block("adalora")
    model, method = adapted(settings)
    for index, layer in enumerate(method.layers.values()):
        assert isinstance(layer, AdaLoraLinear)
        layer.kept = torch.arange(6) < index % 7
        layer.prune()
    found = inspect.run(method, model, settings)
    assert [one["rank"] for one in found["modules"]] == [index % 7 for index in range(len(found["modules"]))]
    assert {one["initial_rank"] for one in found["modules"]} == {6}
    assert (found["modules"][0]["verdict"], found["modules"][0]["update_norm"]) == ("zero", 0.0)
    assert {one["verdict"] for one in found["modules"]} == {"zero", None}
    assert found["suggestion"] == {}


def test_relora_says_the_rank_of_a_cycle_and_of_all_of_them() -> None:
    """Two cycles of rank 4 are an update of rank 8 in the plain LoRA that is exported."""
    settings = block("relora")
    assert isinstance(settings, ReloraAdapter)
    model, method = adapted(settings)
    found = inspect.run(method.as_peft()[0], model, settings)
    assert {(one["rank"], one["update_rank"]) for one in found["modules"]} == {(4, 8)}
    assert found["method"] == "relora"
    widths = [layer.in_features + layer.out_features for layer in method.layers.values()]
    assert found["parameters"] == 4 * sum(widths)


def test_a_start_from_the_base_is_in_the_recipes_terms() -> None:
    """PiSSA's update has up to twice the rank that is trained; rank and parameters are the trained ones."""
    settings = block("lora", init="pissa")
    model, method = adapted(settings)
    found = inspect.run(method, model, settings)
    assert {(one["rank"], one["update_rank"]) for one in found["modules"]} == {(4, 8)}
    assert found["parameters"] == sum(p.numel() for p in method.trainable(model).values())


def test_doras_rank_is_judged_by_the_part_that_it_bounds() -> None:
    """W' - W is that part and a multiple of each row of W; the part alone has the rank."""
    settings = block("dora")
    model, method = adapted(settings)
    found = inspect.run(method, model, settings)
    for one, layer in zip(found["modules"], method.layers.values(), strict=True):
        weight, merged = layer.base_weight().detach(), layer.merged_weight().detach()
        lengths = merged.norm(dim=1, keepdim=True)
        a, b = layer.lora_A.detach(), layer.lora_B.detach() * layer.scale  # type: ignore[operator,union-attr]
        grown = lengths / (weight + b @ a).norm(dim=1, keepdim=True)
        part = merged - grown * weight
        assert largest_difference(one["low_rank"]["singular_values"], svdvals(part)) <= 1e-5
        assert len(one["low_rank"]["singular_values"]) == 4 < len(one["update"]["singular_values"])


def test_biases_and_whole_modules_have_their_relative_change() -> None:
    """Each trained tensor is there once, tied ones too, with the change against the base's value."""
    settings = block("lora", train_also=["norm", "lm_head", "embed_tokens"], bias="adapter")
    model, method = adapted(settings, "qwen2")
    base = {name: parameter.detach() for name, parameter in make_model("qwen2").named_parameters()}
    found = inspect.run(method, model, settings)
    names = [tensor["name"] for tensor in found["whole"]]
    assert len(names) == len(set(names))
    assert {"model.norm.weight", "lm_head.weight", "model.layers.1.self_attn.q_proj.bias"} <= set(names)
    trained = {name: p.detach() for name, p in method.trainable(model).items() if "lora_" not in name}
    assert trained.keys() == set(names)
    for tensor in found["whole"]:
        before, after = base[tensor["name"]], trained[tensor["name"]]
        assert tensor["relative_change"] == pytest.approx(
            float((after - before).norm() / before.norm()), rel=1e-5
        )
    tied, method = adapted(block("lora", train_also=["lm_head"]), "llama")
    assert len(inspect.run(method, tied)["whole"]) == 1


@torch.no_grad()
def test_rows_of_tokens_and_an_adapted_embedding_are_measured() -> None:
    """Rows trained alone are compared with the base's own rows, an embedding's update has the spectrum torch gives."""
    model, method = ours("tokens", "qwen2")
    start = {path: rows.base_tensor("trainable_tokens_delta").clone() for path, rows in method.whole.items()}
    stir(method.trainable(model).values())
    found = {one["name"]: one for one in inspect.run(method, model)["whole"]}
    for path, before in start.items():
        moved = method.whole[path].get_parameter("trainable_tokens_delta") - before
        expected = float(moved.norm() / before.norm())
        assert found[f"{path}.trainable_tokens_delta"]["relative_change"] == pytest.approx(expected, rel=1e-5)
    model, method = ours("embedding", "llama")
    stir(method.trainable(model).values())
    (path,) = (path for path in method.layers if path.endswith("embed_tokens"))
    layer = method.layers[path]
    (module,) = (one for one in inspect.run(method, model)["modules"] if one["path"] == path)
    oracle = svdvals(layer.merged_weight() - layer.base_weight())
    assert largest_difference(module["update"]["singular_values"], oracle) <= 1e-5
