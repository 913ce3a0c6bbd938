"""Any method as one plain LoRA: what PEFT and a reader by key names make of it is what the live model computes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import exporting
import peft
import pytest
import torch
from lora_variants import FACTORS, difference, logits, ours, stir
from plain_lora_readers import as_llama_cpp, check_exact, check_plain, read
from small import make_model
from transformers import PreTrainedModel

from lora_cli import adapters
from lora_cli.adapters import Method, _portable
from lora_cli.adapters.adalora import AdaLoraLinear
from lora_cli.adapters.relora import ReloraLinear
from lora_cli.errors import GateError, InputError
from lora_cli.recipe import schema
from lora_cli.stages import export

METHODS: dict[str, schema.Section] = {
    "lora": schema.LoraAdapter(rank=3, alpha=7.0),
    "qlora": schema.QloraAdapter(rank=4, alpha=6.0),
    "vera": schema.VeraAdapter(rank=16),
    "vera, wider than layers": schema.VeraAdapter(rank=40),
    "adalora": schema.AdaLoraAdapter(initial_rank=6, target_rank=3, alpha=9.0),
    "relora": schema.ReloraAdapter(rank=4, alpha=8.0, restart_every=2),
    "dora": schema.DoraAdapter(rank=4, alpha=8.0),
}
EXACT = [name for name in METHODS if name != "dora"]


def moved(name: str, architecture: str, quantize: str | None = None) -> tuple[PreTrainedModel, Method]:
    """Return a model with a method whose update is not nothing: pruned and restarted where it does such things."""
    model = make_model(architecture, quantize=quantize)
    method = adapters.build(METHODS[name], seed=1)
    method.plan(8)
    for number, layer in enumerate(method.inject(model).values()):
        stir(parameter for parameter in layer.parameters() if parameter.requires_grad)
        if isinstance(layer, ReloraLinear):
            for seed in (1, 2):
                layer.restart(seed)
                stir([layer.lora_B])
        if isinstance(layer, AdaLoraLinear):
            layer.kept = torch.arange(6) < number % 6  # the first layer loses everything
            layer.prune()
    return model, method


def write(
    folder: Path, model: PreTrainedModel, method: Method, base: Path, **settings: Any
) -> tuple[dict[str, Any], str]:
    """Export the portable adapter and return its figures and what was logged."""
    lines: list[str] = []
    chosen = schema.Export(formats=["portable"], **settings)
    result = exporting.write({"portable": folder}, model, method, base, chosen, log=lines.append)
    return result, "\n".join(lines)


@pytest.mark.parametrize("name", EXACT)
def test_methods_with_factors_are_exact(name: str, architecture: str, tmp_path: Path, base: Path) -> None:
    """LoRA, AdaLoRA (pruned), VeRA and ReLoRA (restarted) are read as uniform LoRA with the live logits to 1e-5."""
    model, method = moved(name, architecture)
    before = logits(model)
    result, log = write(tmp_path / "out", model, method, base)
    rank = check_plain(tmp_path / "out")
    expected = {"lora": 3, "qlora": 4, "vera": 16, "adalora": 5, "relora": 12}
    assert rank == expected.get(name, 32)
    check_exact(tmp_path / "out", model, architecture)
    figures = result["portable_update"]
    assert figures["worst_error"] <= 1e-6
    assert (figures["worst_error"] == 0.0) is (name != "vera, wider than layers")
    assert f"LORA of rank {rank}: exact up to float32 rounding" in log
    assert ("Not for llama.cpp" in log) is (architecture == "gpt2")
    assert torch.equal(logits(model), before)  # the live model is as it was


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("name", [name for name in FACTORS if "embedding" not in name])
def test_variants_of_lora_are_exact(name: str, architecture: str, tmp_path: Path, base: Path) -> None:
    """rsLoRA, patterns, layers, frozen A and every start are read as uniform LoRA with the live logits to 1e-5."""
    model, method = ours(name, architecture)
    stir(method.trainable(model).values())
    result, _ = write(tmp_path / "out", model, method, base)
    assert check_plain(tmp_path / "out") == max(
        len(layer.plain_factors()[0]) for layer in method.layers.values()
    )
    check_exact(tmp_path / "out", model, architecture)
    assert result["portable_update"]["worst_error"] == 0.0


@pytest.mark.parametrize("name", ["embedding", "tokens"])
def test_embeddings_and_rows_are_refused(name: str) -> None:
    """What no reader of plain LoRA on linear layers knows is refused, with what to do."""
    model, method = ours(name, "llama")
    with pytest.raises(InputError, match="merged"):
        _portable.require_expressible(method, model)


def test_a_quantized_base_keeps_the_update(tmp_path: Path, base: Path) -> None:
    """Trained on NF4, the adapter is the same update: in our reader on that base exact, for PEFT on the full one."""
    model, method = moved("qlora", "llama", quantize="nf4")
    write(tmp_path / "out", model, method, base)
    again = make_model("llama", quantize="nf4")
    adapters.load(tmp_path / "out", again)
    assert difference(again, model) <= 1e-5
    theirs = peft.PeftModel.from_pretrained(make_model("llama"), tmp_path / "out").eval()
    assert difference(theirs, as_llama_cpp(tmp_path / "out", make_model("llama"))) <= 1e-5


def dense_error(method: Method, path: str, rank: int) -> float:
    """Return the relative error of a layer's best approximation by a dense SVD in float64 (Eckart and Young)."""
    layer = method.layers[path]
    update = (layer.merged_weight() - layer.base_weight().float()).detach().double()
    values = torch.linalg.svdvals(update)
    return float(values[rank:].norm() / values.norm())


