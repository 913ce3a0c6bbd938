"""The losses of an output head without its logits, against torch's cross-entropy of all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lora_cli.adapters._low_rank import LoraLinear
from lora_cli.models import linear_cross_entropy
from lora_cli.models.linear_cross_entropy import PLAIN, Scaling, token_losses

WIDTH = 24


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make chunks and blocks so small that every case has several of both, none of them even."""
    for name, value in (("ROWS", 64), ("TRAINED_ROWS", 48), ("_BLOCK_BYTES", 10_000)):
        monkeypatch.setattr(linear_cross_entropy, name, {"cpu": value, "cuda": value})


def scene(
    count: int,
    vocabulary: int,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    trained: bool = False,
) -> tuple[Tensor, Tensor, nn.Linear, Tensor]:
    """Return hidden states, targets with the first and the last word among them, a head, and a weight per token."""
    torch.manual_seed(count)
    head = nn.Linear(WIDTH, vocabulary, bias=bias, dtype=dtype).requires_grad_(trained)
    targets = torch.randint(vocabulary, (count,))
    targets[:2] = torch.tensor([0, vocabulary - 1])[:count]
    return torch.randn(count, WIDTH).to(dtype).requires_grad_(), targets, head, torch.rand(count)


def full(hidden: Tensor, targets: Tensor, head: nn.Module, scaling: Scaling = PLAIN) -> tuple[Tensor, Tensor]:
    """Return torch's losses of all logits, and whether the targets are the most likely."""
    logits = head(hidden).float() * scaling.multiplier
    if scaling.cap is not None:
        logits = scaling.cap * torch.tanh(logits / scaling.cap)
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


def gradients(losses: Tensor, weights: Tensor, hidden: Tensor, head: nn.Module) -> list[Tensor]:
    """Return the gradients of the weighted sum with respect to the hidden states and to what of the head is trained."""
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return [found.float() for found in torch.autograd.grad((losses * weights).sum(), [hidden, *trained])]


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Return the relative difference in the Euclidean norm."""
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


@pytest.mark.parametrize("scaling", [PLAIN, Scaling(0.0625), Scaling(3.0, 2.0)], ids=str)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    ("count", "vocabulary", "bias"), [(1, 2, False), (150, 1009, False), (201, 97, True)]
)
def test_losses_and_gradients_are_torchs(
    scaling: Scaling, trained: bool, count: int, vocabulary: int, bias: bool
) -> None:
    """In float32 losses, gradients under unequal weights and best words equal those of all logits, to 1e-6."""
    hidden, targets, head, weights = scene(count, vocabulary, bias=bias, trained=trained)
    losses, correct = token_losses(hidden, targets, head, scaling=scaling, best=True)
    expected, best = full(hidden, targets, head, scaling)
    assert losses.dtype == torch.float32
    assert apart(losses.detach(), expected.detach()) <= 1e-6
    assert torch.equal(correct, best)
    ours, theirs = (gradients(one, weights, hidden, head) for one in (losses, expected))
    assert len(ours) == 1 + trained * (1 + bias)
    assert all(apart(one, other) <= 1e-6 for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("trained", [False, True])
def test_bfloat16_is_rounded_as_all_logits_are(trained: bool) -> None:
    """In bfloat16 losses equal those of the bfloat16 logits to 1e-6, and gradients are no farther from the truth."""
    hidden, targets, head, weights = scene(200, 1009, torch.bfloat16, trained=trained)
    losses, _ = token_losses(hidden, targets, head)
    theirs, _ = full(hidden, targets, head)
    assert apart(losses.detach(), theirs.detach()) <= 1e-6
    exact_head = nn.Linear(WIDTH, 1009).requires_grad_(trained)
    exact_head.load_state_dict(head.state_dict())
    exact_hidden = hidden.detach().float().requires_grad_()
    truth = gradients(full(exact_hidden, targets, exact_head)[0], weights, exact_hidden, exact_head)
    found = gradients(losses, weights, hidden, head), gradients(theirs, weights, hidden, head)
    for ours, others, exact in zip(*found, truth, strict=True):
        assert apart(ours, exact) <= max(1.3 * apart(others, exact), 2**-8)


def test_a_trained_heads_gradient_is_summed_in_float32() -> None:
    """Over 100 chunks a bfloat16 head's gradient is that of one product rounded once; 100 roundings would show."""
    hidden, targets, head, weights = scene(4800, 31, torch.bfloat16, trained=True)
    (_, *found) = gradients(token_losses(hidden, targets, head)[0], weights, hidden, head)
    exact_head = nn.Linear(WIDTH, 31)
    exact_head.load_state_dict(head.state_dict())
    exact = hidden.detach().float().requires_grad_()
    (_, *truth) = gradients(full(exact, targets, exact_head)[0], weights, exact, exact_head)
    assert all(apart(one, other) <= 4e-3 for one, other in zip(found, truth, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
def test_a_sum_is_differentiated_as_its_terms_are(trained: bool, dtype: torch.dtype) -> None:
    """The gradients of a scaled sum, which are formed ahead, equal those under a factor for each token, twice over."""
    hidden, targets, head, _ = scene(201, 97, dtype, trained=trained)
    each = gradients(token_losses(hidden, targets, head)[0], torch.full((201,), 0.25), hidden, head)
    loss = 0.25 * token_losses(hidden, targets, head)[0].sum()
    inputs = [hidden, *(one for one in head.parameters() if one.requires_grad)]
    for _ in range(2):
        together = torch.autograd.grad(loss, inputs, retain_graph=True)
        for one, other in zip(together, each, strict=True):
            assert apart(one.float(), other) <= (1e-6 if dtype == torch.float32 else 2**-7)


@pytest.mark.parametrize("trained", [False, True])
def test_no_tokens_have_no_losses(trained: bool) -> None:
    """Of no tokens there are no losses, and the gradients are zero."""
    hidden, targets, head, weights = scene(0, 50, trained=trained)
    losses, correct = token_losses(hidden, targets, head, best=True)
    assert losses.shape == (0,)
    assert correct is not None
    assert correct.shape == (0,)
    (losses * weights).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, WIDTH)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in head.parameters())


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_logits_do_not_overflow(size: float) -> None:
    """With logits of 1e4 losses and gradients are finite and torch's."""
    hidden, targets, head, weights = scene(70, 101)
    with torch.no_grad():
        head.weight.mul_(size)
    losses, _ = token_losses(hidden, targets, head)
    expected, _ = full(hidden, targets, head)
    assert float(expected.detach().max()) > 5e3
    assert apart(losses.detach(), expected.detach()) <= 1e-6
    (ours,), (theirs,) = (gradients(one, weights, hidden, head) for one in (losses, expected))
    assert bool(ours.isfinite().all())
    assert apart(ours, theirs) <= 1e-6


