"""The disk format against PEFT itself, in both directions, and adapters that must be refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from command_line import run_here, snapshot
from safetensors.torch import load_file, save_file
from small import make_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from lora_cli import adapters
from lora_cli.adapters import _peft
from lora_cli.adapters.lora import Lora
from lora_cli.errors import InputError

TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj", "up_proj"],
    "gpt2": ["c_attn", "c_fc"],
}


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Return the logits of fixed tokens."""
    return model(input_ids=torch.arange(1, 41).view(2, 20), use_cache=False).logits


def ours(folder: Path, architecture: str, targets: Any = None) -> PreTrainedModel:
    """Write an adapter with a real update by our code and return the live model."""
    model = make_model(architecture)
    method = Lora(rank=4, alpha=6.0, targets=targets or TARGETS[architecture], seed=1)
    for layer in method.inject(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    folder.mkdir(exist_ok=True)
    _peft.write(folder, method, base_name="base", revision=None)
    return model


def theirs(folder: Path, architecture: str, **settings: Any) -> torch.nn.Module:
    """Write an adapter with a real update by PEFT and return its live model."""
    values = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[architecture], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(make_model(architecture), peft.LoraConfig(**values | settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("targets", ["names", "all-linear"])
def test_peft_reads_ours(tmp_path: Path, architecture: str, targets: str) -> None:
    """PEFT loads our adapter without a warning, with logits equal to ours to 1e-5, and would write the same keys."""
    live = ours(tmp_path, architecture, None if targets == "names" else "all-linear")
    loaded = peft.PeftModel.from_pretrained(make_model(architecture), tmp_path)
    assert float((logits(loaded.eval()) - logits(live)).abs().max()) <= 1e-5
    again = peft.get_peft_model_state_dict(loaded)
    assert set(again) == set(load_file(tmp_path / _peft.TENSOR_FILE))
    assert loaded.peft_config["default"].lora_alpha == 6


def test_ours_reads_pefts(tmp_path: Path, architecture: str) -> None:
    """We load PEFT's adapter with logits equal to PEFT's to 1e-5."""
    live = theirs(tmp_path, architecture)
    model = make_model(architecture)
    adapters.load(tmp_path, model)
    assert float((logits(model) - logits(live)).abs().max()) <= 1e-5
    assert float((logits(model) - logits(make_model(architecture))).abs().max()) > 0.01


def test_a_trained_head_goes_through_peft(tmp_path: Path) -> None:
    """An adapter on the output head of an untied model is written, and read by PEFT, like any other."""
    live = ours(tmp_path, "qwen2", ["lm_head", "q_proj"])
    loaded = peft.PeftModel.from_pretrained(make_model("qwen2"), tmp_path).eval()
    assert float((logits(loaded) - logits(live)).abs().max()) <= 1e-5


def edit_config(**values: Any) -> Callable[[Path], None]:
    """Return an edit that sets keys of adapter_config.json; a value of ... removes the key."""

    def edit(folder: Path) -> None:
        path = folder / _peft.CONFIG_FILE
        config = json.loads(path.read_text())
        for key, value in values.items():
            if value is ...:
                del config[key]
            else:
                config[key] = value
        path.write_text(json.dumps(config))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Return an edit of the adapter's tensors."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / _peft.TENSOR_FILE)
        change(tensors)
        save_file(tensors, folder / _peft.TENSOR_FILE)

    return edit


def first(tensors: dict[str, torch.Tensor]) -> str:
    """Return the first tensor's name."""
    return sorted(tensors)[0]


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda folder: (folder / _peft.CONFIG_FILE).unlink(), "no such file"),
    "config is not JSON": (
        lambda folder: (folder / _peft.CONFIG_FILE).write_text("{"),
        "not valid JSON",
    ),
    "config is a list": (lambda folder: (folder / _peft.CONFIG_FILE).write_text("[]"), "not a JSON object"),
    "another method": (edit_config(peft_type="LOKR"), "peft_type is 'LOKR'"),
    "no peft_type": (edit_config(peft_type=...), "peft_type is None"),
    "rank 0": (edit_config(r=0), "r is 0"),
    "rank as text": (edit_config(r="8"), "r is '8'"),
    "no alpha": (edit_config(lora_alpha=...), "lora_alpha is None"),
    "alpha 0": (edit_config(lora_alpha=0), "lora_alpha is 0"),
    "DoRA": (edit_config(use_dora=True), "missing tensors: 4"),
    "patterns unlike the tensors": (edit_config(rank_pattern={"q_proj": 2}), "the layer needs (2,"),
    "a pattern that is none": (edit_config(rank_pattern={"(": 2}), "rank_pattern is {'(': 2}"),
    "rank 0 in a pattern": (edit_config(rank_pattern={"q_proj": 0}), "rank_pattern is"),
    "alpha as text in a pattern": (edit_config(alpha_pattern={"q_proj": "8"}), "alpha_pattern is"),
    "layers as text": (edit_config(layers_to_transform="0"), "layers_to_transform is '0'"),
    "layers that do not exist": (
        edit_config(layers_to_transform=[7]),
        "matches no linear layer in the chosen",
    ),
    "layers fewer than the tensors": (edit_config(layers_to_transform=[1]), "unexpected tensors: 4"),
    "bias": (edit_config(bias="some"), "bias is 'some'"),
    "biases and modules": (edit_config(bias="all", modules_to_save=["norm"]), "modules_to_save is"),
    "a whole module without its tensors": (edit_config(modules_to_save=["lm_head"]), "missing tensors: 1"),
    "PiSSA": (edit_config(init_lora_weights="pissa"), "leaves the base as it is"),
    "unknown setting": (edit_config(tokenizer_kwargs={"trust_remote_code": True}), "tokenizer_kwargs"),
    "targets missing": (edit_config(target_modules=...), "target_modules"),
    "targets of another model": (edit_config(target_modules=["wq"]), "matches no linear layer"),
    "targets beyond the tensors": (
        edit_config(target_modules=["q_proj", "down_proj", "v_proj"]),
        "missing tensors: 4",
    ),
    "rank unlike the tensors": (edit_config(r=8), "the layer needs (8,"),
    "no tensors": (lambda folder: (folder / _peft.TENSOR_FILE).unlink(), "no such file"),
    "tensors cut short": (
        lambda folder: (folder / _peft.TENSOR_FILE).write_bytes(
            (folder / _peft.TENSOR_FILE).read_bytes()[:-7]
        ),
        "not a readable safetensors file",
    ),
    "tensor missing": (
        edit_tensors(lambda tensors: tensors.pop(first(tensors), None) is None),
        "missing tensors: 1",
    ),
    "tensor unexpected": (
        edit_tensors(
            lambda tensors: tensors.update({first(tensors).replace("lora_A", "lora_C"): torch.ones(1)})
        ),
        "unexpected tensors",
    ),
    "tensor of no rows": (
        edit_tensors(lambda tensors: tensors.update({first(tensors): torch.zeros(0)})),
        "has shape (0,)",
    ),
    "not finite": (edit_tensors(lambda tensors: tensors[first(tensors)].fill_(float("nan"))), "not finite"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_faulty_adapter_is_refused(tmp_path: Path, case: str) -> None:
    """An adapter that does not fit exactly is refused and named, never loaded with missing or guessed parts."""
    ours(tmp_path, "llama")
    edit, message = FAULTS[case]
    edit(tmp_path)
    with pytest.raises(InputError) as caught:
        adapters.load(tmp_path, make_model("llama"))
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_an_adapter_of_a_wider_base_is_refused(tmp_path: Path) -> None:
    """An adapter trained on another architecture is refused for this one."""
    ours(tmp_path, "gpt2")
    with pytest.raises(InputError, match="matches no linear layer of the model"):
        adapters.load(tmp_path, make_model("llama"))


@pytest.mark.reliability("malformed")
@pytest.mark.parametrize("case", FAULTS)
def test_the_command_refuses_a_faulty_adapter(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    """`lora-merge` ends with exit 2 and a line for what was found, and writes nothing."""
    model = AutoModelForCausalLM.from_pretrained(base)
    method = Lora(rank=4, alpha=6.0, targets=TARGETS["llama"], seed=1)
    method.inject(model)
    (tmp_path / "adapter").mkdir()
    _peft.write(tmp_path / "adapter", method, base_name="base", revision=None)
    edit, message = FAULTS[case]
    edit(tmp_path / "adapter")
    before = snapshot(tmp_path)
    arguments = (str(tmp_path / "adapter"), "--output", str(tmp_path / "out"), f"model.base={base}")
    result = run_here(capsys, "merge", *arguments)
    assert result.code == 2
    lines = result.errors.splitlines()
    assert len(lines) <= 6  # of tensors that do not fit five are named
    assert all(line.startswith("error: ") for line in lines)
    assert message in lines[0] or (
        case == "no config" and "neither a run, an adapter nor a model" in lines[0]
    )
    assert snapshot(tmp_path) == before
