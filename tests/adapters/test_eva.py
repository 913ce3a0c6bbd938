"""EVA's start: components of the inputs as torch and PEFT compute them, and ranks that keep their sum."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lora_variants import Source, difference, ours, stir
from safetensors.torch import load_file
from small import make_model
from toy import write_base, write_recipe

from lora_cli import adapters, pipeline
from lora_cli.adapters import Method, _lora_eva
from lora_cli.adapters._lora_eva import IncrementalSvd
from lora_cli.adapters._low_rank import LoraLinear
from lora_cli.errors import InputError
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.schema import LoraAdapter

INPUTS = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
"""Llama's layers by the tensor they read."""


def started(architecture: str, source: Source | None = None, **values: Any) -> Method:
    """Return the method after its start, injected."""
    method = adapters.build(LoraAdapter(**{"rank": 4, "alpha": 6.0, "init": "eva", **values}), seed=1)
    model = make_model(architecture)
    method.prepare(model, source or Source(architecture))
    method.inject(model)
    return method


def peft_started(architecture: str, monkeypatch: pytest.MonkeyPatch, **values: Any) -> torch.nn.Module:
    """Return PEFT's model after its own EVA on the same batches, with its exact singular values."""
    pca = peft.utils.incremental_pca.IncrementalPCA
    # Its default is a random projection, whose error is not part of the comparison.
    monkeypatch.setattr(pca, "_svd_fn_lowrank", pca._svd_fn_full)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights="eva",
        eva_config=peft.EvaConfig(use_label_mask=False), **values,
    )  # fmt: skip
    model = peft.get_peft_model(make_model(architecture), config)
    loader = [{"input_ids": b.input_ids, "attention_mask": b.attention_mask} for b in Source("llama").fixed]
    peft.initialize_lora_eva_weights(model, loader, show_progress_bar=False)
    return model


@pytest.mark.parametrize(("count", "rank"), [(12, 12), (5, 5)])
def test_batch_by_batch_is_all_at_once(count: int, rank: int) -> None:
    """Components and explained variances of rows in batches are those of torch's SVD of all, where none is cut off."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, rank, generator=generator) * torch.arange(rank, 0, -1)
    rows = rows @ torch.linalg.qr(torch.randn(12, rank, generator=generator)).Q.T + 3.0
    part = IncrementalSvd(count)
    for batch in rows.split([3, 100, 197]):
        part.add(batch)
    _, values, vectors = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False)
    assert float((part.vectors * vectors[:count]).sum(dim=1).abs().min()) >= 1 - 1e-5
    expected = values.square() / values.square().sum()
    assert float((part.ratios() - expected[:count]).abs().max()) <= 1e-6


def test_large_matrices_are_projected() -> None:
    """The random projection finds the space of the exact components, and draws the same one each time."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(900, 700, generator=generator) * 0.9 ** torch.arange(700)
    found = []
    for _ in range(2):
        part = IncrementalSvd(20)
        part.add(rows)
        found.append(part.vectors)
    assert torch.equal(*found)
    exact = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False)[2][:20]
    assert float(torch.linalg.svdvals(exact @ found[0].T).min()) >= 1 - 1e-5