@pytest.mark.parametrize("rank", [None, 2, 32])
def test_dora_is_the_best_of_its_rank_and_its_error_is_told(
    rank: int | None, architecture: str, tmp_path: Path, base: Path
) -> None:
    """Each layer's error is a dense SVD's; log, card and figures tell it, and by how much PEFT's logits are off."""
    model, method = moved("dora", architecture)
    result, log = write(tmp_path / "out", model, method, base, portable_rank=rank)
    written = check_plain(tmp_path / "out")
    assert written == (rank or 8)
    figures = result["portable_update"]
    for path, error in figures["errors"].items():
        assert error == pytest.approx(dense_error(method, path, written), rel=1e-3, abs=1e-6)
    assert (
        figures["worst_error"] == max(figures["errors"].values()) == figures["errors"][figures["worst_layer"]]
    )
    theirs = peft.PeftModel.from_pretrained(make_model(architecture), tmp_path / "out").eval()
    off = float((export.sample_logits(theirs) - export.sample_logits(model)).abs().max())
    assert figures["max_logit_difference_from_live"] == pytest.approx(off, abs=1e-5)
    assert (off > 0.01) is (written < 32)
    assert difference(theirs, as_llama_cpp(tmp_path / "out", make_model(architecture))) <= 1e-5
    for text in (log, (tmp_path / "out" / "README.md").read_text()):
        if written < 32:
            told = f"{figures['mean_error']:.1e} in the mean, {figures['worst_error']:.1e} at worst"
            assert f"relative error {told} ({figures['worst_layer']})" in text
            each = re.findall(r"Relative error of \S+: (.*)", text)
            assert sorted(" ".join(each).split()) == sorted(f"{e:.1e}" for e in figures["errors"].values())
        assert (
            f"differ from the trained model's by at most {figures['max_logit_difference_from_live']:.1e}"
            in text
        )


@pytest.mark.parametrize("name", ["relora", "lora", "vera"])
def test_a_lower_rank_is_the_best_there_is(name: str, tmp_path: Path, base: Path) -> None:
    """With `portable_rank` below an update's own, each layer's error is that of a dense SVD of its update."""
    model, method = moved(name, "qwen2")
    result, log = write(tmp_path / "out", model, method, base, portable_rank=2)
    assert check_plain(tmp_path / "out") == 2
    for path, error in result["portable_update"]["errors"].items():
        assert error == pytest.approx(dense_error(method, path, 2), rel=1e-3)
        assert error > 0.01
    assert "LORA of rank 2: relative error" in log
    kinds = {re.sub(r"\.\d+\.", ".*.", path) for path in method.layers}
    assert all(f"Relative error of {kind}: " in log for kind in kinds)


