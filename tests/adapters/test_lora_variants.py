"""LoRA's variants: their algebra, PEFT's disk format in both directions, and training against PEFT's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import make_model, make_rows
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from lora_cli import adapters
from lora_cli.adapters import Method, _patterns, _peft
from lora_cli.adapters.lora import Lora, LoraLinear
from lora_cli.errors import InputError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.objectives.sft import Sft
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.schema import LoraAdapter
from lora_cli.runtime.optim import MasterAdamW
from lora_cli.types import Progress

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
    "bias of adapters": ({"bias": "adapter"}, {"bias": "lora_only"}),
    "every bias": ({"bias": "all"}, {"bias": "all"}),
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
FACTORS = [name for name in VARIANTS if "bias" not in name and "norm" not in name]
CASES = [(name, kind) for name in FACTORS for kind in ("llama", "gpt2")]
CASES += [(name, kind) for name in VARIANTS if name not in FACTORS for kind in ("qwen2", "gpt2")]
CASES += [("pissa", "qwen2"), ("norm", "llama"), ("norm, embedding, head", "llama")]
"""Every variant on layers that store (out, in) and (in, out); on both kinds of bias and of head where it trains them."""


def settings(name: str, architecture: str, whose: int) -> dict[str, Any]:
    """Return a variant's settings, ours (0) or PEFT's (1)."""
    text = json.dumps(VARIANTS[name][whose])
    for word, own in WORDS[architecture].items():
        text = text.replace(word, own)
    found: dict[str, Any] = json.loads(text)
    return found


def ours(name: str, architecture: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Method]:
    """Return a model with a variant in it, as a recipe would place it."""
    block = LoraAdapter(rank=4, alpha=6.0, targets=TARGETS[architecture], **settings(name, architecture, 0))
    model = make_model(architecture, dtype)
    method = adapters.build(block, seed=1)
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


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_unchanged_at_injection_and_merged_as_forward(name: str, architecture: str) -> None:
    """The injected model is the base; moved, its merged weights compute what it does and its base is bit-equal."""
    base = make_model(architecture)
    model, method = ours(name, architecture)
    assert difference(model, base) <= 1e-5
    stir(method.trainable(model).values())
    live = logits(model)
    assert float((live - logits(base)).abs().max()) > 0.01
    for layer in method.placed().values():
        layer.merge()
    assert float((logits(model) - live).abs().max()) <= 1e-5
    for layer in method.placed().values():
        layer.unmerge()
    assert torch.equal(logits(model), live)
    with AdaptedModel(model, method.placed()).reference():
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model), live)
    found = base_tensors(model)
    assert all(torch.equal(found[key], value) for key, value in base.state_dict().items())
    trained = {id(parameter) for parameter in method.trainable(model).values()}
    assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == trained


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_peft_reads_ours_and_we_read_it_back(name: str, architecture: str, tmp_path: Path) -> None:
    """PEFT and we load our file with the live model's logits to 1e-5; PEFT would write the same keys."""
    model, method = ours(name, architecture)
    stir(method.trainable(model).values())
    _peft.write(tmp_path, method, base_name="base", revision=None)
    loaded = peft.PeftModel.from_pretrained(make_model(architecture), tmp_path).eval()
    assert difference(loaded, model) <= 1e-5
    assert set(peft.get_peft_model_state_dict(loaded)) == set(load_file(tmp_path / _peft.TENSOR_FILE))
    loaded.save_pretrained(tmp_path / "again")  # PEFT sorts what it writes
    for folder in (tmp_path, tmp_path / "again"):
        again = make_model(architecture)
        adapters.load(folder, again)
        assert difference(again, model) <= 1e-5


@pytest.mark.parametrize(
    ("name", "architecture"), [case for case in CASES if not case[0].startswith(("pissa", "olora"))]
)
def test_ours_reads_pefts(name: str, architecture: str, tmp_path: Path) -> None:
    """We load what PEFT wrote of the same variant with its logits to 1e-5, and would have made the same tensors."""
    live = theirs(name, architecture).eval()
    stir(parameter for parameter in live.parameters() if parameter.requires_grad)
    live.save_pretrained(tmp_path)
    model = make_model(architecture)
    adapters.load(tmp_path, model)
    assert difference(model, live) <= 1e-5
    assert difference(model, make_model(architecture)) > 0.01
    tensors = load_file(tmp_path / _peft.TENSOR_FILE)
    mine = _peft.places(ours(name, architecture)[1])
    assert {key: value.shape for key, value in mine.items()} == {k: v.shape for k, v in tensors.items()}