@torch.no_grad()
def test_ranks_and_spaces_are_pefts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks (of layers that read the same tensor in any order), scales and the spaces of A are those PEFT computes."""
    method, theirs = started("llama"), peft_started("llama", monkeypatch)
    found = {path: theirs.get_submodule(f"base_model.model.{path}") for path in method.layers}
    assert sum(len(layer.lora_A) for layer in method.layers.values()) == 4 * 14
    for number in range(2):
        for kinds in INPUTS:
            paths = [path for path in method.layers if f".{number}." in path and path.endswith(kinds)]
            ours_, others = (
                sorted((factor for factor in factors), key=len)
                for factors in (
                    [method.layers[path].lora_A for path in paths],
                    [found[path].lora_A["default"].weight for path in paths],
                )
            )
            assert [len(a) for a in ours_] == [len(a) for a in others]
            for mine, other in zip(ours_, others, strict=True):
                assert float(torch.linalg.svdvals(mine @ other.T).min()) >= 1 - 1e-5  # cosines of the angles
            assert all(method.layers[path].scale == found[path].scaling["default"] for path in paths)
    assert len({len(layer.lora_A) for layer in method.layers.values()}) > 2


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@torch.no_grad()
def test_the_sum_of_ranks_and_each_scale_stay(architecture: str, scaling: str) -> None:
    """Whatever rho, ranks sum to what they were, none is above its limit, and no update is scaled otherwise."""
    plain = adapters.build(LoraAdapter(rank=4, alpha=6.0, scaling=scaling), seed=1)
    plain.inject(make_model(architecture))
    scale = next(iter(plain.layers.values())).scale
    for rho in (1.5, 8.0):
        method = started(architecture, eva_rho=rho, scaling=scaling)
        ranks = [len(layer.lora_A) for layer in method.layers.values()]
        assert sum(ranks) == 4 * len(plain.layers)
        assert max(ranks) <= 4 * rho
        assert all(layer.scale == pytest.approx(scale, rel=1e-12) for layer in method.layers.values())
        for layer in method.layers.values():
            assert isinstance(layer, LoraLinear)
            assert not bool(layer.lora_B.any())
            assert float((layer.lora_A @ layer.lora_A.T - torch.eye(len(layer.lora_A))).abs().max()) <= 1e-5
    assert set(ranks) != {4}
    assert {len(layer.lora_A) for layer in started(architecture, eva_rho=1.0).layers.values()} == {4}


def test_a_layer_without_a_rank_has_no_adapter() -> None:
    """Rank 0 leaves a layer as it is; it is a target no more, and its number is part of what a checkpoint keeps."""
    model, method = ours("eva, many ranks to few layers", "llama")
    state = method.state_dict()["eva_ranks"].tolist()
    assert state.count(0) == len(state) - len(method.layers) > 0
    assert sum(state) == len(state)
    assert sum(isinstance(module, LoraLinear) for module in model.modules()) == len(method.layers)


@torch.no_grad()
def test_padding_does_not_count() -> None:
    """Batches padded further, with another token, give the same ranks and spaces."""
    source, wider = Source("llama"), Source("llama")
    for batch in wider.fixed:
        more = (len(batch.rows), 7)
        batch.input_ids = torch.cat([batch.input_ids, torch.full(more, 5)], dim=1)
        batch.attention_mask = torch.cat([batch.attention_mask, torch.zeros(more, dtype=torch.int64)], dim=1)
    one, other = started("llama", source), started("llama", wider)
    assert one.eva_ranks == other.eva_ranks
    for path, layer in one.layers.items():
        assert float(torch.linalg.svdvals(layer.lora_A @ other.layers[path].lora_A.T).min()) >= 1 - 1e-5


def test_all_processes_take_the_main_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks and A are computed from what the main process has, not from a process's own components."""
    main, other = Source("llama"), Source("llama")
    kept: list[torch.Tensor] = []
    monkeypatch.setattr(main, "agree", lambda tensors: kept.extend(tensor.clone() for tensor in tensors))
    reference = started("llama", main)

    def agree(tensors: Sequence[torch.Tensor]) -> None:
        for tensor, wanted in zip(tensors, kept, strict=True):
            tensor.copy_(wanted)

    monkeypatch.setattr(other, "agree", agree)
    other.fixed = other.fixed[::-1]
    method = started("llama", other)
    assert method.eva_ranks == reference.eva_ranks
    for path, layer in method.layers.items():
        assert torch.equal(layer.lora_A, reference.layers[path].lora_A)


def test_pefts_own_adapter_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What PEFT's EVA wrote, with the settings of its start, has PEFT's logits to 1e-5."""
    theirs = peft_started("llama", monkeypatch).eval()
    stir(parameter for parameter in theirs.parameters() if parameter.requires_grad)
    theirs.save_pretrained(tmp_path)
    model = make_model("llama")
    adapters.load(tmp_path, model)
    assert difference(model, theirs) <= 1e-5


def test_a_resumed_run_asks_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Continued from step 2, a run takes ranks and A from the checkpoint, and ends in the same one, bit for bit."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    block = {"method": "lora", "rank": 3, "init": "eva", "freeze_a": True, "alpha": 6.0}
    path = write_recipe(
        tmp_path / "job",
        write_base(tmp_path / "base"),
        adapter=block,
        train__max_steps=4,
        train__save_every=2,
    )
    run = tmp_path / "job" / "run"
    pipeline.train(load_recipe(path))
    shutil.move(run / "checkpoints" / "step-4", tmp_path / "straight")
    (run / "summary.json").unlink()
    shutil.move(run / "adapter", tmp_path / "adapter")
    monkeypatch.setattr(_lora_eva, "start", None)
    pipeline.train(load_recipe(path), resume=True)
    for name in ("optimizer.safetensors", "method.safetensors"):
        straight, resumed = (
            load_file(tmp_path / "straight" / name),
            load_file(run / "checkpoints/step-4" / name),
        )
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(resumed[key], value) for key, value in straight.items())
    assert (run / "adapter/adapter_config.json").read_text() == (
        tmp_path / "adapter/adapter_config.json"
    ).read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter={eva_rho: 1.5}", "adapter.eva_rho: found 1.5, but init is default (set adapter.init: eva"),
        ("adapter={init: eva, eva_rho: 0.5}", "adapter.eva_rho: found 0.5 (must be"),
        ("adapter={init: eva, rho: 2}", "did you mean adapter.eva_rho"),
    ],
)
def test_faulty_keys_are_told_by_name(override: str, message: str) -> None:
    """EVA's keys are refused without EVA and beyond their bounds."""
    with pytest.raises(InputError) as caught:
        load_recipe(None, [override])
    assert message in str(caught.value)


def test_more_directions_than_an_input_has_are_refused() -> None:
    """A rank above a layer's input is refused with the module and both numbers."""
    with pytest.raises(InputError, match=r"eva takes 33 directions of the input of .*q_proj, which has 32"):
        started("llama", rank=33)
