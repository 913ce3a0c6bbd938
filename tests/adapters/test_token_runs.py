"""New and chosen tokens in whole runs: from recipe to merged model, resumed, in bfloat16, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lora_variants import difference
from toy import rows, write_base, write_recipe, write_rows, write_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_cli import pipeline, without_training
from lora_cli.adapters import _peft
from lora_cli.data.render import Renderer
from lora_cli.errors import InputError
from lora_cli.models.load import load_tokenizer
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.schema import Recipe

CONTROL = "<|endoftext|>"
"""A control token that the toy tokenizer has and its template does not write."""


def tool_rows(number: int, mark: str) -> list[dict[str, str]]:
    """Return rows whose answers begin with a mark."""
    return [{**row, "completion": f"{mark} {row['completion']}"} for row in rows(number)]


def job(folder: Path, base: Path, mark: str, **changes: Any) -> Recipe:
    """Return a recipe over rows that hold a mark."""
    path = write_recipe(
        folder, base, **{"export__formats": ["merged", "peft"], "train__max_steps": 3, **changes}
    )
    write_rows(folder / "train.jsonl", tool_rows(40, mark))
    write_rows(folder / "eval.jsonl", tool_rows(11, mark))
    return load_recipe(path)


@pytest.mark.parametrize(
    ("key", "mark", "quantize"),
    [("train_tokens", CONTROL, "none"), ("add_tokens", "<tool>", "none"), ("add_tokens", "<tool>", "nf4")],
)
def test_a_run_trains_its_tokens_in_every_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, mark: str, quantize: str
) -> None:
    """On a tied base, adapter, merged model and the command `merge` score as the run; only these rows have changed."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    base = write_base(tmp_path / "base")
    adapter = {"method": "lora", "rank": 4, key: [mark]}
    recipe = job(
        tmp_path, base, mark, adapter=adapter, model__quantize=quantize, train__weight_decay=0.1,
        evaluate__metrics=["loss", "exact_match"],
    )  # fmt: skip
    summary = pipeline.train(recipe)
    run = tmp_path / "run"
    scores = summary["eval"]["tuned"]
    merge_limit = 1e-5 if quantize == "none" else 1e9
    assert without_training.merge(run, tmp_path / "again", recipe)["max_logit_difference"] <= merge_limit
    for target in (run, run / "adapter", run / "merged", tmp_path / "again"):
        if quantize == "none" or target in (run, run / "adapter"):
            assert without_training.evaluate(target, recipe)["tuned"]["loss"] == pytest.approx(
                scores["loss"], rel=1e-5
            )
    original = AutoModelForCausalLM.from_pretrained(base)
    old = original.get_input_embeddings().weight
    known = len(old)
    for folder in (run / "merged", tmp_path / "again"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        (token,) = tokenizer(mark)["input_ids"]
        assert (token == known) is (key == "add_tokens")
        merged = AutoModelForCausalLM.from_pretrained(folder)
        table = merged.get_input_embeddings().weight
        same = [i for i in range(known) if i != token]
        assert torch.equal(table[same], old[same])
        assert len(table) == merged.config.vocab_size == max(known, token + 1)
        assert merged.lm_head.weight is table
        assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    card = (run / "adapter" / "README.md").read_text()
    assert (f"resize_token_embeddings({known + 1})" in card) is (key == "add_tokens")
    if key == "add_tokens":
        original.resize_token_embeddings(known + 1)
    loaded = peft.PeftModel.from_pretrained(original, run / "adapter").eval()
    if quantize == "none":
        assert difference(loaded, AutoModelForCausalLM.from_pretrained(run / "merged").eval()) <= 1e-5
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == [token]


@pytest.mark.parametrize(
    "settings",
    [{"add_tokens": ["<tool>"], "train_tokens": ["Ġsays"]}, {"targets": ["q_proj", "embed_tokens"]}],
    ids=["tokens", "embedding"],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """Continued from step 2 of 4 with new tokens or an adapted embedding, a run ends in the same adapter."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    base = write_base(tmp_path / "base")
    adapter = {"method": "lora", "rank": 4, **settings}
    files = []
    for name, steps in (("straight", [4]), ("stopped", [2, 4])):
        for total in steps:
            recipe = job(
                tmp_path / name, base, "<tool>", adapter=adapter, export__formats=["peft"],
                train__max_steps=total, train__save_every=2, train__schedule="constant",
            )  # fmt: skip
            pipeline.train(recipe, resume=total == 4 and name == "stopped")
        files.append((tmp_path / name / "run" / "adapter" / _peft.TENSOR_FILE).read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            {"train_tokens": ["<|im_strat|>"]},
            r"adapter\.train_tokens: '<\|im_strat\|>' is no token .*im_start",
        ),
        ({"train_tokens": ["<tool>"]}, r"a new one goes under adapter\.add_tokens"),
        ({"add_tokens": ["<|im_end|>"]}, r"is a token of the model already, 2 \(put it under"),
        ({"add_tokens": ["<never>"]}, "no row of data.train has '<never>'"),
    ],
)
def test_names_are_checked_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: dict[str, Any], message: str
) -> None:
    """A token that does not exist, exists already, or is in no row: one line that says what to do, no run folder."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    recipe = job(tmp_path, write_base(tmp_path / "base"), "!", adapter={"method": "lora", **adapter})
    with pytest.raises(InputError, match=message):
        pipeline.train(recipe)
    assert not (tmp_path / "run").exists()


def test_a_named_control_token_may_stand_in_a_message(tmp_path: Path) -> None:
    """A control token that is trained is one in a message too; one that ends answers stays text, named or not."""
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for spelled in ([], [CONTROL], [CONTROL, "<|im_end|>"]):
        controls = Renderer(tokenizer, "model", "assistant", spelled).controls
        assert (CONTROL in controls) is not bool(spelled)
        assert "<|im_end|>" in controls


@pytest.mark.parametrize(
    "settings",
    [{"add_tokens": ["<tool>"]}, {"targets": ["embed_tokens"]}, {"train_also": ["embed_tokens"]}],
    ids=["tokens", "embedding", "whole"],
)
def test_a_bfloat16_run_is_merged_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """With float32 weights trained in the embedding of an untied bfloat16 base, the merged model is bfloat16."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    base = write_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0).contiguous())
    model.save_pretrained(base)
    adapter = {"method": "lora", "rank": 4, **settings}
    recipe = job(tmp_path, base, "<tool>", adapter=adapter, model__dtype="bfloat16")
    assert pipeline.train(recipe)["status"] == "done"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged", dtype="auto")
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}


def test_tokens_named_twice_are_refused(tmp_path: Path) -> None:
    """A token that is listed twice, or under both keys, is a conflict of the recipe."""
    for adapter in (
        {"train_tokens": ["<a>", "<a>"]},
        {"add_tokens": ["<a>", "<a>"]},
        {"train_tokens": ["<a>"], "add_tokens": ["<a>"]},
    ):
        path = write_recipe(tmp_path, Path("tiny"), adapter={"method": "lora", **adapter})
        with pytest.raises(InputError, match=r"adapter\.\w+_tokens: found '<a>'"):
            load_recipe(path)
