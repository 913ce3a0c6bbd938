"""AdaLoRA's disk format against PEFT's, and whole runs: resumed, with the best weights, with the penalty."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adalora_runs import (
    STEPS,
    injected,
    logits,
    pefts,
    run,
    train_pefts,
)
from safetensors.torch import load_file
from small import make_model
from toy import rows, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_cli import adapters, pipeline
from lora_cli.adapters import _peft
from lora_cli.adapters._low_rank import LoraLinear
from lora_cli.errors import InputError
from lora_cli.recipe.load import load_recipe
from lora_cli.stages import train as train_stage

STATES = {"never pruned": 3, "mid-schedule": 14, "at the end": STEPS}


@pytest.mark.parametrize("state", STATES)
def test_peft_reads_ours(tmp_path: Path, architecture: str, state: str) -> None:
    """PEFT loads our file with an equal key set and logits to 1e-5, unpruned, between two updates, and pruned."""
    model, method = injected(architecture)
    run(model, method, STATES[state])
    model.eval()
    _peft.write(tmp_path, method, base_name="base", revision=None)
    loaded = peft.PeftModel.from_pretrained(make_model(architecture), tmp_path).eval()
    assert float((logits(loaded) - logits(model)).abs().max()) <= 1e-5
    assert float((logits(model) - logits(make_model(architecture))).abs().max()) > 0.01
    assert set(peft.get_peft_model_state_dict(loaded)) == set(load_file(tmp_path / _peft.TENSOR_FILE))
    reread = make_model(architecture)
    again = adapters.load(tmp_path, reread)
    assert float((logits(reread) - logits(model)).abs().max()) <= 1e-5
    written = json.loads((tmp_path / _peft.CONFIG_FILE).read_text())
    assert {key: written[key] for key in again.disk_config()} == again.disk_config()


@pytest.mark.parametrize("state", STATES)
def test_ours_reads_pefts(tmp_path: Path, architecture: str, state: str) -> None:
    """We load PEFT's file with logits to 1e-5, unpruned and pruned, and would write the same keys and settings."""
    model = pefts(architecture, deltaT=1)
    for _ in train_pefts(model, STATES[state]):
        pass
    model.eval()
    model.save_pretrained(tmp_path)
    reread = make_model(architecture)
    method = adapters.load(tmp_path, reread)
    assert float((logits(reread) - logits(model)).abs().max()) <= 1e-5
    tensors = load_file(tmp_path / _peft.TENSOR_FILE)
    assert {name: tensor.shape for name, tensor in _peft.places(method).items()} == {
        name: tensor.shape for name, tensor in tensors.items()
    }
    config = json.loads((tmp_path / _peft.CONFIG_FILE).read_text())
    for key, value in method.disk_config().items():
        assert config[key] == value, key


def test_a_layer_of_rank_0_goes_through_peft(tmp_path: Path) -> None:
    """A layer that lost every triplet is written, and read by PEFT and by us, as one that adds nothing."""
    model, method = injected()
    run(model, method)
    layer = next(iter(method.layers.values()))
    assert layer.kept is not None
    layer.kept.zero_()
    layer.prune()
    model.eval()
    _peft.write(tmp_path, method, base_name="base", revision=None)
    loaded = peft.PeftModel.from_pretrained(make_model("llama"), tmp_path).eval()
    reread = make_model("llama")
    adapters.load(tmp_path, reread)
    for other in (loaded, reread):
        assert float((logits(other) - logits(model)).abs().max()) <= 1e-5


PATTERN = "rank_pattern"
FIRST = "model.layers.0.self_attn.q_proj.lora_E"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({PATTERN: {"model.layers.7.self_attn.q_proj.lora_E": [True] * 6}}, "names model.layers.7.self_attn"),
        ({PATTERN: {FIRST: [True] * 5}}, "lists of init_r"),
        ({PATTERN: {FIRST: [1] * 6}}, "lists of init_r"),
        ({PATTERN: {FIRST: [True] + [False] * 5}}, "the layer needs (1,"),
        ({"init_r": 0}, "init_r is 0"),
        ({"total_step": None}, "total_step is None"),
        ({"beta1": 1.0}, "beta1 is 1.0"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"use_dora": True}, "use_dora is True"),
    ],
)
def test_a_faulty_adapter_is_refused(tmp_path: Path, edit: dict[str, Any], message: str) -> None:
    """Settings that do not fit the tensors, the model or the method are refused and named."""
    _, method = injected()
    _peft.write(tmp_path, method, base_name="base", revision=None)
    path = tmp_path / _peft.CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(InputError) as caught:
        adapters.load(tmp_path, make_model("llama"))
    assert message in str(caught.value)


