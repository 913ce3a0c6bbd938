"""ReLoRA's restarts, its jagged schedule, what they do to the optimizer, and its export as one LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import exporting
import peft
import pytest
import torch
from small import make_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_cli import adapters
from lora_cli.adapters._base import Method
from lora_cli.adapters._low_rank import LoraLinear
from lora_cli.adapters._portable import truncate
from lora_cli.adapters.lora import Lora
from lora_cli.adapters.relora import Relora, ReloraLinear, prune
from lora_cli.errors import InputError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.runtime.optim import MasterAdamW
from lora_cli.types import Progress

BASES = {"linear": (nn.Linear, 24, 16, False), "bias": (nn.Linear, 16, 24), "conv1d": (Conv1D, 16, 24)}


@pytest.fixture(params=sorted(BASES))
def layer(request: pytest.FixtureRequest) -> ReloraLinear:
    """Return a layer with a live update on each kind of base in turn."""
    torch.manual_seed(0)
    kind, *shape = BASES[request.param]
    base = kind(*shape).requires_grad_(False)
    if base.bias is not None:  # Conv1D's starts at zero
        nn.init.normal_(base.bias)
    made = ReloraLinear(base, rank=4, alpha=6.0)
    made.reset(1)
    nn.init.normal_(made.lora_B)
    return made


def restart(made: ReloraLinear, times: int, std: float = 1.0) -> None:
    """Restart a layer and give it a new live update, as often as said."""
    for _ in range(times):
        made.restart(seed=10 + len(made.past_A))
        nn.init.normal_(made.lora_B, std=std)


@torch.no_grad()
@pytest.mark.parametrize("before", [0, 1, 3, 6])
def test_a_restart_changes_no_output(layer: ReloraLinear, before: int) -> None:
    """A restart leaves output and merged weight as they are, to 1e-6 of their size, however many came before."""
    x = torch.randn(8, layer.in_features)
    restart(layer, before)
    output, weight, live = layer(x), layer.merged_weight(), layer.lora_A.clone()
    layer.restart(seed=99)
    assert float((layer(x) - output).abs().max()) <= 1e-6 * float(output.abs().max())
    assert float((layer.merged_weight() - weight).abs().max()) <= 1e-6 * float(weight.abs().max())
    assert not layer.lora_B.any()
    assert not torch.equal(layer.lora_A, live)
    if before < 4:
        assert len(layer.past_A) == 4 * (before + 1)
        assert layer.past_delta is None
    else:  # wider than the smaller side of 16, the factors are multiplied out
        assert len(layer.past_A) == 0
        assert layer.past_delta is not None


@torch.no_grad()
def test_merged_is_forward_after_restarts(layer: ReloraLinear) -> None:
    """The merged weight in a plain product gives the layer's output; the base keeps its bits, and is the reference."""
    base = layer.base.weight.clone()
    x = torch.randn(8, layer.in_features)
    plain = layer.base(x)
    restart(layer, times=3)
    output = nn.functional.linear(x, layer.merged_weight(), layer.base.bias)
    torch.testing.assert_close(layer(x), output, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.base.weight, base)
    layer.enabled = False
    assert torch.equal(layer(x), plain)


@torch.no_grad()
def test_the_sum_outgrows_one_rank(layer: ReloraLinear) -> None:
    """After two restarts the update has rank 3 x 4 by its singular values, where one adapter has 4."""
    for cycles in (1, 2, 3):
        assert torch.linalg.matrix_rank(layer.merged_weight() - layer.base_weight(), rtol=1e-5) == 4 * cycles
        restart(layer, 1)