def follow(
    model: PreTrainedModel,
    method: Method,
    other: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    rate: float = 2e-3,
    steps: int = 30,
) -> float:
    """Train both side by side on the same rows; return the largest relative difference of their losses."""
    rows = make_rows(4 * steps, seed=9)
    adapted, objective = AdaptedModel(model, method.placed()), Sft(pad_id=0)
    trainable = method.trainable(model)
    factors = {name: method.rate_factor(name) for name in trainable}
    mine = MasterAdamW(trainable, rate_factors=factors)
    model.train()
    other.train()
    worst = 0.0
    for step in range(steps):
        batch_rows = rows[4 * step : 4 * step + 4]
        (batch,) = objective.micro_batches(
            adapted, list(enumerate(batch_rows)), Progress(step, steps), tokens=9999
        )
        loss = objective.loss_sum(adapted, batch)[0] / objective.units(batch)
        loss.backward()
        mine.step(rate)
        mine.zero_grad()
        # Plain torch, padded at the right, where a causal model does not look: nothing of ours is used.
        ids = pad_sequence([torch.from_numpy(row.input_ids).long() for row in batch_rows], batch_first=True)
        keep = pad_sequence([torch.from_numpy(row.trained) for row in batch_rows], batch_first=True)[:, 1:]
        expected = F.cross_entropy(other(input_ids=ids).logits[:, :-1][keep], ids[:, 1:][keep])
        expected.backward()
        optimizer.step()
        optimizer.zero_grad()
        worst = max(worst, abs(float(loss.detach()) - float(expected.detach())) / float(expected.detach()))
    return worst


def start_alike(method: Method, other: torch.nn.Module) -> None:
    """Give PEFT's model our initial values."""
    with torch.no_grad():
        for path, layer in method.layers.items():
            if isinstance(layer, LoraLinear):
                module = other.get_submodule(f"base_model.model.{path}")
                module.lora_A["default"].weight.copy_(layer.lora_A)
                module.lora_B["default"].weight.copy_(layer.lora_B)


def adamw(model: torch.nn.Module, rate: float = 2e-3) -> torch.optim.Optimizer:
    """Return torch's AdamW over what is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, foreach=False)


def freeze_a(model: torch.nn.Module) -> None:
    """Freeze PEFT's A."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        (name, "llama")
        for name in (
            "rslora",
            "patterns",
            "layers",
            "frozen A",
            "orthogonal",
            "pissa",
            "pissa, frozen A",
            "olora",
            "norm",
        )
    ]
    + [("bias of adapters", "qwen2"), ("every bias", "gpt2"), ("norm, biases", "gpt2")],
)
def test_losses_follow_pefts(name: str, architecture: str) -> None:
    """30 steps in fp32 from the same start keep the losses of PEFT's model to 1e-4."""
    model, method = ours(name, architecture)
    other = theirs(name, architecture)
    start_alike(method, other)
    if "frozen A" in name:
        freeze_a(other)
    assert follow(model, method, other, adamw(other)) <= 1e-4


def test_lora_plus_follows_pefts() -> None:
    """30 steps with a ratio of 8 keep the losses of PEFT's LoRA+ optimizer to 1e-4, and are not plain LoRA's."""
    model = make_model("llama")
    method = adapters.build(LoraAdapter(rank=4, alpha=6.0, plus_ratio=8.0), seed=1)
    method.inject(model)
    values = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    other = peft.get_peft_model(make_model("llama"), peft.LoraConfig(**values))
    start_alike(method, other)
    optimizer = create_loraplus_optimizer(other, torch.optim.AdamW, lr=5e-4, loraplus_lr_ratio=8.0)
    assert follow(model, method, other, optimizer, rate=5e-4) <= 1e-4
    plain = make_model("llama")
    method = adapters.build(LoraAdapter(rank=4, alpha=6.0), seed=1)
    method.inject(plain)
    assert difference(plain, make_model("llama")) == 0.0
    other = peft.get_peft_model(make_model("llama"), peft.LoraConfig(**values))
    start_alike(method, other)
    optimizer = create_loraplus_optimizer(other, torch.optim.AdamW, lr=5e-4, loraplus_lr_ratio=8.0)
    assert follow(plain, method, other, optimizer, rate=5e-4, steps=5) > 1e-4


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_start_is_pefts(init: str) -> None:
    """B0 A0 is PEFT's to 1e-5, without and with a bias, and PEFT's base plus it is the original base."""
    for architecture in ("llama", "qwen2"):
        _, method = ours(init, architecture)
        other = theirs(init, architecture)
        for path, layer in method.layers.items():
            assert isinstance(layer, LoraLinear)
            module = other.get_submodule(f"base_model.model.{path}")
            start = layer.scale * layer.lora_B @ layer.lora_A
            assert float((start - module.get_delta_weight("default")).abs().max()) <= 1e-5
            assert float((module.base_layer.weight + start - layer.base.weight).abs().max()) <= 1e-5


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pefts_conversion_is_read_and_its_raw_form_refused(init: str, tmp_path: Path) -> None:
    """We read what PEFT converts to plain LoRA to 1e-5, and refuse what fits only the base that PEFT has changed."""
    live = theirs(init, "llama").eval()
    live.peft_config["default"].init_lora_weights = True
    live.save_pretrained(tmp_path / "start")
    live.peft_config["default"].init_lora_weights = init
    stir(parameter for parameter in live.parameters() if parameter.requires_grad)
    live.save_pretrained(tmp_path / "raw")
    with pytest.raises(InputError, match="leaves the base as it is"):
        adapters.load(tmp_path / "raw", make_model("llama"))
    live.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    model = make_model("llama")
    adapters.load(tmp_path / "converted", model)
    assert difference(model, live) <= 1e-5


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_shifted_start_is_exact(init: str, architecture: str) -> None:
    """In float32 and bfloat16 the injected model is the base bit for bit, and dropout does not change that."""
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(architecture, dtype)
        before = logits(model)
        Lora(rank=4, alpha=6.0, init=init, dropout=0.5).inject(model)
        assert torch.equal(logits(model.train()), before)