def test_plain_factors_are_the_whole_update() -> None:
    """B A of the plain factors is the merged update to float32 rounding, in AdaLoRA and in LoRA, at the final rank."""
    model, method = injected()
    run(model, method)
    lora = LoraLinear(torch.nn.Linear(5, 3), rank=2, alpha=6.0)
    torch.nn.init.normal_(lora.lora_B)
    torch.nn.init.normal_(lora.lora_A)
    for layer in (*method.layers.values(), lora):
        a, b = layer.plain_factors()
        rank = 2 if isinstance(layer, LoraLinear) else int(layer.kept.sum())
        assert a.shape == (rank, layer.in_features)
        assert b.shape == (layer.out_features, rank)
        update = layer.merged_weight() - layer.base_weight()
        torch.testing.assert_close(b @ a, update, rtol=1e-5, atol=1e-6)


BLOCK = {"method": "adalora", "initial_rank": 4, "target_rank": 2, "alpha": 32.0, "dropout": 0.1}
BLOCK |= {"tinit": 2, "tfinal": 3, "delta_t": 2}


def test_a_run_resumed_anywhere_equals_the_uninterrupted_one(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Continued from before tinit, at and between budget updates, at the last one and after it: the same bits."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    path = write_recipe(
        tmp_path / "job", base, adapter=BLOCK, train__save_every=1, train__keep_checkpoints=99
    )
    recipe, run = load_recipe(path), tmp_path / "job" / "run"
    pipeline.train(recipe)
    assert "adalora: mean rank 2 (from 4, target 2)" in capsys.readouterr().out
    straight, whole = load_file(run / "adapter" / _peft.TENSOR_FILE), tmp_path / "whole"
    config = (run / "adapter" / _peft.CONFIG_FILE).read_text()
    shutil.copytree(run, whole)
    for step in (1, 5, 6, 8, 9):  # budget updates follow the steps that end as number 5, 7 and 8
        shutil.rmtree(run)
        shutil.copytree(whole, run, ignore=shutil.ignore_patterns("summary.json", "adapter"))
        for later in range(step + 1, 11):
            shutil.rmtree(run / "checkpoints" / f"step-{later}")
        pipeline.train(recipe, resume=True)
        parts = load_file(run / "adapter" / _peft.TENSOR_FILE)
        assert parts.keys() == straight.keys()
        assert all(torch.equal(value, parts[key]) for key, value in straight.items()), step
        assert (run / "adapter" / _peft.CONFIG_FILE).read_text() == config


def test_best_weights_come_with_their_masks(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of a checkpoint before pruning are exported at full rank, also when later steps have pruned."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    losses = iter([3.0, 2.0, 1.0, *range(4, 11)])
    monkeypatch.setattr(
        train_stage, "heldout_sums", lambda *_, **__: {"loss": float(next(losses)), "units": 1.0}
    )
    changes = {"train__eval_every": 1, "train__final_weights": "best"}
    summary = pipeline.train(load_recipe(write_recipe(tmp_path / "job", base, adapter=BLOCK, **changes)))
    assert summary["best_step"] == 3
    adapter = tmp_path / "job" / "run" / "adapter"
    assert json.loads((adapter / _peft.CONFIG_FILE).read_text())["rank_pattern"] is None
    names = [name for name in load_file(adapter / _peft.TENSOR_FILE) if name.endswith("lora_E")]
    assert all(load_file(adapter / _peft.TENSOR_FILE)[name].shape == (4, 1) for name in names)


def test_the_penalty_is_trained_but_not_reported(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The penalty moves gradient and weights; the first loss is the base's own, the last one transformers' own."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    first, tensors, summary = {}, {}, {}
    for weight in (0.0, 5.0):
        folder = tmp_path / f"w{weight}"
        block = BLOCK | {"orthogonal_weight": weight, "dropout": 0.0}
        recipe = load_recipe(write_recipe(folder, base, adapter=block, export__formats=["peft", "merged"]))
        summary[weight] = pipeline.train(recipe)
        first[weight] = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[0])
        tensors[weight] = load_file(folder / "run" / "adapter" / _peft.TENSOR_FILE)
    assert first[0.0]["loss"] == first[5.0]["loss"]
    assert first[5.0]["grad_norm"] > first[0.0]["grad_norm"]
    assert summary[5.0]["eval"]["base"] == summary[0.0]["eval"]["base"]
    names = [name for name in tensors[0.0] if name.endswith("lora_A")]
    assert any(not torch.equal(tensors[0.0][name], tensors[5.0][name]) for name in names)

    merged = tmp_path / "w5.0" / "run" / "merged"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    total, count = 0.0, 0
    for row in rows(11):
        prompt = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        tail = tokenizer(row["completion"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            labels = torch.tensor([[-100] * len(head) + tail])
            loss = model.eval()(input_ids=torch.tensor([head + tail]), labels=labels).loss
        total, count = total + float(loss) * len(tail), count + len(tail)
    assert summary[5.0]["eval"]["tuned"]["loss"] == pytest.approx(total / count, rel=1e-5)
