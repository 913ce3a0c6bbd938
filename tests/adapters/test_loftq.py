"""LoftQ's start: as near to the full weight as its rank allows, on the base as the recipe quantizes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_variants import Source, logits
from safetensors.torch import load_file
from small import make_model
from toy import write_base, write_recipe
from transformers import AutoModelForCausalLM

from lora_cli import adapters, pipeline, without_training
from lora_cli.adapters import Method, _lora_init
from lora_cli.adapters._low_rank import LoraLinear
from lora_cli.errors import InputError
from lora_cli.models.load import load_model
from lora_cli.models.load_quantized import FullWeights
from lora_cli.models.nf4 import Quantization, QuantizedLinear
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.schema import LoraAdapter


def started(architecture: str, form: str = "nf4", **values: Any) -> tuple[Method, list[str]]:
    """Return the method after its start, injected, and what it said."""
    block = LoraAdapter(**{"rank": 4, "alpha": 6.0, "init": "loftq", **values})
    method, model = adapters.build(block, seed=1), make_model(architecture, quantize=form)
    lines = method.prepare(model, Source(architecture))
    method.inject(model)
    return method, lines


@pytest.mark.parametrize("form", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@torch.no_grad()
def test_the_start_is_the_best_of_its_rank(architecture: str, form: str, scaling: str) -> None:
    """||W - (Q + s B A)|| is what torch's singular values beyond the rank leave of W - Q, and that is less than it."""
    full = Source(architecture)
    method, lines = started(architecture, form, scaling=scaling, rank=5)
    errors = []
    for path, layer in method.layers.items():
        assert isinstance(layer, LoraLinear)
        weight = full.full_weight(path)
        missing = weight - layer.base_weight()
        values = torch.linalg.svdvals(missing.double())
        left = float((weight - layer.merged_weight()).double().norm())
        assert left == pytest.approx(float(values[5:].square().sum().sqrt()), rel=1e-4)
        assert left < float(missing.norm()) * 0.95
        errors.append((float(missing.norm() / weight.norm()), left / float(weight.norm())))
        # Each factor holds the root of a singular value, with the scale taken out.
        for factor in (layer.lora_A.norm(dim=1), layer.lora_B.norm(dim=0)):
            assert torch.allclose(factor, (values[:5] / layer.scale).sqrt().float(), rtol=1e-4)
    before, after = (sum(column) / len(errors) for column in zip(*errors, strict=True))
    assert f"{before:.4f} quantized, {after:.4f} with the adapter (mean of {len(errors)} layers)" in lines[0]


def test_the_start_nears_the_full_model() -> None:
    """The logits of the start are nearer to the full model's than those of the quantized base."""
    model = make_model("llama", quantize="nf4")
    method = adapters.build(LoraAdapter(rank=12, alpha=6.0, init="loftq"), seed=1)
    method.prepare(model, Source("llama"))
    full, quantized = logits(make_model("llama")), logits(model)
    method.inject(model)
    assert float((logits(model) - full).norm()) < 0.8 * float((quantized - full).norm())


def test_a_weight_that_lost_nothing_is_left_alone() -> None:
    """Where Q is W, and where W - Q has less than the rank, the start is finite and exact."""
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    a, b, before, after = _lora_init.loftq(weight, weight, 3, 2.0)
    assert not bool((b @ a).any())
    assert (before, after) == (0.0, 0.0)
    change = torch.outer(torch.arange(6.0), torch.ones(9))
    a, b, _, after = _lora_init.loftq(weight + change, weight, 3, 2.0)
    assert after <= 1e-6
    assert float((2.0 * b @ a - change).abs().max()) <= 1e-5


