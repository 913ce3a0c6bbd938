"""DoRA's algebra and its norm, its disk format and its training against PEFT's."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from small import make_model, make_rows
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lora_cli import adapters
from lora_cli.adapters import _peft, dora
from lora_cli.adapters._base import BaseLinear
from lora_cli.adapters.dora import Dora, DoraLinear
from lora_cli.adapters.lora import Lora
from lora_cli.errors import InputError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.models.nf4 import Quantization, QuantizedLinear
from lora_cli.objectives.sft import Sft
from lora_cli.runtime.optim import MasterAdamW
from lora_cli.types import Progress


def random_layer(base: BaseLinear | None = None, *, dropout: float = 0.0, std: float = 0.3) -> DoraLinear:
    """Return a layer with an update and lengths that differ from the norms."""
    torch.manual_seed(0)
    layer = DoraLinear(base or nn.Linear(12, 9), rank=3, alpha=6.0, dropout=dropout)
    layer.reset(0)
    with torch.no_grad():
        layer.lora_B.normal_(std=std)
        layer.lora_magnitude_vector.mul_(torch.rand(layer.out_features) + 0.5)
    return layer


def direct_norm(layer: DoraLinear) -> torch.Tensor:
    """Return the norm of each row of the whole matrix, (out,) float64."""
    update = layer.scale * (layer.lora_B.double() @ layer.lora_A.double())
    return torch.linalg.vector_norm(layer.base_weight().double() + update, dim=1)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """Return the logits of fixed tokens."""
    return model(input_ids=torch.arange(1, 41).view(2, 20), use_cache=False).logits


def test_forward_and_gradients_are_the_papers() -> None:
    """Output and all gradients equal autograd's of eq. 5 with the norm held constant and the bias outside."""
    layer = random_layer()
    x = torch.randn(2, 5, 12, requires_grad=True)
    names = ["lora_A", "lora_B", "lora_magnitude_vector"]
    inputs = [x, *(getattr(layer, name) for name in names)]
    seed = torch.randn(2, 5, 9)
    ours = layer(x)
    gradients = torch.autograd.grad(ours, inputs, seed)
    weight = layer.base.weight + layer.scale * (layer.lora_B @ layer.lora_A)
    norm = torch.linalg.vector_norm(weight, dim=1).detach()
    theirs = F.linear(x, (layer.lora_magnitude_vector / norm)[:, None] * weight, layer.base.bias)
    torch.testing.assert_close(ours, theirs)
    for mine, expected in zip(gradients, torch.autograd.grad(theirs, inputs, seed), strict=True):
        torch.testing.assert_close(mine, expected)


def test_a_trained_bias_gets_its_gradient() -> None:
    """The bias is not scaled, so its gradient is the plain sum of the output's."""
    layer = random_layer()
    assert layer.train_bias()
    assert layer.bias is not None
    layer(torch.randn(4, 12)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((9,), 4.0))


