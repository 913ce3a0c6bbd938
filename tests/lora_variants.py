"""LoRA's variants by name, as ours and as PEFT's, for the tests that run over all of them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import peft
import torch
from small import make_model, make_rows
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_cli import adapters
from lora_cli.adapters import Method
from lora_cli.adapters._lora_embedding import LoraEmbedding
from lora_cli.objectives._base import pad_batches
from lora_cli.recipe.schema import LoraAdapter
from lora_cli.types import Batch

TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj", "up_proj"],
    "gpt2": ["c_attn", "c_fc"],
}
WORDS = {
    "llama": {"NORM": "model.norm", "EMBED": "embed_tokens", "OTHER": "q_proj"},
    "qwen2": {"NORM": "model.norm", "EMBED": "embed_tokens", "OTHER": "k_proj"},
    "gpt2": {"NORM": "ln_f", "EMBED": "wte", "OTHER": "c_proj"},
}
for name, words in WORDS.items():
    words["FIRST"] = TARGETS[name][0]

# Settings of ours, and PEFT's for the same adapter; words in capitals stand for the architecture's own.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rslora": ({"scaling": "rslora"}, {"use_rslora": True}),
    "patterns": (
        {"rank_pattern": {"FIRST": 2}, "alpha_pattern": {r"\d+\..*FIRST": 3.0}},
        {"rank_pattern": {"FIRST": 2}, "alpha_pattern": {r"\d+\..*FIRST": 3}},
    ),
    "patterns in another order": (
        {"rank_pattern": {r"1\..*\.FIRST": 6, "FIRST": 2, r".*0\..*": 3}},
        {"rank_pattern": {r"1\..*\.FIRST": 6, r"0\..*\.FIRST": 2, r"0\..*\.(?!FIRST).*": 3}},
    ),
    "rslora with patterns": (
        {"scaling": "rslora", "rank_pattern": {"FIRST": 9}},
        {"use_rslora": True, "rank_pattern": {"FIRST": 9}},
    ),
    "layers": ({"layers": "last 1"}, {"layers_to_transform": 1}),
    "layers by name": (
        {"layers": [0]},
        {"layers_to_transform": [0], "layers_pattern": ["layers", "h"]},
    ),
    "frozen A": ({"freeze_a": True}, {}),
    "gaussian": ({"init": "gaussian"}, {"init_lora_weights": "gaussian"}),
    "orthogonal": ({"init": "orthogonal"}, {"init_lora_weights": "orthogonal"}),
    "pissa": ({"init": "pissa"}, {"init_lora_weights": "pissa"}),
    "pissa, frozen A": ({"init": "pissa", "freeze_a": True}, {"init_lora_weights": "pissa"}),
    "olora": ({"init": "olora"}, {"init_lora_weights": "olora"}),
    "olora, rslora, patterns": (
        {"init": "olora", "scaling": "rslora", "rank_pattern": {"FIRST": 6}, "alpha_pattern": {"FIRST": 5.0}},
        {},
    ),
    "eva": ({"init": "eva"}, {}),
    "eva, rslora, patterns": (
        {"init": "eva", "scaling": "rslora", "rank_pattern": {"FIRST": 6}, "alpha_pattern": {"FIRST": 5.0}},
        {},
    ),
    "eva, many ranks to few layers": ({"init": "eva", "rank": 1, "eva_rho": 8.0}, {}),
    "bias of adapters": ({"bias": "adapter"}, {"bias": "lora_only"}),
    "every bias": ({"bias": "all"}, {"bias": "all"}),
    "embedding": ({"targets": ["FIRST", "EMBED"]}, {"target_modules": ["FIRST", "EMBED"]}),
    "embedding, rslora, patterns": (
        {"targets": ["FIRST", "EMBED"], "scaling": "rslora", "rank_pattern": {"EMBED": 6}},
        {"target_modules": ["FIRST", "EMBED"], "use_rslora": True, "rank_pattern": {"EMBED": 6}},
    ),
    "embedding and head": (
        {"targets": ["FIRST", "EMBED", "lm_head"], "init": "orthogonal"},
        {"target_modules": ["FIRST", "EMBED", "lm_head"], "init_lora_weights": "orthogonal"},
    ),
    "tokens": ({"train_tokens": ["7", "90", "95"]}, {"trainable_token_indices": "TOKENS"}),
    "tokens, norm, biases": (
        {"train_tokens": ["90"], "train_also": ["NORM"], "bias": "adapter"},
        {"trainable_token_indices": "TOKENS", "modules_to_save": ["NORM"], "bias": "lora_only"},
    ),
    "norm": ({"train_also": ["NORM"]}, {"modules_to_save": ["NORM"]}),
    "norm, embedding, head": (
        {"train_also": ["NORM", "lm_head", "EMBED"]},
        {"modules_to_save": ["NORM", "lm_head", "EMBED"]},
    ),
    "norm, biases": (
        {"train_also": ["NORM"], "bias": "adapter"},
        {"modules_to_save": ["NORM"], "bias": "lora_only"},
    ),
}
FACTORS = [name for name in VARIANTS if not re.search("bias|norm|tokens", name)]
CASES = [(name, kind) for name in FACTORS for kind in ("llama", "gpt2")]
CASES += [(name, kind) for name in VARIANTS if name not in FACTORS for kind in ("qwen2", "gpt2")]
CASES += [(name, "qwen2") for name in FACTORS if "embedding" in name]
CASES += [("pissa", "qwen2"), ("norm", "llama"), ("norm, embedding, head", "llama"), ("tokens", "llama")]
"""Every variant on layers that store (out, in) and (in, out); on both kinds of bias and of head besides."""


class Source:
    """What a start may ask for, from rows and models that are made up; `state` is that of a checkpoint."""

    def __init__(self, architecture: str, state: Mapping[str, torch.Tensor] | None = None) -> None:
        self.full, self.state = make_model(architecture), state
        rows = list(enumerate(make_rows(24)))
        self.fixed = [
            batch
            for part in (rows[:8], rows[8:16], rows[16:])
            for batch in pad_batches(part, tokens=4096, pad_id=0, device=torch.device("cpu"))
        ]

    def batches(self) -> Iterator[Batch]:
        """Yield three batches again and again."""
        return itertools.cycle(self.fixed)

    def full_weight(self, path: str) -> torch.Tensor:
        """Return the float32 model's weight, (out, in)."""
        layer = self.full.get_submodule(path)
        return layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()

    def agree(self, tensors: Sequence[torch.Tensor]) -> None:
        """There is one process."""

    def resumed(self) -> Mapping[str, torch.Tensor] | None:
        """Return what was given."""
        return self.state