def test_orthogonal_halves() -> None:
    """A and B are not zero, B A is zero to rounding, and the columns of both span orthogonal spaces."""
    _, method = ours("orthogonal", "llama")
    for layer in method.layers.values():
        assert isinstance(layer, LoraLinear)
        assert float(layer.lora_A.std()) > 0.05
        assert float(layer.lora_B.std()) > 0.05
        assert float((layer.lora_B @ layer.lora_A).abs().max()) <= 1e-6


def test_a_rank_that_the_weight_has_not_is_refused() -> None:
    """PiSSA and OLoRA cannot take more directions than a weight has; the module and its shape are named."""
    for init in ("pissa", "olora"):
        with pytest.raises(InputError, match=r"self_attn.k_proj, whose weight \(16, 32\) has 16"):
            adapters.build(LoraAdapter(rank=17, init=init, targets=["k_proj"]), 0).inject(make_model("llama"))


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
        ("adapter.layers=last", "adapter.layers"),
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
    lasting = _patterns.lasting(patterns, paths)
    for order in (lasting, dict(reversed(lasting.items()))):
        for path in paths:
            assert _patterns.value_at(order, path, 1) == _patterns.value_at(patterns, path, 1)
    assert _patterns.lasting({"q_proj": 4, "a": 2}, paths) == {"a": 2, "q_proj": 4}


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
            assert (_patterns.value_at({pattern: 1}, path, 0) == 1) is (rule([pattern], path) == pattern)


def test_tied_modules_are_trained_as_one() -> None:
    """Either name trains the shared matrix once, in both places, and merging gives both its values."""
    for name in ("lm_head", "embed_tokens"):
        model = make_model("llama")
        method = adapters.build(LoraAdapter(train_also=[name], targets=["q_proj"]), 0)
        method.inject(model)
        assert sorted(method.whole) == ["lm_head", "model.embed_tokens"]
        assert method.whole["lm_head"].weight is method.whole["model.embed_tokens"].weight
        assert [key for key in method.trainable(model) if "lora" not in key] == ["model.embed_tokens.weight"]
        stir([method.whole["lm_head"].weight])
        for part in method.placed().values():
            part.merge()
        assert torch.equal(model.lm_head.base.weight, model.get_input_embeddings().base.weight)


def test_pefts_head_alone_on_a_tied_model_is_read(tmp_path: Path) -> None:
    """PEFT trains the head of a tied model apart from the embedding; read by us, it is apart as well."""
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    live = peft.get_peft_model(make_model("llama"), config).eval()
    stir(parameter for parameter in live.parameters() if parameter.requires_grad)
    live.save_pretrained(tmp_path)
    model = make_model("llama")
    method = adapters.load(tmp_path, model)
    assert list(method.whole) == ["lm_head"]
    assert difference(model, live) <= 1e-5


def test_bfloat16_keeps_small_updates() -> None:
    """Biases and whole modules are trained in float32 beside a bfloat16 base, and start as it is, bit for bit."""
    base = make_model("gpt2", torch.bfloat16)
    for name in ("every bias", "norm, embedding, head", "norm, biases"):
        model, method = ours(name, "gpt2", torch.bfloat16)
        assert torch.equal(logits(model), logits(base))
        assert all(parameter.dtype == torch.float32 for parameter in method.trainable(model).values())