def test_what_is_not_quantized_starts_as_ever() -> None:
    """A head beside quantized targets starts with B zero; with the head alone, or too large a rank, it is refused."""
    method, lines = started("qwen2", targets=["q_proj", "lm_head"])
    assert not bool(method.layers["lm_head"].lora_B.any())
    assert bool(method.layers["model.layers.0.self_attn.q_proj"].lora_B.any())
    assert "mean of 2 layers" in lines[0]
    with pytest.raises(InputError, match="none of the targets is quantized"):
        started("qwen2", targets=["lm_head"])
    with pytest.raises(
        InputError, match=r"loftq takes 17 directions out of .*k_proj, whose weight \(16, 32\)"
    ):
        started("llama", rank=17)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_full_weights_are_those_of_the_files(tmp_path: Path, architecture: str) -> None:
    """Each linear layer's weight is read as it is stored, (out, in), from one file or several."""
    model = make_model(architecture, torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    weights = FullWeights(tmp_path)
    method = adapters.build(LoraAdapter(rank=2), seed=0)
    for path, layer in method.inject(model).items():
        assert torch.equal(weights.read(path), layer.base_weight())
        assert weights.read(path).dtype == torch.bfloat16


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """Return a recipe whose run is finished, the run's summary, and what it logged."""
    folder = tmp_path_factory.mktemp("loftq")
    block = {"method": "qlora", "rank": 4, "init": "loftq", "alpha": 6.0, "dropout": 0.1}
    recipe = write_recipe(
        folder / "job", write_base(folder / "base"), adapter=block, train__max_steps=4, train__save_every=2,
        evaluate__metrics=["loss", "exact_match"],
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_CLI_CACHE", str(folder / "cache"))
        summary = pipeline.train(load_recipe(recipe))
    return recipe, summary, str(folder / "cache")


def test_what_is_exported_is_the_run(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lora-eval` repeats the run's scores; the model card says which base the adapter is for."""
    recipe, summary, cache = job
    monkeypatch.setenv("LORA_CLI_CACHE", cache)
    run = recipe.parent / "run"
    scores = without_training.evaluate(run, load_recipe(run / "recipe.yaml"))
    assert scores == summary["eval"]
    assert "holds a correction of the base's quantization (LoftQ)" in (run / "adapter/README.md").read_text()
    config = json.loads((run / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"], config["rank_pattern"]) == (4, True, {})


def test_a_merge_takes_the_dequantized_base(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured, the dequantized weights are nearer to the live model than the full ones, which are mended twice."""
    recipe, _, cache = job
    monkeypatch.setenv("LORA_CLI_CACHE", cache)
    loaded = load_recipe(recipe.parent / "run" / "recipe.yaml")
    result = without_training.merge(recipe.parent / "run", tmp_path / "merged", loaded)
    measured = result["merge_base"]
    assert measured["chosen"] == "dequantized"
    assert measured["dequantized"]["kl"] < 1e-6 < measured["full"]["kl"]
    live = load_model(
        recipe.parents[1] / "base", dtype=torch.float32, device=torch.device("cpu"),
        quantization=Quantization("nf4"),
    )  # fmt: skip
    adapters.load(recipe.parent / "run" / "adapter", live)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert float((logits(merged) - logits(live.eval())).abs().max()) <= 1e-5
    assert not any(isinstance(module, QuantizedLinear) for module in merged.modules())


def test_a_resumed_run_reads_no_weight_again(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Continued from step 2, a run does not compute the start anew, and ends in the same checkpoint, bit for bit."""
    recipe, _, cache = job
    monkeypatch.setenv("LORA_CLI_CACHE", cache)
    run = shutil.copytree(recipe.parent / "run", tmp_path / "run")
    shutil.move(run / "checkpoints/step-4", tmp_path / "straight")
    shutil.rmtree(run / "adapter")
    (run / "summary.json").unlink()
    monkeypatch.setattr(_lora_init, "loftq_starts", None)
    pipeline.train(load_recipe(recipe, [f"run.output={run}"]), resume=True)
    straight = load_file(tmp_path / "straight/optimizer.safetensors")
    resumed = load_file(run / "checkpoints/step-4/optimizer.safetensors")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(resumed[key], value) for key, value in straight.items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["adapter.init=loftq"],
            "adapter.init: found loftq, which mends a quantized base (set model.quantize",
        ),
        (
            ["adapter={method: qlora, init: loftq}", "export.merge_base=full"],
            "export.merge_base: found full, but loftq's adapter holds a correction",
        ),
        (["adapter.loftq_config={}"], "did you mean adapter.init"),
    ],
)
def test_faulty_keys_are_told_by_name(overrides: list[str], message: str) -> None:
    """LoftQ needs a quantized base, and its adapter is not for the full one."""
    with pytest.raises(InputError) as caught:
        load_recipe(None, overrides)
    assert message in str(caught.value)
