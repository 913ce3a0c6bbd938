"""Small random models and rows that every test folder shares. No network, no bundled weights."""

from __future__ import annotations

import copy
import os
from pathlib import Path

# One thread: tests run beside each other's processes on two cores, and sums have one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from lora_cli.adapters._base import replace_module
from lora_cli.models.nf4 import Quantization, QuantizedLinear, quantizable
from lora_cli.types import Example

torch.set_num_threads(1)

SHARED_DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"

CONFIGS: dict[str, PretrainedConfig] = {
    # Linear without bias, tied head
    "llama": LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    ),
    # Linear with bias on q, k, v; untied head
    "qwen2": Qwen2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    ),
    # Conv1D with bias: weights stored (in, out)
    "gpt2": GPT2Config(
        vocab_size=96,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    ),
}


def make_model(
    name: str, dtype: torch.dtype = torch.float32, seed: int = 0, quantize: str | None = None
) -> PreTrainedModel:
    """Return a random model of the named architecture whose biases are not zero; with `quantize` in that form."""
    torch.manual_seed(seed)
    # Made in its dtype, not cast: a cast would round the rotary frequencies, which stay float32 in a loaded model.
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=dtype)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() > 1:
                parameter.normal_(std=0.15)
    for path, linear in quantizable(model).items() if quantize else ():
        replace_module(model, path, QuantizedLinear.of(linear, Quantization(quantize or "")))
    return model.eval()


def make_rows(number: int, seed: int = 0, vocabulary: int = 96) -> list[Example]:
    """Return rows of unequal lengths, each with an untrained head and a trained tail."""
    generator = np.random.Generator(np.random.PCG64(seed))
    rows = []
    for _ in range(number):
        length = int(generator.integers(6, 40))
        trained = np.zeros(length, dtype=np.bool_)
        trained[int(generator.integers(1, length - 2)) :] = True
        rows.append(Example(generator.integers(1, vocabulary, length).astype(np.int32), trained))
    return rows


class RowList(list[Example]):
    """Rows in memory, where the product reads them from its token cache."""

    fingerprint = "rows in memory"

    @property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each row."""
        return np.array([len(row.input_ids) for row in self])


@pytest.fixture(params=sorted(CONFIGS))
def architecture(request: pytest.FixtureRequest) -> str:
    """Return the name of each architecture in turn."""
    return str(request.param)


@pytest.fixture()
def shared_data() -> Path:
    """Return the folder of real data beside the project, or skip where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real data files (../shared/data) are not on this machine")
    return SHARED_DATA
