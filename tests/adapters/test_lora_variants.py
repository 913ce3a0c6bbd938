"""LoRA's variants: unchanged at injection, merged as forward, and PEFT's disk format in both directions."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from lora_variants import CASES, base_tensors, difference, logits, ours, stir, theirs
from safetensors.torch import load_file
from small import make_model

from lora_cli import adapters
from lora_cli.adapters import _peft
from lora_cli.adapters._low_rank import LoraLinear
from lora_cli.adapters.lora import Lora
from lora_cli.errors import InputError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.recipe.schema import LoraAdapter


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_unchanged_at_injection_and_merged_as_forward(name: str, architecture: str) -> None:
    """The injected model is the base; moved, its merged weights compute what it does and its base is bit-equal."""
    base = make_model(architecture)
    model, method = ours(name, architecture)
    assert difference(model, base) <= 1e-5
    stir(method.trainable(model).values())
    live = logits(model)
    assert float((live - logits(base)).abs().max()) > 0.01
    for layer in method.placed().values():
        layer.merge()
    assert float((logits(model) - live).abs().max()) <= 1e-5
    for layer in method.placed().values():
        layer.unmerge()
    assert torch.equal(logits(model), live)
    with AdaptedModel(model, method.placed()).reference():
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model), live)
    found = base_tensors(model)
    assert all(torch.equal(found[key], value) for key, value in base.state_dict().items())
    trained = {id(parameter) for parameter in method.trainable(model).values()}
    assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == trained


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_peft_reads_ours_and_we_read_it_back(name: str, architecture: str, tmp_path: Path) -> None:
    """PEFT and we load our file with the live model's logits to 1e-5; PEFT would write the same keys."""
    model, method = ours(name, architecture)
    stir(method.trainable(model).values())
    _peft.write(tmp_path, method, base_name="base", revision=None)
    loaded = peft.PeftModel.from_pretrained(make_model(architecture), tmp_path).eval()
    assert difference(loaded, model) <= 1e-5
    # PEFT adds the base's own table where an embedding is adapted, which we leave out.
    theirs = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert set(theirs) == set(load_file(tmp_path / _peft.TENSOR_FILE))
    loaded.save_pretrained(tmp_path / "again")  # PEFT sorts what it writes
    for folder in (tmp_path, tmp_path / "again"):
        again = make_model(architecture)
        adapters.load(folder, again)
        assert difference(again, model) <= 1e-5


@pytest.mark.parametrize(
    ("name", "architecture"), [case for case in CASES if not case[0].startswith(("pissa", "olora", "eva"))]
)
def test_ours_reads_pefts(name: str, architecture: str, tmp_path: Path) -> None:
    """We load what PEFT wrote of the same variant with its logits to 1e-5, and would have made the same tensors."""
    live = theirs(name, architecture).eval()
    stir(parameter for parameter in live.parameters() if parameter.requires_grad)
    live.save_pretrained(tmp_path)
    model = make_model(architecture)
    adapters.load(tmp_path, model)
    assert difference(model, live) <= 1e-5
    assert difference(model, make_model(architecture)) > 0.01
    tensors = load_file(tmp_path / _peft.TENSOR_FILE)
    tensors = {key: value for key, value in tensors.items() if not key.endswith("base_layer.weight")}
    mine = _peft.places(ours(name, architecture)[1])
    assert {key: value.shape for key, value in mine.items()} == {k: v.shape for k, v in tensors.items()}


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_start_is_pefts(init: str) -> None:
    """B0 A0 is PEFT's to 1e-5, without and with a bias, and PEFT's base plus it is the original base."""
    for architecture in ("llama", "qwen2"):
        _, method = ours(init, architecture)
        other = theirs(init, architecture)
        for path, layer in method.layers.items():
            assert isinstance(layer, LoraLinear)
            module = other.get_submodule(f"base_model.model.{path}")
            start = layer.scale * layer.lora_B @ layer.lora_A
            assert float((start - module.get_delta_weight("default")).abs().max()) <= 1e-5
            assert float((module.base_layer.weight + start - layer.base.weight).abs().max()) <= 1e-5


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pefts_conversion_is_read_and_its_raw_form_refused(init: str, tmp_path: Path) -> None:
    """We read what PEFT converts to plain LoRA to 1e-5, and refuse what fits only the base that PEFT has changed."""
    live = theirs(init, "llama").eval()
    live.peft_config["default"].init_lora_weights = True
    live.save_pretrained(tmp_path / "start")
    live.peft_config["default"].init_lora_weights = init
    stir(parameter for parameter in live.parameters() if parameter.requires_grad)
    live.save_pretrained(tmp_path / "raw")
    with pytest.raises(InputError, match="leaves the base as it is"):
        adapters.load(tmp_path / "raw", make_model("llama"))
    live.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    model = make_model("llama")
    adapters.load(tmp_path / "converted", model)
    assert difference(model, live) <= 1e-5


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_shifted_start_is_exact(init: str, architecture: str) -> None:
    """In float32 and bfloat16 the injected model is the base bit for bit, and dropout does not change that."""
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(architecture, dtype)
        before = logits(model)
        Lora(rank=4, alpha=6.0, init=init, dropout=0.5).inject(model)
        assert torch.equal(logits(model.train()), before)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_frozen_a_is_written_at_its_own_rank(init: str, tmp_path: Path) -> None:
    """With A frozen the file holds A itself and B - B0, of rank r, and no A0 is kept or put into a checkpoint."""
    model = make_model("qwen2")
    method = Lora(rank=4, alpha=6.0, init=init, freeze_a=True, scaling="rslora", rank_pattern={"q_proj": 6})
    method.inject(model)
    start = {path: layer.lora_B.detach().clone() for path, layer in method.layers.items()}
    stir(method.trainable(model).values())
    _peft.write(tmp_path, method, base_name="base", revision=None)
    tensors = load_file(tmp_path / _peft.TENSOR_FILE)
    for path, layer in method.layers.items():
        place = f"{_peft.PREFIX}{path}"
        assert torch.equal(tensors[f"{place}.lora_A.weight"], layer.lora_A)
        assert torch.equal(tensors[f"{place}.lora_B.weight"], layer.lora_B.detach() - start[path])
    assert {name.rpartition(".")[2] for name in method.state_dict()} == {"lora_A", "initial_B"}
    theirs = peft.PeftModel.from_pretrained(make_model("qwen2"), tmp_path).eval()
    assert difference(theirs, model) <= 1e-5


def test_orthogonal_halves() -> None:
    """A and B are not zero, B A is zero to rounding, and the columns of both span orthogonal spaces."""
    _, method = ours("orthogonal", "llama")
    for layer in method.layers.values():
        assert isinstance(layer, LoraLinear)
        assert float(layer.lora_A.std()) > 0.05
        assert float(layer.lora_B.std()) > 0.05
        assert float((layer.lora_B @ layer.lora_A).abs().max()) <= 1e-6


def test_a_rank_that_the_weight_has_not_is_refused() -> None:
    """PiSSA and OLoRA cannot take more directions than a weight has; the module and its shape are named."""
    for init in ("pissa", "olora"):
        with pytest.raises(InputError, match=r"self_attn.k_proj, whose weight \(16, 32\) has 16"):
            adapters.build(LoraAdapter(rank=17, init=init, targets=["k_proj"]), 0).inject(make_model("llama"))