def test_a_portable_adapter_of_a_portable_adapter_is_the_same(tmp_path: Path, base: Path) -> None:
    """Read back and written again, every tensor keeps its bits."""
    write(tmp_path / "one", *moved("adalora", "llama"), base)
    model = make_model("llama")
    method = adapters.load(tmp_path / "one", model)
    write(tmp_path / "two", model, method, base)
    one, two = (read(tmp_path / name) for name in ("one", "two"))
    assert one[0] == two[0]
    assert all(torch.equal(two[1][name], tensor) for name, tensor in one[1].items())


def test_an_update_of_nothing_has_no_error(tmp_path: Path, base: Path) -> None:
    """A DoRA that was not trained, and an AdaLoRA pruned to nothing, are written as zeros of a rank readers take."""
    model = make_model("llama")
    method = adapters.build(METHODS["dora"], seed=1)
    method.inject(model)
    result, _ = write(tmp_path / "dora", model, method, base)
    assert result["portable_update"]["worst_error"] == 0.0
    model, method = moved("adalora", "llama")
    for layer in method.layers.values():
        assert isinstance(layer, AdaLoraLinear)
        layer.kept = torch.zeros(6, dtype=torch.bool)
        layer.prune()
    result, _ = write(tmp_path / "adalora", model, method, base)
    assert result["portable_update"]["rank"] == 1
    for name in ("dora", "adalora"):
        assert not any(tensor.any() for key, tensor in read(tmp_path / name)[1].items() if "lora_B" in key)


def test_too_great_an_error_is_refused(tmp_path: Path, base: Path) -> None:
    """Above `max_portable_error` nothing is published and the merge is named; just below, it is written."""
    model, method = moved("dora", "llama")
    worst = max(dense_error(method, path, 4) for path in method.layers)
    with pytest.raises(
        GateError, match=r"at rank 4 .* misses .*nothing was published; .*: lora-merge TARGET"
    ):
        write(tmp_path / "out", model, method, base, portable_rank=4, max_portable_error=worst * 0.99)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "out", model, method, base, portable_rank=4, max_portable_error=worst * 1.01)


def test_the_portable_adapter_is_written_last(tmp_path: Path, base: Path) -> None:
    """When it is refused, the adapter that can be merged instead stands already."""
    model, method = moved("dora", "llama")
    with pytest.raises(GateError, match="max_portable_error"):
        exporting.write(
            {form: tmp_path / form for form in ("portable", "peft")}, model, method, base,
            schema.Export(formats=["portable", "peft"], portable_rank=1, max_portable_error=0.0),
        )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


@pytest.mark.parametrize(
    ("architecture", "block", "found"),
    [
        ("qwen2", {"train_also": ["norm"]}, r"portable: model.norm is trained whole"),
        ("qwen2", {"bias": "adapter"}, r"portable: the bias of .*q_proj is trained"),
        ("llama", {"targets": ["lm_head"]}, r"portable: lm_head has an adapter and shares its weight"),
    ],
)
def test_what_a_plain_lora_cannot_say_is_refused(
    architecture: str, block: dict[str, Any], found: str, tmp_path: Path, base: Path
) -> None:
    """Trained modules, trained biases and an adapter on a tied head: one line that names the merge, nothing written."""
    model = make_model(architecture)
    method = adapters.build(schema.LoraAdapter(rank=2, **block), seed=1)
    method.inject(model)
    with pytest.raises(InputError, match=found + r".*lora-merge TARGET --output DIR\)$"):
        write(tmp_path / "out", model, method, base)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_on_a_head_of_its_own_is_written(tmp_path: Path, base: Path) -> None:
    """A head that is not tied is a linear layer like any other."""
    model = make_model("qwen2")
    method = adapters.build(schema.LoraAdapter(rank=2, alpha=4.0, targets=["lm_head", "q_proj"]), seed=1)
    method.inject(model)
    stir(method.trainable(model).values())
    write(tmp_path / "out", model, method, base)
    check_plain(tmp_path / "out")
    check_exact(tmp_path / "out", model, "qwen2")


def test_a_method_without_an_adapter_is_refused() -> None:
    """Full fine-tuning has nothing that a LoRA could hold."""
    with pytest.raises(InputError, match="portable: the method has no adapter"):
        _portable.require_expressible(adapters.build(schema.FullAdapter(), 0), make_model("llama"))
