"""Which modules are the decoder layers, what a pass keeps, and what recomputation saves of it."""

from __future__ import annotations

import multiprocessing
import re
import sys
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_models import LEAKS, PACKS, make
from small import make_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from lora_cli.models import memory
from lora_cli.models.activations import Recomputation, Saved, decoder_layers, extrapolate, saved_bytes

EVERY = {**PACKS, **{name: config for name, (config, _) in LEAKS.items()}}


@pytest.mark.parametrize("name", sorted(EVERY))
def test_the_decoder_layers_are_found(name: str) -> None:
    """They are the modules that transformers names as those a model must not be split within, in its order."""
    model = make(EVERY[name])
    whole = set(model._no_split_modules or ())
    named = [module for module in model.modules() if type(module).__name__ in whole]
    within = {id(part) for module in named for part in module.modules() if part is not module}
    expected = [module for module in named if id(module) not in within]
    assert expected
    assert decoder_layers(model) == expected


def test_a_model_without_layers_has_none() -> None:
    """A list that is called in another order is no sequence of layers."""
    model = make_model("llama")
    inner: Any = model.model
    inner.layers = nn.ModuleList(reversed(inner.layers))
    assert len(decoder_layers(model)) == 2
    first, second = inner.layers
    first.register_forward_pre_hook(
        lambda *_: second(torch.zeros(1, 2, 32), position_embeddings=(_angles(), _angles()))
    )
    assert decoder_layers(model) == []


def _angles() -> torch.Tensor:
    return torch.zeros(1, 2, 8)


class _Block(nn.Module):
    """tanh(W x) + x, which keeps x (5 x 16) and tanh's output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x.view(5, 16))) + x


def test_what_a_pass_keeps_is_counted_once() -> None:
    """By hand: each layer keeps its input, which is no other layer's, and one tensor more; weights do not count."""
    blocks = nn.ModuleList([_Block(), _Block(), _Block()])
    x = torch.randn(5, 16, requires_grad=True)

    def compute() -> torch.Tensor:
        hidden = x * 1.0
        for block in blocks:
            hidden = block(hidden)
        return (hidden * hidden).sum()

    saved = saved_bytes(blocks, list(blocks), compute)
    tensor = 5 * 16 * 4
    assert saved.layers.tolist() == [2 * tensor] * 3
    assert saved.inputs.tolist() == [tensor] * 3
    assert saved.rest == tensor


def _counted(model: PreTrainedModel, rows: int, length: int) -> Saved:
    ids = torch.randint(96, (rows, length), generator=torch.Generator().manual_seed(length))
    layers = decoder_layers(model)
    return saved_bytes(model.train(), layers, lambda: model(input_ids=ids, labels=ids, use_cache=False))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_short_passes_tell_what_a_long_one_keeps(architecture: str, attention: str) -> None:
    """Three passes of up to 128 tokens give the bytes of one of 3 x 250, and at most 3 % more: what rows share, as
    the angles of their positions, is taken to be there for each."""
    model = make_model(architecture)
    model.set_attn_implementation(attention)
    lengths = (32, 64, 128)
    told = extrapolate(lengths, [_counted(model, 1, length) for length in lengths], [250] * 3)
    found = _counted(model, 3, 250)
    for one, other in ((told.layers, found.layers), (told.inputs, found.inputs), (told.rest, found.rest)):
        assert np.all(one >= np.multiply(other, 0.999))
        assert np.all(one <= np.multiply(other, 1.03))


def test_as_few_layers_are_recomputed_as_it_takes() -> None:
    """The number chosen fits, one less does not; with no room it is all, and more room never means more of them."""
    saved = Saved(np.array([50.0, 70.0, 60.0, 60.0]), np.array([5.0] * 4), 40.0)
    chosen = [saved.to_recompute(room) for room in range(500)]
    assert chosen[0] == 4
    assert chosen[-1] == 0
    assert all(one >= other for one, other in pairwise(chosen))
    assert set(chosen) >= {0, 2, 3, 4}
    for room, count in enumerate(chosen):
        assert count == 4 or saved.peak(count) <= room
        assert all(saved.peak(fewer) > room for fewer in range(count))