@torch.no_grad()
def test_small_merges_are_not_rounded_away() -> None:
    """On a bfloat16 base 50 merges, each far below half a unit of the weight's last bit, add up in float32."""
    base = nn.Linear(16, 16, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    base.weight.fill_(1.0)
    layer = ReloraLinear(base, rank=1, alpha=1.0)
    for number in range(50):
        layer.lora_A.fill_(1.0)
        layer.lora_B.fill_(1e-3)
        layer.restart(seed=number)
    torch.testing.assert_close(layer.merged_weight(), torch.full((16, 16), 1.05), rtol=1e-5, atol=0)
    assert float(layer(torch.ones(1, 16, dtype=torch.bfloat16))[0, 0]) == pytest.approx(16.8, rel=2**-8)


@pytest.mark.parametrize(("fraction", "zeros"), [(0.0, 0), (0.9, 180), (0.99, 198), (1.0, 200)])
@pytest.mark.parametrize("seed", [None, 5])
def test_moments_are_pruned_by_the_fraction(fraction: float, zeros: int, seed: int | None) -> None:
    """The stated part of the entries becomes zero in both moments at once; by magnitude, the largest survive."""
    moments = {key: torch.randn(20, 10).abs() + 0.1 for key in ("exp_avg", "exp_avg_sq")}
    moments["exp_avg"] *= torch.where(torch.rand(20, 10) < 0.5, -1.0, 1.0)
    before = {key: value.clone() for key, value in moments.items()}
    prune(moments, fraction, seed)
    kept = moments["exp_avg"] != 0
    assert int((~kept).sum()) == zeros
    for key, value in moments.items():
        assert torch.equal(value != 0, kept)
        assert torch.equal(value[kept], before[key][kept])
    if seed is None and 0 < zeros < 200:
        size = before["exp_avg"].abs()
        assert float(size[kept].min()) >= float(size[~kept].max())


def toy(method: Method, rank: int = 8, steps: int = 400, rate: float = 2e-2) -> tuple[float, MasterAdamW]:
    """Fit a target update of the given rank of one (16, 16) layer; return the last loss and the optimizer."""
    torch.manual_seed(0)
    base = nn.Linear(16, 16, bias=False).requires_grad_(False)
    target = base.weight + torch.randn(16, rank) @ torch.randn(rank, 16) / 16
    layer = method.make_layer("w", base)
    method.layers["w"] = layer
    method.plan(steps)
    optimizer = MasterAdamW(method.trainable(layer))
    for step in range(steps):
        x = torch.randn(64, 16)
        loss = nn.functional.mse_loss(layer(x), x @ target.T)
        loss.backward()
        optimizer.step(rate * (1 - step / steps) * method.schedule_factor(step))
        method.after_step(optimizer, Progress(step, steps))
        optimizer.zero_grad()
    return float(loss.detach()), optimizer


def test_restarts_fit_what_one_adapter_cannot() -> None:
    """In as many steps ReLoRA of rank 2 fits an update of rank 8 to a tenth of the loss of LoRA of rank 2."""
    one, many = toy(Lora(rank=2, alpha=2.0)), toy(Relora(rank=2, alpha=2.0, restart_every=80))
    assert many[0] < 0.1 * one[0]


@pytest.mark.parametrize(
    ("settings", "zeros"),
    [({}, 0.9), ({"reset_fraction": 0.5}, 0.5), ({"reset": "random"}, 0.9), ({"reset": "zero"}, 1.0)],
)
def test_a_restart_prunes_the_optimizer(settings: dict[str, Any], zeros: float) -> None:
    """Right after a restart the stated part of A's and B's moments in AdamW is zero, and B is zero."""
    method = Relora(rank=4, alpha=4.0, restart_every=5, **settings)
    _, optimizer = toy(method, steps=10)
    assert method.restarts == 2
    for name in ("w.lora_A", "w.lora_B"):
        moments = optimizer.moments(name)
        assert set(moments) == {"exp_avg", "exp_avg_sq"}
        for moment in moments.values():
            assert int((moment == 0).sum()) == round(zeros * 64)
    assert not method.trainable(nn.Identity())["w.lora_B"].any()


def test_the_schedule_is_jagged() -> None:
    """The factor is 1 in the first cycle; after each restart it climbs linearly over the re-warm-up, never from 0."""
    method = Relora(rank=1, alpha=1.0, restart_every=6, restart_warmup=3)
    method.plan(20)
    cycle = [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [method.schedule_factor(step) for step in range(20)] == [1.0] * 6 + cycle + cycle + cycle[:2]


@pytest.mark.parametrize(
    ("settings", "steps", "message"),
    [
        ({"restart_every": 100}, 100, r"restart_every: found 100, but the run has 100 steps"),
        ({}, 1, r"restart_every: found null, which gives 1, but the run has 1 steps"),
        ({"restart_warmup": 25}, 100, r"restart_warmup: found 25 steps, but .* every 25 steps \(at most 24"),
    ],
)  # fmt: skip
def test_a_schedule_that_does_not_fit_is_refused(settings: dict[str, int], steps: int, message: str) -> None:
    """At least one restart must come before the end, and a re-warm-up must end within its cycle."""
    with pytest.raises(InputError, match=message):
        Relora(rank=1, alpha=1.0, **settings).plan(steps)


def test_four_cycles_are_the_default() -> None:
    """Without `restart_every` a run of any length has up to four cycles, a restart, and a warm-up that fits."""
    for steps in (2, 3, 7, 100, 1001):
        method = Relora(rank=1, alpha=1.0)
        method.plan(steps)
        restarts = [step for step in range(1, steps) if step % method.every == 0]
        assert 1 <= len(restarts) <= 3
        assert method.warmup < method.every
    assert (method.every, method.warmup) == (251, 25)


def test_truncation_is_the_best_there_is() -> None:
    """The factors' product and error are those of a truncated SVD of the dense product (Eckart-Young)."""
    b, a = torch.randn(20, 12), torch.randn(12, 30)
    u, values, v = torch.linalg.svd(b.double() @ a.double(), full_matrices=False)
    for rank in (1, 5, 11, 12, 40):
        left, right, error = truncate(b, a, rank)
        best = (u[:, :rank] * values[:rank]) @ v[:rank]
        torch.testing.assert_close((left @ right).double(), best, rtol=1e-4, atol=1e-4)
        expected = float(values[rank:].norm() / values.norm()) if rank < 12 else 0.0
        assert error == pytest.approx(expected, rel=1e-5, abs=3e-7)
    assert truncate(torch.zeros(20, 4), a[:4], 2)[2] == 0.0


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Return the logits of fixed tokens."""
    return model(input_ids=torch.arange(4, 44).view(2, 20), use_cache=False).logits.float()


def trained(
    architecture: str, dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[PreTrainedModel, Method]:
    """Return a model after two restarts, with a live update."""
    model = make_model(architecture, dtype)
    method = Relora(rank=4, alpha=8.0, **settings)
    torch.manual_seed(1)
    for made in method.inject(model).values():
        assert isinstance(made, ReloraLinear)
        nn.init.normal_(made.lora_B, std=0.1)
        restart(made, 3, std=0.1)
    return model, method


def write(
    model: PreTrainedModel, method: Method, base: Path, **targets: Path
) -> tuple[dict[str, float], str]:
    """Export and return the measured differences and what was logged."""
    lines: list[str] = []
    return exporting.write(targets, model, method, base, log=lines.append), "\n".join(lines)


def test_both_exports_hold_every_restart(tmp_path: Path, base: Path, architecture: str) -> None:
    """PEFT with our adapter, and transformers with our merged model, have the live logits to 1e-5."""
    model, method = trained(architecture)
    live = logits(model)
    differences, log = write(model, method, base, peft=tmp_path / "adapter", merged=tmp_path / "merged")
    assert max(differences.values()) <= 1e-5
    theirs = peft.PeftModel.from_pretrained(make_model(architecture), tmp_path / "adapter").eval()
    assert float((logits(theirs) - live).abs().max()) <= 1e-5
    assert theirs.peft_config["default"].r == 16
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert float((logits(merged) - live).abs().max()) <= 1e-5
    assert "LORA of rank 16: relative error" in log
    assert torch.equal(logits(model), live)
    with AdaptedModel(model, method.layers).reference():
        assert torch.equal(logits(model), logits(make_model(architecture)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lower_rank_is_written_with_its_error(tmp_path: Path, base: Path, dtype: torch.dtype) -> None:
    """With `export_rank` the adapter is read back as it was meant, and log and card tell what it loses."""
    model, method = trained("qwen2", dtype, export_rank=6)
    live = logits(model)
    differences, log = write(model, method, base, peft=tmp_path / "adapter")
    assert differences["peft"] == 0.0
    for text in (log, (tmp_path / "adapter" / "README.md").read_text()):
        assert "LORA of rank 6: relative error" in text
    again = make_model("qwen2", dtype)
    reloaded = adapters.load(tmp_path / "adapter", again)
    assert float((logits(again) - live).abs().max()) > 0.1
    assert torch.equal(logits(model), live)
    for path, error in method.as_peft()[1].items():
        mine, other = method.layers[path], reloaded.layers[path]
        assert isinstance(other, LoraLinear)
        delta = mine.merged_weight() - mine.base_weight().float()
        rest = mine.merged_weight() - other.merged_weight()
        assert error == pytest.approx(float((rest.norm() / delta.norm()).detach()), rel=1e-3)
        assert 0.1 < error < 0.9


def test_the_state_restores_an_earlier_restart() -> None:
    """Loading a state, also one from before the first restart, gives back its output bit for bit."""
    first, second = Relora(rank=2, alpha=2.0, restart_every=5), Relora(rank=2, alpha=2.0, restart_every=2)
    for method in (first, second):
        toy(method, steps=9)
    x = torch.randn(3, 16)
    state = {key: value.clone() for key, value in first.state_dict().items()}
    assert set(state) == {"restarts", "w.past_A", "w.past_B"}
    assert all(value.dtype == torch.float32 for key, value in state.items() if key != "restarts")
    second.layers["w"].load_state_dict(first.layers["w"].state_dict())
    second.load_state_dict(state)
    assert torch.equal(second.layers["w"](x), first.layers["w"](x))
    fresh = Relora(rank=2, alpha=2.0)
    fresh.layers["w"] = fresh.make_layer("w", nn.Linear(16, 16))
    second.load_state_dict(fresh.state_dict())
    weight = second.layers["w"].merged_weight() - second.layers["w"].base_weight()
    assert torch.linalg.matrix_rank(weight, rtol=1e-4) == 2  # the live update alone is left
