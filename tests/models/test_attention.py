"""Documents in one sequence do not see each other, on every kind of attention, or the model is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from packed_models import LEAKS, PACKS, make
from small import make_model
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from lora_cli import adapters
from lora_cli.models import attention, packing
from lora_cli.recipe.schema import LoraAdapter

LENGTHS = (23, 23, 40, 9, 1, 17)  # equal ones side by side, one beyond every window, one of a single token
CPU = torch.device("cpu")


def tokens(seed: int = 0) -> Tensor:
    """Return random ids, (1, T)."""
    return torch.randint(1, 96, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def packed(model: PreTrainedModel, ids: Tensor, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """Return the logits of each document of a packed sequence."""
    arguments: dict[str, Any] = {
        "position_ids": packing.positions(lengths, CPU), "documents": packing.documents(lengths, CPU)
    }  # fmt: skip
    logits = model(input_ids=ids, attention_mask=None, use_cache=False, **arguments).logits
    return list(logits[0].split(lengths))


def ready(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a model that packs."""
    model = make(copy.deepcopy(PACKS[name]), dtype)
    assert packing.keep_apart(model) is None
    return model


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("changed", [0, 2, 5])
def test_a_document_does_not_see_the_others(name: str, changed: int) -> None:
    """Changing one packed document leaves the logits of every other as they are, to 1e-6; its own change."""
    model, ids = ready(name), tokens()
    before = packed(model, ids)
    other = ids.clone().split(LENGTHS, 1)
    other[changed].copy_(95 - other[changed])
    after = packed(model, torch.cat(other, 1))
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        difference = float((old - new).abs().max())
        assert difference > 0.1 if index == changed else difference <= 1e-6
        if (
            index != changed and name != "mixtral"
        ):  # its experts take tokens together, so that sums have other orders
            assert torch.equal(old, new)


@pytest.mark.parametrize("name", PACKS)
def test_a_packed_document_is_the_document_alone(name: str) -> None:
    """Logits of packed documents are those of each alone under transformers' eager attention, to 1e-5 in float32."""
    plain, model, ids = make(copy.deepcopy(PACKS[name])), ready(name), tokens()
    for part, logits in zip(ids.split(LENGTHS, 1), packed(model, ids), strict=True):
        with torch.no_grad():
            alone = plain(input_ids=part, use_cache=False).logits[0]
        assert float((alone - logits).abs().max()) <= 1e-5


