"""The products of base and update in one autograd function equal plain torch operations, values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_cli.adapters._fused import Cast, LowRankProduct, ScaledProduct, StretchedProduct, cast

IN, OUT, TOKENS = 48, 36, 80
FORMS = ("lora", "lora of high rank", "a frozen", "past", "dora", "vera", "vera of high rank")


def drawn(form: str, seed: int = 0) -> tuple[dict[str, Tensor], Tensor, Tensor | None, int]:
    """Return the trained tensors of a form, W (out, in), a bias, and the rank."""
    torch.manual_seed(seed)
    rank = {"lora of high rank": 24, "vera": 24, "vera of high rank": 64}.get(form, 4)
    named = {"a": torch.randn(rank, IN) / IN**0.5, "b": torch.randn(OUT, rank)}
    if form == "dora":
        named["m"] = torch.rand(OUT) + 0.5
    if form.startswith("vera"):
        named |= {"u": torch.randn(rank), "v": torch.randn(OUT)}
    return named, torch.randn(OUT, IN) / IN**0.5, torch.randn(OUT), rank


def trained(form: str) -> list[str]:
    """Return which of the tensors get a gradient."""
    if form.startswith("vera"):
        return ["u", "v"]
    return {"a frozen": ["b"], "dora": ["a", "b", "m"]}.get(form, ["a", "b"])


def fused(
    form: str, x: Tensor, d: Tensor | None, t: dict[str, Tensor], w: Tensor, bias: Tensor | None
) -> Tensor:
    """Return the product under test; the scale is 2."""
    past = (torch.ones(IN, 2) / IN, torch.ones(2, OUT)), (torch.full((IN, OUT), 0.01),)
    frozen = [tuple(part.to(x.dtype) for part in chain) for chain in past] if form == "past" else []
    if form == "dora":
        q = (t["m"] / norm(t)).detach()
        factors = *cast(t["a"], t["b"] * (q * 2.0)[:, None], x.dtype), q, (q - 1.0).to(x.dtype)
        return StretchedProduct.apply(x, d, t["a"], t["b"], t["m"], norm(t), 2.0, factors, lambda: w, bias)
    if form.startswith("vera"):
        down = cast(t["a"], t["b"], x.dtype)[0]
        return ScaledProduct.apply(x, d, t["u"], t["v"], down, t["b"], lambda: w, bias)
    factors = Cast().of(t["a"], t["b"], 2.0, x.dtype)
    return LowRankProduct.apply(x, d, t["a"], t["b"], 2.0, factors, lambda: w, bias, frozen)


def plain(
    form: str, x: Tensor, d: Tensor | None, t: dict[str, Tensor], w: Tensor, bias: Tensor | None
) -> Tensor:
    """Return the same by torch's own operations."""
    d = x if d is None else d
    h = F.linear(d, t["a"].to(x.dtype))
    if form.startswith("vera"):
        return F.linear(x, w, bias) + F.linear(h * t["u"].to(x.dtype), t["b"].to(x.dtype)) * t["v"].to(
            x.dtype
        )
    update = 2.0 * F.linear(h, t["b"].to(x.dtype))
    if form == "dora":
        ratio = (t["m"] / norm(t)).to(x.dtype)
        y = (F.linear(x, w) + update) * ratio
        return y if bias is None else y + bias
    y = F.linear(x, w, bias) + update
    if form == "past":
        y = y + x.sum(-1, keepdim=True) * (2 / IN) + 0.01 * x.sum(-1, keepdim=True)
    return y


def norm(t: dict[str, Tensor]) -> Tensor:
    """Return some norm of rows, (out,): to the product it is a constant."""
    return t["b"].detach().square().sum(dim=1).sqrt() + 1.0


def results(
    product: Callable[..., Tensor], form: str, dtype: torch.dtype, *, bias: bool, dropout: bool, of_x: bool
) -> dict[str, Tensor]:
    """Return the output and every gradient, float32."""
    named, w, b, _ = drawn(form)
    for name in trained(form):
        named[name].requires_grad_()
    x = torch.randn(2, TOKENS // 2, IN).to(dtype).requires_grad_(of_x)
    kept = (torch.rand(x.shape) > 0.3).to(dtype) if dropout else None
    d = None if kept is None else x * kept
    y = product(form, x, d, named, w.to(dtype), b.to(dtype) if bias and b is not None else None)
    y.backward(torch.randn(y.shape).to(dtype))
    grads = {name: named[name].grad for name in trained(form)} | ({"x": x.grad} if of_x else {})
    assert all(grad is not None for grad in grads.values())
    return {
        "y": y.detach().float(),
        **{name: grad.float() for name, grad in grads.items() if grad is not None},
    }


@pytest.mark.parametrize("of_x", [True, False], ids=["inner", "first"])
@pytest.mark.parametrize("dropout", [False, True], ids=["whole", "dropout"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("form", FORMS)
def test_it_is_what_plain_operations_compute(form: str, bias: bool, dropout: bool, of_x: bool) -> None:
    """Output and gradients equal those of plain operations to 1e-5 of the largest value, in float32."""
    options = {"bias": bias, "dropout": dropout, "of_x": of_x}
    mine = results(fused, form, torch.float32, **options)
    expected = results(plain, form, torch.float32, **options)
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        assert float((mine[name] - value).abs().max()) <= 1e-5 * float(value.abs().max()), name


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_rounds_no_more_than_plain_operations(form: str) -> None:
    """In bfloat16 output and gradients are as near to float32's as those of plain operations are, within a half."""
    options = {"bias": True, "dropout": False, "of_x": True}
    exact = results(plain, form, torch.float32, **options)
    mine = results(fused, form, torch.bfloat16, **options)
    theirs = results(plain, form, torch.bfloat16, **options)
    for name, value in exact.items():
        error, allowed = ((one[name] - value).norm() / value.norm() for one in (mine, theirs))
        assert float(error) <= 1.5 * float(allowed) + 1e-3, name


def test_a_cast_follows_its_values() -> None:
    """The cast is kept while A and B keep their values, and is made anew after an update in place."""
    a, b, made = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(6, 4)), Cast()
    first = made.of(a, b, 2.0, torch.bfloat16)
    assert made.of(a, b, 2.0, torch.bfloat16)[0] is first[0]
    with torch.no_grad():
        b.add_(1.0)
    assert torch.equal(made.of(a, b, 2.0, torch.bfloat16)[1], (b * 2.0).T.to(torch.bfloat16))
    assert made.of(a, b, 2.0, torch.float32)[0].dtype is torch.float32