def _thin_model(attention: str) -> tuple[PreTrainedModel, Any]:
    """Return a model of twelve layers with norms that are trained, and its loss at so many tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=96, intermediate_size=256, num_hidden_layers=12, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation=attention,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("input_layernorm" in name)

    def loss(length: int) -> torch.Tensor:
        ids = torch.arange(length)[None] % 64
        found: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return found

    return model, loss


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_peak_is_as_foretold(attention: str) -> None:
    """The most bytes of tensors at a time, by torch's own profiler, are at most what was foretold, and within a third
    of it; with all twelve layers recomputed they are less than a quarter of what they were."""
    model, loss = _thin_model(attention)
    layers = decoder_layers(model)
    saved, recomputation, found = saved_bytes(model, layers, lambda: loss(256)), Recomputation(layers), {}
    for recomputed in (0, 6, 12):
        recomputation.set(recomputed)
        model.zero_grad()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            loss(256).backward()
        events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
        found[recomputed] = max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
        assert 0.67 * saved.peak(recomputed) <= found[recomputed] <= saved.peak(recomputed)
    assert found[12] < 0.25 * found[0]


def _held(recomputed: int, answers: Any) -> None:
    """Tell by how much the most memory that this process ever held rose in one pass of 1 x 1024 tokens."""
    torch.set_num_threads(1)
    model, loss = _thin_model("sdpa")
    Recomputation(decoder_layers(model)).set(recomputed)
    loss(8).backward()  # pages of the libraries' code are memory as well, at their first use
    before = _status("VmRSS")
    loss(1024).backward()
    answers.put(_status("VmHWM") - before)


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from Linux's /proc")
def test_a_process_holds_less() -> None:
    """With all layers recomputed the memory that a process really holds rises less than half as much in a pass."""
    context, found = multiprocessing.get_context("fork"), []
    for recomputed in (0, 12):
        answers = context.SimpleQueue()
        child = context.Process(target=_held, args=(recomputed, answers))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        found.append(answers.get())
    assert 0 < found[1] < 0.5 * found[0]


def test_without_gradients_nothing_is_recomputed_or_slower() -> None:
    """A pass without gradients calls each layer's own method, and a generated answer is the same."""
    model = make_model("llama")
    ids = torch.arange(1, 13)[None]
    before = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    recomputation, entered = Recomputation(decoder_layers(model)), []
    recomputation.set(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_cli.models.activations.checkpoint", lambda *_, **__: entered.append(1))
        with torch.no_grad():
            model.train()(input_ids=ids)
        after = model.eval().generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(before, after)
    assert entered == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloaded_inputs_change_no_bit_and_free_the_gpu() -> None:
    """On a GPU the inputs of recomputed layers wait in the CPU's memory: the same bits, from less memory."""
    found = []
    for offload in (False, True):
        model = make_model("llama").to("cuda").train()
        layers = decoder_layers(model)
        Recomputation(layers).set(len(layers), offload=offload)
        ids = torch.arange(2 * 4096, device="cuda").view(2, 4096) % 96
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        held = torch.cuda.memory_allocated()
        loss.backward()
        found.append((held, [parameter.grad for parameter in model.parameters()]))
    assert found[1][0] < found[0][0]
    assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))


def test_free_memory_is_within_the_limits_of_control_groups(tmp_path: Path) -> None:
    """Of both versions: what the smallest limit above the process leaves, pages of files not counted as used."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    for folder, bound, used in ((tmp_path / "a", "9000", "5000"), (inner, "max", "3000")):
        (folder / "memory.max").write_text(f"{bound}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text("anon 10\ninactive_file 500\nactive_file 7\n")
    old = tmp_path / "memory" / "c"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("8000\n")
    (old / "memory.usage_in_bytes").write_text("7000\n")
    (old / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 40\n")
    membership = tmp_path / "cgroup"
    for lines, least in (
        ("0::/a/b\n", 4500),
        ("3:cpu:/a\n4:memory:/c\n", 1040),
        ("0::/nowhere\n", float("inf")),
    ):
        membership.write_text(lines)
        assert min(memory._left_in_groups(membership, tmp_path)) == least


@pytest.mark.skipif(sys.platform != "linux", reason="free memory is read from Linux's /proc")
def test_free_memory_is_what_the_kernel_says() -> None:
    """It is more than nothing, and at most all that the machine has."""
    assert 0 < memory.free_memory(torch.device("cpu")) <= _total_memory()


def _total_memory() -> int:
    found = re.search(r"^MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