@pytest.mark.parametrize("name", PACKS)
def test_in_bfloat16_it_is_so_within_rounding(name: str) -> None:
    """In bfloat16 packed logits are as near to float32's as eager attention's are, within half as much again."""
    ids, model, plain = (
        tokens(),
        ready(name, torch.bfloat16),
        make(copy.deepcopy(PACKS[name]), torch.bfloat16),
    )
    exact = ready(name)
    exact.load_state_dict(plain.state_dict())
    errors = torch.zeros(2)
    for part, ours, right in zip(ids.split(LENGTHS, 1), packed(model, ids), packed(exact, ids), strict=True):
        with torch.no_grad():
            theirs = plain(input_ids=part, use_cache=False).logits[0]
        errors += torch.stack([(logits.float() - right).square().sum() for logits in (ours, theirs)])
    assert float(errors[0]) <= 1.5**2 * float(errors[1])


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("limit", [0, 128])
def test_padded_rows_are_what_eager_attention_makes_of_them(
    name: str, side: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a padding mask on either side logits of real tokens are transformers' own to 1e-5, computed either way."""
    monkeypatch.setitem(attention.PLAIN_PRODUCTS, torch.float32, limit)
    plain, model = make(copy.deepcopy(PACKS[name])), ready(name)
    ids, mask = tokens()[:, :60].reshape(3, 20), torch.ones(3, 20, dtype=torch.int64)
    for row, pad in enumerate((0, 7, 12)):
        mask[row, slice(0, pad) if side == "left" else slice(20 - pad, 20)] = 0
    with torch.no_grad():
        one, two = (m(input_ids=ids, attention_mask=mask, use_cache=False).logits for m in (plain, model))
    assert float((one - two)[mask.bool()].abs().max()) <= 1e-5


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("limit", [0, 128])
def test_generation_with_a_cache_is_transformers_own(
    name: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy answers with a cache, left-padded, beyond the windows, equal those of eager attention."""
    monkeypatch.setitem(attention.PLAIN_PRODUCTS, torch.float32, limit)
    plain, model = make(copy.deepcopy(PACKS[name])), ready(name)
    ids, mask = tokens()[:, :24].reshape(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[1, :5] = 0
    settings: dict[str, Any] = {
        "max_new_tokens": 12,
        "do_sample": False,
        "use_cache": True,
        "pad_token_id": 0,
    }
    one, two = (m.generate(ids, attention_mask=mask, eos_token_id=[95], **settings) for m in (plain, model))
    assert torch.equal(one, two)


@pytest.mark.parametrize("limit", [0, 30])
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_all_ways_to_compute_agree(name: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles, plain products of whole rows and torch's fused attention give the same logits, to 1e-5."""
    model, ids = ready(name), tokens()
    tiles = packed(model, ids)
    monkeypatch.setitem(attention.TILED, torch.float32, 0)
    monkeypatch.setitem(attention.PLAIN_PRODUCTS, torch.float32, limit)
    for one, other in zip(tiles, packed(model, ids), strict=True):
        assert float((one - other).abs().max()) <= 1e-5


@pytest.mark.parametrize("name", LEAKS)
def test_a_model_that_leaks_is_found_out(name: str) -> None:
    """A model that does not keep documents apart is named with the reason, and computes as before."""
    config, said = LEAKS[name]
    model = make(copy.deepcopy(config))
    with torch.no_grad():
        before = model(input_ids=tokens(), use_cache=False).logits
        reason = packing.keep_apart(model)
        assert reason is not None
        assert said in reason
        assert torch.equal(model(input_ids=tokens(), use_cache=False).logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_ignores_positions_is_found_out(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Learned positions that run on over a boundary are found out, in either type."""
    model = make(copy.deepcopy(PACKS["gpt2"]), dtype)
    table = model.transformer.wpe.forward
    monkeypatch.setattr(model.transformer.wpe, "forward", lambda ids: table(torch.arange(ids.shape[1])[None]))
    assert "logits of a document change" in str(packing.keep_apart(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_drops_the_boundaries_is_found_out(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that does not hand the boundaries on to its attention is found out, in either type."""
    model = make(copy.deepcopy(PACKS["llama"]), dtype)
    inner = model.model.layers[1].self_attn.forward

    def dropping(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("documents", None)
        return inner(*args, **kwargs)

    monkeypatch.setattr(model.model.layers[1].self_attn, "forward", dropping)
    assert "logits of a document change" in str(packing.keep_apart(model))


def test_a_lost_window_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of 4,096 that the layers are not told of is found out by a trial of 32 tokens."""
    config = copy.deepcopy(PACKS["mistral-window"])
    config.sliding_window = 4096
    assert packing.keep_apart(make(copy.deepcopy(config))) is None

    def untold(*args: Any, sliding_window: int | None = None, **kwargs: Any) -> Any:
        return attention.attend(*args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, untold)
    assert "not told of the windows" in str(packing.keep_apart(make(config)))


def test_what_attention_cannot_do_it_refuses() -> None:
    """A position bias, an attention that is not causal, and a cache without a mask are refused by name."""
    q = torch.zeros(1, 2, 4, 8)
    layer = torch.nn.Module()
    for extra, said in (({"position_bias": q}, "position_bias"), ({"is_causal": False}, "not causal")):
        with pytest.raises(attention.AttentionRefused, match=said):
            attention.attend(layer, q, q, q, None, **extra)  # type: ignore[arg-type]
    with pytest.raises(attention.AttentionRefused, match="cache"):
        attention.attend(layer, q[:, :, :1], q, q, None)


def test_a_mask_over_packed_documents_is_refused() -> None:
    """A mask that comes with documents is refused, not used nor dropped."""
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(attention.AttentionRefused, match="mask"):
        attention.attend(
            torch.nn.Module(), q, q, q, torch.ones(1, 1, 4, 4) > 0, documents=packing.documents((4,), CPU)
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", PACKS)
def test_on_a_gpu_documents_do_not_see_each_other(name: str) -> None:
    """On CUDA in bfloat16 the trial passes, and changing one document leaves the others' logits as they are."""
    model = make(copy.deepcopy(PACKS[name]), torch.bfloat16).cuda()
    assert packing.keep_apart(model) is None
    device, ids = torch.device("cuda"), tokens().cuda()
    arguments: dict[str, Any] = {
        "position_ids": packing.positions(LENGTHS, device), "documents": packing.documents(LENGTHS, device)
    }  # fmt: skip
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False, **arguments).logits[0, LENGTHS[0] :]
        ids[:, : LENGTHS[0]] = 95 - ids[:, : LENGTHS[0]]
        after = model(input_ids=ids, use_cache=False, **arguments).logits[0, LENGTHS[0] :]
    assert float((after - before).abs().max()) <= 1e-6 or name == "mixtral"


def test_the_trial_is_made_in_evaluation_mode() -> None:
    """Dropout in new layers, and an embedding with float32 weights in a bfloat16 model, do not look like a leak."""
    model = make_model("llama", torch.bfloat16)
    block = LoraAdapter(rank=4, dropout=0.5, train_also=["norm", "embed_tokens", "lm_head"])
    method = adapters.build(block, seed=0)
    method.inject(model)
    layer = next(iter(method.layers.values()))
    assert layer.training
    with torch.no_grad():
        for parameter in method.trainable(model).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    assert packing.keep_apart(model) is None
    assert layer.training
    assert not model.training
