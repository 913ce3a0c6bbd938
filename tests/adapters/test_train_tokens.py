"""Rows of a few tokens trained alone: what moves, tied and other heads, the memory, and tables that grow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lora_variants import difference, logits, ours, stir, theirs
from small import make_model, make_rows
from test_lora_training import adamw, follow, start_alike
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PhiConfig, PreTrainedModel

from lora_cli import adapters
from lora_cli.adapters import Method, _peft
from lora_cli.adapters._lora_rows import TrainedRows, grow
from lora_cli.errors import InputError
from lora_cli.models.adapted import AdaptedModel
from lora_cli.objectives.sft import Sft
from lora_cli.recipe.schema import LoraAdapter
from lora_cli.runtime.optim import MasterAdamW
from lora_cli.types import Progress

IDS = [7, 90, 95]


def inject(model: PreTrainedModel, **settings: Any) -> Method:
    """Return LoRA in the model, with the rows of IDS trained besides."""
    block = LoraAdapter(rank=4, **{"targets": ["q_proj"], "train_tokens": [str(i) for i in IDS], **settings})
    method = adapters.build(block, 1)
    method.learn_tokens(lambda names: [int(name) for name in names])
    method.inject(model)
    return method


def merged_tables(model: PreTrainedModel, method: Method) -> dict[str, torch.Tensor]:
    """Return embedding and head with the update in them."""
    for part in method.placed().values():
        part.merge()
    tables = {
        path: part.base.weight.detach().clone()
        for path, part in method.placed().items()
        if isinstance(part, TrainedRows)
    }
    for part in method.placed().values():
        part.unmerge()
    return tables


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_these_rows_move(architecture: str, dtype: torch.dtype) -> None:
    """Trained with weight decay, all other rows of embedding and head keep their bits, and these have moved in both."""
    model, base = make_model(architecture, dtype), make_model(architecture, dtype)
    method = inject(model, targets=["c_attn" if architecture == "gpt2" else "q_proj"])
    adapted, objective = AdaptedModel(model, method.placed()), Sft(pad_id=0)
    optimizer = MasterAdamW(method.trainable(model), weight_decay=0.1)
    model.train()
    for step in range(3):
        for batch in objective.micro_batches(
            adapted, list(enumerate(make_rows(16))), Progress(step, 3), tokens=999
        ):
            objective.loss_sum(adapted, batch)[0].backward()
        optimizer.step(1e-2)
        optimizer.zero_grad()
    others = [i for i in range(96) if i not in IDS]
    tables = merged_tables(model, method)
    assert len(tables) == 2
    for path, table in tables.items():
        before = base.get_submodule(path).weight
        assert torch.equal(table[others], before[others])
        assert all(not torch.equal(table[i], before[i]) for i in IDS)
    first, second = tables.values()
    assert torch.equal(first, second) is (architecture != "qwen2")
    assert all(
        torch.equal(model.get_submodule(path).base.weight, base.get_submodule(path).weight) for path in tables
    )


def test_gradient_and_moments_are_of_these_rows() -> None:
    """What is trained beside LoRA is n rows of the width, once where tied and twice where not, in float32."""
    for architecture, count in (("llama", 1), ("qwen2", 2)):
        for quantize in (None, "nf4"):
            model = make_model(architecture, torch.bfloat16, quantize=quantize)
            trained = inject(model).trainable(model)
            own = {name: parameter for name, parameter in trained.items() if "trainable_tokens" in name}
            assert [tuple(parameter.shape) for parameter in own.values()] == [(3, 32)] * count
            assert all(parameter.dtype == torch.float32 for parameter in own.values())
            assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained.values()}


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_losses_follow_pefts(architecture: str) -> None:
    """30 steps in fp32 from the same start keep the losses of PEFT's model to 1e-4, tied and untied."""
    model, method = ours("tokens", architecture)
    other = theirs("tokens", architecture)
    start_alike(method, other)
    assert follow(model, method, other, adamw(other)) <= 1e-4


