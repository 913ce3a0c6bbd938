"""VeRA's algebra and its shared matrices, its disk format and its training against PEFT's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import make_model, make_rows
from torch import nn

from lora_cli import adapters
from lora_cli.adapters import _peft
from lora_cli.adapters.vera import Projections, Vera, VeraLinear
from lora_cli.errors import InputError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.objectives.sft import Sft
from lora_cli.runtime.optim import MasterAdamW
from lora_cli.types import Progress

TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj", "up_proj"],
    "gpt2": ["c_attn", "c_fc"],
}


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """Return the logits of fixed tokens."""
    return model(input_ids=torch.arange(1, 41).view(2, 20), use_cache=False).logits


def injected(architecture: str, targets: Any = "all-linear", **settings: Any) -> tuple[nn.Module, Vera]:
    """Return a model with VeRA of rank 16 in it."""
    model = make_model(architecture)
    method = Vera(**{"rank": 16, "targets": targets} | settings)
    method.inject(model)
    return model, method


def randomise(parameters: dict[str, nn.Parameter]) -> None:
    """Give the vectors values as training might."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name in sorted(parameters):
            parameters[name].normal_(std=0.3)


def peft_model(architecture: str, targets: Any, **settings: Any) -> peft.PeftModel:
    """Return PEFT's VeRA on the same base."""
    config = peft.VeraConfig(
        r=16, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=architecture == "gpt2", **settings
    )
    return peft.get_peft_model(make_model(architecture), config)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_forward_is_the_papers_equation() -> None:
    """h = W x + b + Lambda_b B Lambda_d A x (arXiv 2310.11454, eq. 2), computed by hand from sliced matrices."""
    shared = Projections()
    shared.draw(4, 8, 6, seed=0, device=torch.device("cpu"))
    base = nn.Linear(5, 3)
    layer = VeraLinear(base, shared, rank=4)
    randomise(dict(layer.named_parameters(recurse=False)))
    a, b = shared.vera_A[:, :5], shared.vera_B[:3]
    x = torch.randn(4, 5)
    by_hand = torch.stack(
        [
            base.weight @ row
            + base.bias
            + torch.diag(layer.vera_lambda_b) @ b @ torch.diag(layer.vera_lambda_d) @ a @ row
            for row in x
        ]
    )
    torch.testing.assert_close(layer(x), by_hand)


def test_dropout_acts_only_in_training() -> None:
    """Dropout zeroes adapter inputs while training, never in evaluation, and never in the base path."""
    shared = Projections()
    shared.draw(4, 64, 64, seed=0, device=torch.device("cpu"))
    layer = VeraLinear(nn.Linear(64, 64), shared, rank=4, dropout=0.5)
    x = torch.randn(2, 64)
    layer.train()
    assert torch.equal(layer(x), layer.base(x))
    randomise(dict(layer.named_parameters(recurse=False)))
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize("seed", [0, 11])
@pytest.mark.parametrize("targets", ["all-linear", "names"])
def test_the_shared_matrices_are_pefts(architecture: str, targets: str, seed: int) -> None:
    """The matrices equal those that PEFT draws from the same key for the same targets, bit for bit."""
    names = TARGETS[architecture] if targets == "names" else targets
    _, method = injected(architecture, names, projection_seed=seed)
    theirs = peft_model(architecture, names, projection_prng_key=seed).base_model
    assert torch.equal(method.projections.vera_A, theirs.vera_A["default"])
    assert torch.equal(method.projections.vera_B, theirs.vera_B["default"])


def test_the_matrices_are_held_once() -> None:
    """All layers compute with views of one pair of matrices, in the base's dtype too, in the backward pass as well."""
    model = make_model("llama", torch.bfloat16)
    method = Vera(rank=16)
    method.inject(model)
    assert all(layer.projections is method.projections for layer in method.layers.values())
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        model(input_ids=torch.arange(1, 41).view(2, 20), use_cache=False).logits.sum().backward()
    for matrix in (method.projections.cast_a(torch.bfloat16), method.projections.vera_B):
        views = [t for t in saved if t.untyped_storage().data_ptr() == matrix.untyped_storage().data_ptr()]
        assert len(views) >= len(method.layers) - 3  # q, k and v of the first layer have no input to train


@pytest.mark.parametrize(
    ("rank", "targets", "limit"), [(49, "all-linear", 48), (33, ["q_proj"], 32), (17, ["k_proj"], 16)]
)
def test_a_rank_beyond_the_layers_is_refused(rank: int, targets: Any, limit: int) -> None:
    """A rank above what the largest target has is refused with the numbers; at the limit it is not."""
    injected("llama", targets, rank=limit)
    with pytest.raises(InputError, match=rf"adapter\.rank: found {rank}, .*use at most {limit}"):
        injected("llama", targets, rank=rank)


