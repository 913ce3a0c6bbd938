"""A base quantized as it is read: the same bits as quantized in memory, in far less memory, or refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import make_model
from transformers import AutoModelForCausalLM, FalconConfig, LlamaConfig, MixtralConfig, PreTrainedModel

from lora_cli.errors import InputError
from lora_cli.models.load import load_model
from lora_cli.models.nf4 import Quantization, QuantizedLinear, quantized_layers

CPU = torch.device("cpu")


def load(folder: Path, dtype: torch.dtype = torch.float32, form: str = "nf4") -> PreTrainedModel:
    """Load a folder quantized."""
    return load_model(folder, dtype=dtype, device=CPU, quantization=Quantization(form))


@pytest.mark.parametrize("shard", [10**9, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_model_quantized_in_memory(
    tmp_path: Path, architecture: str, dtype: torch.dtype, shard: int
) -> None:
    """From one file or shards: linear layers quantized bit for bit as in memory, all else as a plain load has it."""
    original = make_model(architecture)
    original.save_pretrained(tmp_path, max_shard_size=shard)
    model, plain = load(tmp_path, dtype), load_model(tmp_path, dtype=dtype, device=CPU)
    layers = quantized_layers(model)
    head = {"lm_head"}
    assert (
        layers.keys()
        == {
            path for path, module in original.named_modules() if type(module).__name__ in ("Linear", "Conv1D")
        }
        - head
    )
    for path, layer in layers.items():
        expected = QuantizedLinear.of(original.get_submodule(path), Quantization("nf4"))
        assert torch.equal(layer.packed, expected.packed)
        assert torch.equal(layer.dequantized(), expected.dequantized().to(dtype))
        bias = plain.get_submodule(path).bias
        assert layer.bias is None if bias is None else torch.equal(layer.bias, bias)
    rest = {name: value for name, value in plain.named_parameters() if name.rpartition(".")[0] not in layers}
    assert rest.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(model.get_parameter(name), value) for name, value in rest.items())
    for name, buffer in plain.named_buffers():  # rotary frequencies are not stored, and stay float32
        assert torch.equal(model.get_buffer(name), buffer)
        assert model.get_buffer(name).dtype == buffer.dtype
    tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    assert model.dtype == dtype
    assert not model.training


def test_an_inner_model_is_placed_by_its_prefix(tmp_path: Path) -> None:
    """Files that name tensors without the inner model's prefix, as GPT-2's on the hub do, are read too."""
    original = make_model("gpt2")
    original.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    renamed = {name.removeprefix("transformer."): value for name, value in weights.items()}
    assert renamed.keys() != weights.keys()
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = make_model("gpt2", quantize="nf4")(input_ids=ids).logits
        assert torch.equal(load(tmp_path)(input_ids=ids).logits, expected)


def test_a_mixture_that_must_be_joined_is_refused(tmp_path: Path) -> None:
    """Experts that transformers would join from several tensors are refused with what to do, not guessed."""
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"must be joined .*model\.quantize: none"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "1 weights are missing, first model.layers.1.mlp.up_proj.weight"),
        ("misshapen", "has shape (3, 32), the model needs (48, 32)"),
        ("not finite", "not finite"),
        ("untied", "but config.json ties them"),
        ("quantized", "is quantized already"),
        ("layers of its own", "none of its linear layers can be quantized"),
    ],
)
def test_a_faulty_base_is_refused(tmp_path: Path, case: str, message: str) -> None:
    """A tensor that is missing, misshapen, not finite, or contradicts the config is named; nothing is filled in."""
    make_model("llama").save_pretrained(tmp_path)
    if case == "layers of its own":
        falcon = FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
        AutoModelForCausalLM.from_config(falcon).save_pretrained(tmp_path)
    path, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    weights = load_file(path)
    if case == "missing":
        del weights[name]
    elif case == "misshapen":
        weights[name] = weights[name][:3].contiguous()
    elif case == "not finite":
        weights[name][0, 0] = float("nan")
    elif case == "untied":
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    elif case == "quantized":
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


PEAKS = """
import sys, torch
from pathlib import Path
from lora_cli.models.load import load_model
from lora_cli.models.nf4 import Quantization
torch.set_num_threads(1)

def status(field):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

# The small model first, so that what libraries take once is not counted.
for folder in sys.argv[1:]:
    for quantization in (Quantization("nf4"), None):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = status("VmRSS")
        model = load_model(
            Path(folder), dtype=torch.bfloat16, device=torch.device("cpu"), quantization=quantization
        )
        with torch.no_grad():
            sum(float(value.sum()) for value in model.state_dict().values())  # a plain load only maps the file
        print(status("VmHWM") - before, status("VmRSS") - before)
        del model
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_peak_memory(tmp_path: Path) -> None:
    """Loading and reading 135 MB in NF4 peaks at less than half of what bfloat16 does: the whole is never in memory."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=8
    )
    with torch.device("meta"):
        shapes = {
            name: value.shape for name, value in AutoModelForCausalLM.from_config(config).named_parameters()
        }
    noise = torch.randn(1 << 16).to(torch.bfloat16)
    weights = {
        name: noise.repeat(-(-shape.numel() // len(noise)))[: shape.numel()].view(shape).clone()
        for name, shape in shapes.items()
    }
    (tmp_path / "large").mkdir()
    save_file(weights, tmp_path / "large" / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(tmp_path / "large")
    make_model("llama").save_pretrained(tmp_path / "small")
    size = sum(value.nbytes for value in weights.values())
    assert size > 130e6
    result = subprocess.run(
        [sys.executable, "-c", PEAKS, str(tmp_path / "small"), str(tmp_path / "large")],
        capture_output=True, text=True, timeout=300, check=False,
        # Freed memory is given back at once: what is measured is what is held, not what the allocator keeps.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (quantized, _), (plain, _) = (map(int, line.split()) for line in result.stdout.splitlines()[2:])
    assert plain > 0.9 * size
    assert quantized < 0.5 * plain, result.stdout