def test_a_scaled_embedding(tmp_path: Path) -> None:
    """Where the module scales its rows (Gemma) the model starts as its base, and merged and PEFT's are it to 1e-5."""
    config = Gemma3TextConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0,
    )  # fmt: skip

    def make(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

    for dtype in (torch.float32, torch.bfloat16):
        model = make(dtype)
        inject(model)
        ids = torch.tensor([IDS])
        embed = model.get_input_embeddings()
        assert torch.equal(embed(ids), make(dtype).get_input_embeddings()(ids))
    model = make()
    method = inject(model)
    stir(method.trainable(model).values())
    _peft.write(tmp_path, method, base_name="base", revision=None)
    assert difference(peft.PeftModel.from_pretrained(make(), tmp_path).eval(), model) <= 1e-5
    live = logits(model)
    for part in method.placed().values():
        part.merge()
    assert float((logits(model) - live).abs().max()) <= 1e-5


@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_pefts_choice_of_modules_is_read(names: list[str], tmp_path: Path) -> None:
    """An untied model of PEFT's with rows in the embedding, the head, or other ones in each, is read to 1e-5."""
    indices = {name: IDS[index:] for index, name in enumerate(names)}
    config = peft.LoraConfig(
        target_modules=["q_proj"], trainable_token_indices=indices, task_type="CAUSAL_LM"
    )
    live = peft.get_peft_model(make_model("qwen2"), config).eval()
    stir(parameter for parameter in live.parameters() if parameter.requires_grad)
    live.save_pretrained(tmp_path)
    model = make_model("qwen2")
    method = adapters.load(tmp_path, model)
    assert difference(model, live) <= 1e-5
    written = method.disk_config()["trainable_token_indices"]
    paths = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}
    assert written == (
        IDS if names == ["embed_tokens"] else {paths[name]: ids for name, ids in indices.items()}
    )


def test_pefts_two_names_of_one_table_are_read(tmp_path: Path) -> None:
    """A tied model of PEFT's, in which head and embedding are both named, has one trained matrix in ours too."""
    config = peft.LoraConfig(
        target_modules=["c_attn"], trainable_token_indices={"lm_head": IDS, "wte": IDS}, task_type="CAUSAL_LM"
    )
    live = peft.get_peft_model(make_model("gpt2"), config).eval()
    stir(parameter for parameter in live.parameters() if parameter.requires_grad)
    live.save_pretrained(tmp_path)
    model = make_model("gpt2")
    method = adapters.load(tmp_path, model)
    assert difference(model, live) <= 1e-5
    first, second = method.whole.values()
    assert first.trainable_tokens_delta is second.trainable_tokens_delta


@pytest.mark.parametrize(
    "value",
    [
        [96 * 2],
        [10**12],
        {"encoder": [5]},
        [5, 5],
        [-1],
        {"lm_head": []},
        {"embed_tokens": [5], "lm_head": [6]},
    ],
)
def test_tokens_in_a_file_that_fit_no_model_are_refused(value: Any, tmp_path: Path) -> None:
    """Tokens far beyond the table, twice, of no module, or at odds with a tied head are refused, nothing allocated."""
    _peft.write(tmp_path, inject(make_model("llama")), base_name="base", revision=None)
    config = json.loads((tmp_path / _peft.CONFIG_FILE).read_text())
    config["trainable_token_indices"] = value
    (tmp_path / _peft.CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(InputError, match="trainable_token_indices"):
        adapters.load(tmp_path, make_model("llama"))


def test_what_does_not_go_is_refused() -> None:
    """A table that is trained otherwise, and a head with a bias, are named, with what to do."""
    for settings in ({"train_also": ["lm_head"]}, {"targets": ["embed_tokens"]}, {"targets": ["lm_head"]}):
        for architecture in ("llama", "qwen2"):
            with pytest.raises(
                InputError, match=r"adapter\.train_tokens: .* has an adapter or is trained whole"
            ):
                inject(make_model(architecture), **settings)
    config = PhiConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    with pytest.raises(InputError, match="lm_head has a bias"):
        inject(AutoModelForCausalLM.from_config(config))


def test_new_tokens_are_trained_beside_the_adapters() -> None:
    """A table that grows leaves the adapters trainable, and its new rows start at the mean in embedding and head."""
    for architecture in ("llama", "qwen2"):
        model, base = make_model(architecture), make_model(architecture)
        method = inject(model, train_tokens=["7"], add_tokens=["97", "96"])
        trained = method.trainable(model)
        assert len([name for name in trained if "lora_" in name]) == 4
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained.values()}
        for path, part in method.rows.items():  # type: ignore[attr-defined]
            old = base.get_submodule(path).weight
            assert torch.equal(part.trainable_tokens_delta[0], old[7])
            assert float((part.trainable_tokens_delta[1:] - old.mean(0)).abs().max()) <= 1e-6


def test_a_table_grows_with_the_mean() -> None:
    """New rows of embedding and head are the mean of the old ones, which keep their bits; what was tied stays tied."""
    for architecture in ("llama", "qwen2", "gpt2"):
        model, base = make_model(architecture, torch.bfloat16), make_model(architecture, torch.bfloat16)
        grow(model, 96)
        assert torch.equal(logits(model), logits(base))
        grow(model, 99)
        for table, old in (
            (model.get_input_embeddings().weight, base.get_input_embeddings().weight),
            (model.lm_head.weight, base.lm_head.weight),
        ):
            assert table.shape == (99, 32)
            assert torch.equal(table[:96], old)
            assert torch.equal(table[96:], old.float().mean(0).bfloat16().expand(3, -1))
            assert not table.requires_grad
        assert (model.lm_head.weight is model.get_input_embeddings().weight) is (architecture != "qwen2")
        assert torch.equal(logits(model)[..., :96], logits(base))