@pytest.mark.filterwarnings("ignore:Specified to not")
@pytest.mark.parametrize("saved", [True, False])
def test_peft_reads_ours(tmp_path: Path, architecture: str, saved: bool) -> None:
    """PEFT loads our adapter, with its matrices or without, with logits equal to ours to 1e-5, and the same keys."""
    live, method = injected(architecture, TARGETS[architecture], projection_seed=5, save_projection=saved)
    randomise(method.trainable(live))
    _peft.write(tmp_path, method, base_name="base", revision=None)
    loaded = peft.PeftModel.from_pretrained(make_model(architecture), tmp_path).eval()
    assert float((logits(loaded) - logits(live)).abs().max()) <= 1e-5
    written = set(load_file(tmp_path / _peft.TENSOR_FILE))
    assert set(peft.get_peft_model_state_dict(loaded)) == written
    assert ("base_model.vera_A" in written) == saved


@pytest.mark.filterwarnings("ignore:Specified to not")
@pytest.mark.parametrize("saved", [True, False])
def test_ours_reads_pefts(tmp_path: Path, architecture: str, saved: bool) -> None:
    """We load PEFT's adapter, with its matrices or without, with logits equal to PEFT's to 1e-5."""
    live = peft_model(architecture, TARGETS[architecture], projection_prng_key=5, save_projection=saved)
    randomise(trained(live))
    live.eval().save_pretrained(tmp_path)
    model = make_model(architecture)
    assert isinstance(adapters.load(tmp_path, model), Vera)
    assert float((logits(model) - logits(live)).abs().max()) <= 1e-5
    assert float((logits(model) - logits(make_model(architecture))).abs().max()) > 0.01


def test_saved_matrices_win_over_the_seed(tmp_path: Path) -> None:
    """Matrices on disk are used as they are, whatever this torch would draw from the key, and at any rank."""
    live, method = injected("llama", rank=40)
    randomise(method.trainable(live))
    with torch.no_grad():
        method.projections.vera_A.mul_(2.0)
        method.projections.vera_B.neg_()
    _peft.write(tmp_path, method, base_name="base", revision=None)
    model = make_model("llama")
    adapters.load(tmp_path, model)
    assert torch.equal(logits(model), logits(live))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 0}, "r is 0"),
        ({"projection_prng_key": "x"}, "projection_prng_key is 'x'"),
        ({"projection_prng_key": 2**64}, "expected an integer from 0"),
        ({"save_projection": 1}, "save_projection is 1"),
        ({"save_projection": False}, "unexpected tensors: 2, first base_model.vera_A"),
        ({"bias": "vera_only"}, "bias is 'vera_only'"),
        ({"r": 8}, "has shape"),
        ({"vera_dropout": 1.0}, "vera_dropout is 1.0"),
    ],
)
def test_a_faulty_adapter_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """A setting that does not hold, or not with the tensors, is refused and named."""
    _, method = injected("llama", ["q_proj"])
    _peft.write(tmp_path, method, base_name="base", revision=None)
    path = tmp_path / _peft.CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError) as caught:
        adapters.load(tmp_path, make_model("llama"))
    assert message in str(caught.value)


def test_missing_matrices_are_refused(tmp_path: Path) -> None:
    """An adapter that says its matrices are saved, and does not have them, is refused."""
    _, method = injected("llama", ["q_proj"])
    _peft.write(tmp_path, method, base_name="base", revision=None)
    tensors = load_file(tmp_path / _peft.TENSOR_FILE)
    del tensors["base_model.vera_B"]
    save_file(tensors, tmp_path / _peft.TENSOR_FILE)
    with pytest.raises(InputError, match=r"missing tensors: 1, first base_model\.vera_B"):
        adapters.load(tmp_path, make_model("llama"))


@pytest.mark.parametrize("saved", [True, False])
def test_the_state_restores_the_matrices(saved: bool) -> None:
    """A checkpoint brings back the matrices a run had, where they are saved; else the seed does."""
    _, first = injected("llama", projection_seed=1, save_projection=saved)
    _, second = injected("llama", projection_seed=2 if saved else 1, save_projection=saved)
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    assert bool(first.state_dict()) == saved
    assert torch.equal(first.projections.vera_A, second.projections.vera_A)
    assert torch.equal(first.projections.vera_B, second.projections.vera_B)


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_loss_curve_equals_pefts(architecture: str) -> None:
    """30 steps in fp32 follow PEFT's VeRA on the same rows to 1e-4 at every step, each from its own initialisation."""
    rows = make_rows(120, seed=9)
    model, method = injected(architecture, TARGETS[architecture], projection_seed=3)
    adapted, objective = AdaptedModel(model, method.layers), Sft(pad_id=0)
    optimizer = MasterAdamW(method.trainable(model))
    other = peft_model(architecture, TARGETS[architecture], projection_prng_key=3)
    theirs = torch.optim.AdamW(trained(other).values(), lr=2e-2, weight_decay=0.0, foreach=False)
    model.train()
    other.train()
    for step in range(30):
        (batch,) = objective.micro_batches(
            adapted, list(enumerate(rows[4 * step : 4 * step + 4])), Progress(step, 30), tokens=10_000
        )
        loss = objective.loss_sum(adapted, batch)[0] / objective.units(batch)
        loss.backward()
        optimizer.step(2e-2)
        optimizer.zero_grad()
        expected = other(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss
        expected.backward()
        theirs.step()
        theirs.zero_grad()
        assert abs(loss.item() - expected.item()) / expected.item() <= 1e-4, step
