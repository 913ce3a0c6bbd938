"""Which layers, ranks and alphas LoRA's keys choose, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from lora_variants import ours
from small import make_model

from lora_cli import adapters
from lora_cli.adapters import _lora_patterns
from lora_cli.adapters._low_rank import LoraLinear
from lora_cli.errors import InputError
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.schema import LoraAdapter


def test_rslora_keeps_the_update_at_large_rank() -> None:
    """The scale is alpha / sqrt(r) (arXiv 2312.03732), layer by layer where ranks differ."""
    _, method = ours("rslora with patterns", "llama")
    for path, layer in method.layers.items():
        assert isinstance(layer, LoraLinear)
        assert layer.scale == 6.0 / math.sqrt(9 if path.endswith("q_proj") else 4)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("all", [0, 1]), ("first 1", [0]), ("last 1", [1]), ("last 2", [0, 1]), ("1-1", [1]), ([1, 0], [0, 1])],
)
def test_layers(layers: str | list[int], expected: list[int]) -> None:
    """Each form of `layers` names the decoder layers it says."""
    method = adapters.build(LoraAdapter(layers=layers, targets=["q_proj"]), seed=0)
    assert list(method.inject(make_model("llama"))) == [
        f"model.layers.{i}.self_attn.q_proj" for i in expected
    ]


def test_frozen_a_needs_no_layer_input() -> None:
    """With A frozen nothing of size (tokens, in) is kept for the backward pass beside what the frozen base keeps."""
    kept: list[int] = []
    layer = LoraLinear(torch.nn.Linear(64, 8).requires_grad_(False), rank=2, alpha=2.0)
    layer.reset(0)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    for frozen in (False, True):
        kept.clear()
        layer.lora_A.requires_grad_(not frozen)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(torch.randn(100, 64))
        assert (100 * 64 in kept) is not frozen


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank_pattern": {"q_prj": 2}}, "did you mean q_proj"),
        ({"alpha_pattern": {"v_proj": 2.0}, "targets": ["q_proj"]}, "matches none of the adapted modules"),
        ({"rank_pattern": {".*proj": 2, "q_proj": 3}}, "comes after patterns that match all it does"),
        ({"layers": "last 3"}, "the model has 2 layers (0 to 1)"),
        ({"layers": [2]}, "the model has 2 layers"),
        (
            {"layers": [0], "targets": ["q_proj", "lm_head"]},
            "'lm_head' matches no linear layer in the chosen",
        ),
        ({"layers": [1], "targets": r".*\.0\..*"}, "matches no linear layer in the chosen"),
        ({"bias": "all"}, "no such bias is in the model"),
        ({"train_also": ["norms"]}, "did you mean norm?"),
        ({"train_also": ["mlp"]}, "model.layers.0.mlp holds other modules (gate_proj"),
        ({"train_also": ["act_fn"]}, "has no parameters"),
        ({"train_also": ["q_proj"]}, "q_proj has an adapter already"),
        (
            {"train_also": ["embed_tokens"], "targets": ["lm_head"]},
            "lm_head has an adapter already, or shares",
        ),
    ],
)
def test_what_names_nothing_is_refused(values: dict[str, Any], message: str) -> None:
    """A pattern, layer or target that would have no effect on this model is an error that shows what would."""
    with pytest.raises(InputError) as caught:
        adapters.build(LoraAdapter(**values), seed=0).inject(make_model("llama"))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "adapter.rank_pattern={q_proj: 0}",
            "adapter.rank_pattern.q_proj: found 0 (must be an integer from 1 to",
        ),
        ("adapter.rank_pattern=[q_proj]", "must be a mapping of names to integer from 1 to 4096"),
        ("adapter.rank_pattern={'(': 1}", "is not a regular expression"),
        ("adapter.layers=last", "found 'last' (write all, first 8"),
        ("adapter.layers=5-2", "ends before it begins"),
        ("adapter.layers=[]", "found nothing"),
        ("adapter={init: orthogonal, rank: 4, rank_pattern: {q_proj: 3}}", "choose even ranks"),
        ("adapter={bias: all, train_also: [norm]}", "adapter.bias all trains parts of them"),
        ("adapter.modules_to_save=[norm]", "did you mean adapter.train_also"),
        ("adapter.scaling=rs", "must be one of standard, rslora"),
        ("adapter.use_rslora=true", "did you mean adapter.scaling"),
        ("adapter={freeze_a: true, plus_ratio: 4}", "A has no learning rate"),
    ],
)
def test_faulty_keys_are_told_by_name(override: str, message: str) -> None:
    """A value that no model could take is refused with the key before anything is loaded."""
    with pytest.raises(InputError) as caught:
        load_recipe(None, [override])
    assert message in str(caught.value)


def test_patterns_survive_sorting() -> None:
    """Patterns whose order decides are written as whole paths, which mean the same in any order."""
    paths = [f"model.layers.{layer}.q_proj" for layer in range(12)]
    patterns = {"z.*": 9, r".*\.1\.q_proj": 5, "q_proj": 4, ".*0.*": 3}
    lasting = _lora_patterns.lasting(patterns, paths)
    for order in (lasting, dict(reversed(lasting.items()))):
        for path in paths:
            assert _lora_patterns.value_at(order, path, 1) == _lora_patterns.value_at(patterns, path, 1)
    assert _lora_patterns.lasting({"q_proj": 4, "a": 2}, paths) == {"a": 2, "q_proj": 4}


def test_value_at_is_pefts_rule() -> None:
    """A pattern matches as PEFT's own `get_pattern_key` says."""
    rule: Callable[..., str] = peft.utils.other.get_pattern_key
    paths = ["model.layers.11.self_attn.q_proj", "model.layers.1.mlp.up_proj", "lm_head"]
    for pattern in (
        "q_proj",
        "proj",
        "1.self_attn.q_proj",
        r"layers\.1\..*",
        "(q|up)_proj",
        "head",
        "lm_head",
    ):
        for path in paths:
            assert (_lora_patterns.value_at({pattern: 1}, path, 0) == 1) is (rule([pattern], path) == pattern)