class Watch(TorchDispatchMode):
    """Counts products, and remembers how many bytes the largest tensor has that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what a function makes."""
        made = function(*args, **(kwargs or {}))
        self.products += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        for one in made if isinstance(made, tuple | list) else (made,):
            if isinstance(one, Tensor):
                self.largest = max(self.largest, one.nbytes)
        return made


def test_each_product_has_a_use() -> None:
    """One product a chunk without gradients, two for a frozen head, and none into hidden states that need none."""
    hidden, targets, head, _ = scene(128, 500)
    for wanted, products in ((False, 2), (True, 4)):
        with Watch() as watch:
            losses, _ = token_losses(hidden.detach().requires_grad_(wanted), targets, head)
            if wanted:
                losses.sum().backward()
        assert watch.products == products
    with torch.no_grad(), Watch() as watch:
        token_losses(hidden, targets, head)
    assert watch.products == 2
    head.requires_grad_(True)
    for wanted, products in ((False, 6), (True, 9)):  # three chunks of a trained head
        with Watch() as watch:
            token_losses(hidden.detach().requires_grad_(wanted), targets, head)[0].sum().backward()
        assert watch.products == products


@pytest.mark.parametrize("trained", [False, True])
def test_all_logits_are_never_there(trained: bool) -> None:
    """No tensor in forward and backward pass is larger than the bfloat16 logits of a chunk."""
    hidden, targets, head, _ = scene(640, 4001, torch.bfloat16, trained=trained)
    with Watch() as watch:
        token_losses(hidden, targets, head, best=True)[0].sum().backward()
    assert watch.largest <= 64 * 4001 * 2
    with Watch() as watch:
        full(hidden, targets, head)[0].sum().backward()
    assert watch.largest == 640 * 4001 * 4


def test_dropout_is_drawn_once() -> None:
    """With dropout in the head the backward pass repeats the draws of the forward pass and leaves the stream alone."""
    hidden, targets, base, weights = scene(130, 60)
    head = LoraLinear(base, rank=4, alpha=8.0, dropout=0.5)
    nn.init.normal_(head.lora_A)
    nn.init.normal_(head.lora_B)
    torch.manual_seed(1)
    losses, _ = token_losses(hidden, targets, head)
    torch.manual_seed(2)
    ours = gradients(losses, weights, hidden, head)
    after = torch.rand(1)
    torch.manual_seed(1)
    expected = torch.cat(
        [full(*part, head)[0] for part in zip(hidden.split(48), targets.split(48), strict=True)]
    )
    theirs = gradients(expected, weights, hidden, head)
    assert apart(losses.detach(), expected.detach()) <= 1e-6
    assert len(ours) == 3
    assert all(apart(one, other) <= 1e-6 for one, other in zip(ours, theirs, strict=True))
    torch.manual_seed(2)
    assert torch.equal(after, torch.rand(1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_computes_the_same(dtype: torch.dtype, trained: bool) -> None:
    """On a GPU losses and gradients are torch's of all logits there, to 1e-5 in float32 and to rounding in bfloat16."""
    hidden, targets, head, weights = scene(300, 1009, dtype, trained=trained)
    hidden, targets, weights = hidden.detach().cuda().requires_grad_(), targets.cuda(), weights.cuda()
    head = head.cuda()
    losses, _ = token_losses(hidden, targets, head)
    expected, _ = full(hidden, targets, head)
    allowed = 1e-5 if dtype == torch.float32 else 2**-6
    assert apart(losses.detach(), expected.detach()) <= allowed
    ours, theirs = (gradients(one, weights, hidden, head) for one in (losses, expected))
    assert all(apart(one, other) <= allowed for one, other in zip(ours, theirs, strict=True))