def settings(name: str, architecture: str, whose: int) -> dict[str, Any]:
    """Return a variant's settings, ours (0) or PEFT's (1)."""
    text = json.dumps(VARIANTS[name][whose])
    for word, own in WORDS[architecture].items():
        text = text.replace(word, own)
    found: dict[str, Any] = json.loads(text)
    if found.get("trainable_token_indices"):  # a head of its own is trained in the same rows
        ids = [int(token) for token in VARIANTS[name][0]["train_tokens"]]
        untied = {"embed_tokens": ids, "lm_head": ids}
        found["trainable_token_indices"] = untied if architecture == "qwen2" else ids
    return found


def ours(
    name: str, architecture: str, dtype: torch.dtype = torch.float32, quantize: str | None = None
) -> tuple[PreTrainedModel, Method]:
    """Return a model with a variant in it, as a recipe would place it."""
    chosen = {"rank": 4, "alpha": 6.0, "targets": TARGETS[architecture], **settings(name, architecture, 0)}
    model = make_model(architecture, dtype, quantize=quantize)
    method = adapters.build(LoraAdapter(**chosen), seed=1)
    method.learn_tokens(lambda names: [int(name) for name in names])
    method.prepare(model, Source(architecture))
    method.inject(model)
    return model, method


def base_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return what the base holds, by the names it had before injection."""
    state = model.state_dict()
    inner = {key.replace(".base.", "."): value for key, value in state.items() if ".base." in key}
    return state | inner


def theirs(name: str, architecture: str) -> torch.nn.Module:
    """Return PEFT's model of the same variant."""
    values: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[architecture]}
    values |= settings(name, architecture, 1)
    return peft.get_peft_model(make_model(architecture), peft.LoraConfig(task_type="CAUSAL_LM", **values))


def start_embeddings_alike(method: Method, other: torch.nn.Module) -> None:
    """Give PEFT's adapters of embeddings our initial values."""
    with torch.no_grad():
        for path, layer in method.layers.items():
            if isinstance(layer, LoraEmbedding):
                module = other.get_submodule(f"base_model.model.{path}")
                module.lora_embedding_A["default"].copy_(layer.lora_embedding_A)
                module.lora_embedding_B["default"].copy_(layer.lora_embedding_B)


def stir(parameters: Any) -> None:
    """Move every trained parameter, so that the update is not nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Return the logits of fixed tokens."""
    return model(input_ids=torch.arange(1, 41).view(2, 20), use_cache=False).logits


def difference(one: torch.nn.Module, other: torch.nn.Module) -> float:
    """Return the largest difference of two models' logits."""
    return float((logits(one) - logits(other)).abs().max())