def test_dropout_leaves_the_base_path_alone() -> None:
    """While training, dropout acts on the low-rank path only, and never in evaluation."""
    layer = random_layer(dropout=0.5)
    x = torch.randn(4, 12)
    assert torch.equal(layer.eval()(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    with torch.no_grad():
        layer.lora_B.zero_()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("base", [nn.Linear(700, 2000), Conv1D(2000, 700)], ids=["linear", "conv1d"])
def test_the_norm_is_that_of_the_whole_matrix(base: nn.Linear | Conv1D) -> None:
    """The norm by its three terms equals the whole matrix' in float64 to 1e-6, over several blocks of rows."""
    layer = random_layer(base)
    torch.testing.assert_close(layer.row_norm().double(), direct_norm(layer), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("form", ["full", "dequantized"])
def test_another_base_has_another_norm(form: str) -> None:
    """Placed around a dense base, as an export does, a layer of an NF4 base takes the new base's norm, and back."""
    original = nn.Linear(64, 48)
    packed = QuantizedLinear.of(original, Quantization("nf4"))
    layer, x = random_layer(packed), torch.randn(4, 64)
    before = layer.row_norm().clone()
    layer.base = original if form == "full" else packed.dense()
    torch.testing.assert_close(layer.row_norm().double(), direct_norm(layer), rtol=1e-6, atol=0.0)
    assert torch.equal(layer.row_norm(), before) is (form == "dequantized")
    torch.testing.assert_close(layer(x), F.linear(x, layer.merged_weight(), layer.base.bias))
    layer.base = packed
    assert torch.equal(layer.row_norm(), before)


@pytest.mark.parametrize("left", [0.5, 0.32, 0.31, 1e-1, 1e-2, 1e-3, 1e-5])
def test_the_norm_survives_cancellation(left: float) -> None:
    """Rows that an update opposite to them all but removes keep a norm right to float32's rounding of the row."""
    layer = random_layer(nn.Linear(256, 64, bias=False))
    with torch.no_grad():  # rank 3: the base is made of what A spans, so that B can cancel it
        parts = torch.randn(64, 3) * 40.0
        layer.base.weight.copy_(layer.scale * parts @ layer.lora_A)
        fresh = DoraLinear(layer.base, rank=3, alpha=6.0)
        fresh.lora_A.copy_(layer.lora_A)
        fresh.lora_B.copy_(-(1 - left) * parts)
        fresh.lora_B[::2] = parts[::2]  # every other row is doubled instead
    rounding = 4e-7 * fresh.base.weight.norm(dim=1).double()
    error = (fresh.row_norm().double() - direct_norm(fresh)).abs()
    assert bool((error <= rounding).all())


def test_a_row_of_zeros_stays_finite() -> None:
    """A base row of zeros gives the bias, and finite gradients, before and after an update."""
    base = nn.Linear(12, 9)
    with torch.no_grad():
        base.weight[4] = 0.0
    layer = DoraLinear(base, rank=3, alpha=6.0)
    layer.reset(0)
    x = torch.randn(4, 12)
    assert torch.equal(layer(x), base(x))
    optimizer = MasterAdamW(dict(layer.named_parameters(recurse=False)))
    for _ in range(3):
        layer(x).square().sum().backward()
        optimizer.step(1e-2)
        optimizer.zero_grad()
    assert bool(torch.isfinite(layer(x)).all())


def test_the_norm_is_computed_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward passes share one norm until A or B changes: by an optimizer's step, by loading, by hand."""
    layer = random_layer()
    calls: list[int] = []
    compute = dora._compute_row_norms
    monkeypatch.setattr(dora, "_compute_row_norms", lambda layers: calls.append(1) or compute(layers))
    optimizer = MasterAdamW(dict(layer.named_parameters(recurse=False)))
    state = {name: value.clone() for name, value in optimizer.state_dict().items()}

    def is_right() -> bool:
        return torch.allclose(layer.row_norm().double(), direct_norm(layer), rtol=1e-6, atol=0.0)

    for step in range(3):
        for _ in range(4):
            layer(torch.randn(2, 12)).sum().backward()
        layer.eval()(torch.randn(2, 12))
        assert is_right()
        assert len(calls) == step + 1
        optimizer.step(1e-1)
    optimizer.load_state_dict(state)
    assert is_right()
    layer.merge()
    layer.unmerge()
    assert is_right()
    with torch.no_grad():
        layer.lora_A.mul_(3.0)
    assert is_right()
    assert len(calls) == 5


def test_norms_are_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a step the first forward pass computes the norms of all layers, of whatever shape, each as if alone."""
    model = make_model("llama")
    method = Dora(rank=4, alpha=6.0, targets="all-linear", seed=1)
    layers = [layer for layer in method.inject(model).values() if isinstance(layer, DoraLinear)]
    assert len({layer.base_weight().shape for layer in layers}) > 1
    calls: list[int] = []
    compute = dora._compute_row_norms
    monkeypatch.setattr(dora, "_compute_row_norms", lambda some: calls.append(len(some)) or compute(some))
    torch.manual_seed(7)
    with torch.no_grad():
        for layer in layers:
            layer.lora_B.normal_(std=0.1)
        # A row that nearly cancels, in one layer of a group.
        layers[0].lora_A[1:] = 0.0
        layers[0].lora_A[0] = layers[0].base_weight()[2]
        layers[0].lora_B[2, 0] = -0.95 / layers[0].scale
    model(torch.arange(6)[None])
    assert calls == [len(layers)]
    for layer in layers:
        assert torch.allclose(layer.row_norm().double(), direct_norm(layer), rtol=1e-5, atol=0.0)
        alone = layer.row_norm().clone()
        layer.siblings, layer._norm = [layer], None
        assert torch.allclose(layer.row_norm(), alone, rtol=1e-6, atol=0.0)


def test_no_whole_matrix_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither forward nor backward pass asks for the merged matrix, and W is float32 only in blocks of rows."""
    layer = random_layer(nn.Linear(2048, 1500, dtype=torch.bfloat16))
    monkeypatch.setattr(DoraLinear, "merged_weight", None)
    assert max(block.numel() for _, block in layer.row_blocks()) <= 2**20
    layer(torch.randn(3, 2048, dtype=torch.bfloat16)).sum().backward()


TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj", "up_proj"],
    "gpt2": ["c_attn", "c_fc"],
}


def peft_config(architecture: str, rank: int = 4) -> peft.LoraConfig:
    """Return PEFT's DoRA settings."""
    return peft.LoraConfig(
        r=rank, lora_alpha=6, target_modules=TARGETS[architecture], task_type="CAUSAL_LM", use_dora=True,
        fan_in_fan_out=architecture == "gpt2",
    )  # fmt: skip


def ours(folder: Path, architecture: str) -> nn.Module:
    """Write an adapter with a real update by our code and return the live model."""
    model = make_model(architecture)
    method = Dora(rank=4, alpha=6.0, targets=TARGETS[architecture], seed=1)
    torch.manual_seed(7)
    with torch.no_grad():
        for layer in method.inject(model).values():
            assert isinstance(layer, DoraLinear)
            layer.lora_B.normal_(std=0.1)
            layer.lora_magnitude_vector.mul_(torch.rand(layer.out_features) + 0.5)
    _peft.write(folder, method, base_name="base", revision=None)
    return model


def test_peft_reads_ours(tmp_path: Path, architecture: str) -> None:
    """PEFT loads our adapter with logits equal to ours to 1e-5, and would write the same keys."""
    live = ours(tmp_path, architecture)
    loaded = peft.PeftModel.from_pretrained(make_model(architecture), tmp_path).eval()
    assert float((logits(loaded) - logits(live)).abs().max()) <= 1e-5
    assert set(peft.get_peft_model_state_dict(loaded)) == set(load_file(tmp_path / _peft.TENSOR_FILE))
    assert loaded.peft_config["default"].use_dora is True


def test_ours_reads_pefts(tmp_path: Path, architecture: str) -> None:
    """We load PEFT's adapter, as DoRA, with logits equal to PEFT's to 1e-5."""
    live = peft.get_peft_model(make_model(architecture), peft_config(architecture)).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
            elif "magnitude" in name:
                parameter.mul_(torch.rand(parameter.shape) + 0.5)
    live.save_pretrained(tmp_path)
    model = make_model(architecture)
    assert type(adapters.load(tmp_path, model)) is Dora
    assert float((logits(model) - logits(live)).abs().max()) <= 1e-5
    assert float((logits(model) - logits(make_model(architecture))).abs().max()) > 0.01


@pytest.mark.parametrize(("before", "value"), [(Dora, False), (Lora, True), (Dora, "yes")])
def test_lora_and_dora_are_not_mistaken(tmp_path: Path, before: type[Lora], value: object) -> None:
    """A DoRA adapter is not read as LoRA, nor the other way round, nor is a switch that is neither."""
    method = before(rank=4, alpha=6.0, targets=["q_proj"])
    method.inject(make_model("llama"))
    _peft.write(tmp_path, method, base_name="base", revision=None)
    path = tmp_path / _peft.CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": value}))
    with pytest.raises(InputError, match=r"unexpected tensors: 2|missing tensors: 2|use_dora is 'yes'"):
        adapters.load(tmp_path, make_model("llama"))


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_loss_curve_equals_pefts(architecture: str) -> None:
    """30 steps in fp32 follow PEFT's DoRA on the same rows and initialisation to 1e-4 at every step, with biases."""
    rows = make_rows(120, seed=9)
    model = make_model(architecture)
    method = Dora(rank=4, alpha=6.0, targets=TARGETS[architecture], seed=2)
    method.inject(model)
    adapted, objective = AdaptedModel(model, method.layers), Sft(pad_id=0)
    optimizer = MasterAdamW(method.trainable(model))
    other = peft.get_peft_model(make_model(architecture), peft_config(architecture))
    with torch.no_grad():
        for path, layer in method.layers.items():
            assert isinstance(layer, DoraLinear)
            other.get_submodule(f"base_model.model.{path}").lora_A["default"].weight.copy_(layer.lora_A)
    trained = [p for p in other.parameters() if p.requires_grad]
    theirs = torch.optim.AdamW(trained, lr=5e-3, weight_decay=0.0, foreach=False)
    model.train()
    other.train()
    for step in range(30):
        (batch,) = objective.micro_batches(
            adapted, list(enumerate(rows[4 * step : 4 * step + 4])), Progress(step, 30), tokens=10_000
        )
        loss = objective.loss_sum(adapted, batch)[0] / objective.units(batch)
        loss.backward()
        optimizer.step(5e-3)
        optimizer.zero_grad()
        expected = other(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss
        expected.backward()
        theirs.step()
        theirs.zero_grad()
        assert abs(loss.item() - expected.item()) / expected.item() <= 1e-4, step


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_rslora", True),
        ("bias", "lora_only"),
        ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 2}),
        ("layers_to_transform", [0]),
        ("modules_to_save", ["norm"]),
    ],
)
def test_loras_variants_are_refused(tmp_path: Path, key: str, value: object) -> None:
    """What LoRA can read and DoRA does not implement is refused by name."""
    method = Dora(rank=4, alpha=6.0, targets=["q_proj"])
    method.inject(make_model("llama"))
    _peft.write(tmp_path, method, base_name="base", revision=None)
    path = tmp_path / _peft.CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(InputError, match=f"{key} is "):
        adapters.load(tmp_path, make_model("llama"))
