"""LoRA's algebra, its target rules, and its training against PEFT's."""

from __future__ import annotations

import peft
import pytest
import torch
from small import make_model, make_rows
from torch.nn import functional as F

from lora_cli.adapters._low_rank import LoraLinear
from lora_cli.adapters._targets import match_targets
from lora_cli.adapters.lora import Lora
from lora_cli.errors import InputError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.objectives.sft import Sft
from lora_cli.runtime.optim import MasterAdamW
from lora_cli.types import Progress


def test_forward_is_the_papers_equation() -> None:
    """h = W x + b + (alpha / r) B A x (arXiv 2106.09685, eq. 3), computed by hand."""
    base = torch.nn.Linear(5, 3)
    layer = LoraLinear(base, rank=2, alpha=6.0)
    torch.nn.init.normal_(layer.lora_A)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 5)
    by_hand = torch.stack(
        [base.weight @ row + base.bias + 3.0 * (layer.lora_B @ (layer.lora_A @ row)) for row in x]
    )
    torch.testing.assert_close(layer(x), by_hand)


def test_dropout_acts_only_in_training() -> None:
    """Dropout zeroes adapter inputs while training, never in evaluation, and never in the base path."""
    layer = LoraLinear(torch.nn.Linear(64, 64), rank=4, alpha=4.0, dropout=0.5)
    layer.reset(0)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 64)
    assert torch.equal(layer.eval()(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    layer.enabled = False
    assert torch.equal(layer(x), layer.base(x))


LLAMA = "model.layers.{}.{}"
ATTENTION = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
MLP = [f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", [LLAMA.format(layer, name) for layer in (0, 1) for name in ATTENTION + MLP]),
        ("attention", [LLAMA.format(layer, name) for layer in (0, 1) for name in ATTENTION]),
        ("mlp", [LLAMA.format(layer, name) for layer in (0, 1) for name in MLP]),
        (
            ["q_proj", "down_proj"],
            [LLAMA.format(i, n) for i in (0, 1) for n in ("self_attn.q_proj", "mlp.down_proj")],
        ),
        (["layers.1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]),
        (r".*\.0\..*[qv]_proj", [LLAMA.format(0, f"self_attn.{name}_proj") for name in "qv"]),
        (["lm_head"], ["lm_head"]),
    ],
)
def test_targets(targets: str | list[str], expected: list[str]) -> None:
    """Each form of `targets` names the layers it says, in the model's order."""
    assert match_targets(make_model("llama"), targets) == expected


def test_all_linear_is_pefts(architecture: str) -> None:
    """`all-linear` names the layers that PEFT's all-linear names."""
    model = peft.get_peft_model(
        make_model(architecture), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    )
    theirs = {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert set(match_targets(make_model(architecture), "all-linear")) == theirs


@pytest.mark.parametrize(
    ("targets", "hint"),
    [
        (["q_prj"], "did you mean q_proj"),
        (["q_proj", "nothing"], "'nothing' matches no linear layer"),
        ("encoder.*", "its linear layers are named"),
        ("(", "is not a regular expression"),
        (["embed_tokens"], "is an embedding, which this method does not adapt"),
    ],
)
def test_a_target_that_matches_nothing_is_refused(targets: str | list[str], hint: str) -> None:
    """Nothing asked for is skipped silently: each target must match, and the message shows what would."""
    with pytest.raises(InputError) as caught:
        match_targets(make_model("llama"), targets)
    assert hint in str(caught.value)


def test_loss_curve_equals_pefts() -> None:
    """50 steps in fp32 follow an independent PEFT loop on the same rows and initialisation to 1e-4 at every step."""
    rows = make_rows(200, seed=9)
    model = make_model("llama")
    method = Lora(rank=8, alpha=16.0, seed=2)
    method.inject(model)
    adapted, objective = AdaptedModel(model, method.layers), Sft(pad_id=0)
    optimizer = MasterAdamW(method.trainable(model), weight_decay=0.01)

    other = peft.get_peft_model(
        make_model("llama"),
        peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for path, layer in method.layers.items():
            assert isinstance(layer, LoraLinear)
            module = other.get_submodule(f"base_model.model.{path}")
            module.lora_A["default"].weight.copy_(layer.lora_A)
    theirs = torch.optim.AdamW(
        [p for p in other.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.01, foreach=False
    )

    model.train()
    other.train()
    for step in range(50):
        batch_rows = rows[4 * step : 4 * step + 4]
        batches = objective.micro_batches(adapted, list(enumerate(batch_rows)), Progress(step, 50), tokens=60)
        units = sum(map(objective.units, batches))
        ours = 0.0
        for batch in batches:
            loss = objective.loss_sum(adapted, batch)[0] / units
            loss.backward()
            ours += float(loss.detach())
        optimizer.clip(optimizer.gradient_norm(), 1.0)
        optimizer.step(5e-3)
        optimizer.zero_grad()

        # One row at a time, no padding, plain torch: nothing of ours is used.
        count = sum(int(row.trained[1:].sum()) for row in batch_rows)
        expected = 0.0
        for row in batch_rows:
            ids = torch.from_numpy(row.input_ids).long()
            logits = other(input_ids=ids[None]).logits[0, :-1]
            keep = torch.from_numpy(row.trained)[1:]
            loss = F.cross_entropy(logits[keep], ids[1:][keep], reduction="sum") / count
            loss.backward()
            expected += float(loss.detach())
        torch.nn.utils.clip_grad_norm_([p for p in other.parameters() if p.requires_grad], 1.0)
        theirs.step()
        theirs.zero_grad()
        assert abs(ours - expected) / expected <= 1e-4, f"step {step}: {ours} and {expected}"
