"""What the recipe says of the optimizer, in whole runs: 8-bit moments, no masters, weight decay."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small import make_model
from toy import write_recipe

from lora_cli import adapters, pipeline
from lora_cli.recipe import schema
from lora_cli.recipe.load import load_recipe

DECAYED = {
    "dora": {"lora_A", "lora_B"},
    "vera": {"vera_lambda_b", "vera_lambda_d"},
    "adalora": {"lora_A", "lora_B", "lora_E"},
    "lora": {"lora_A", "lora_B", "weight of lm_head"},
    "full": {"weight of embed_tokens", "weight of lm_head", "weight of proj"},
}
"""Kinds of trained parameters that weight decay acts on."""
SETTINGS: dict[str, schema.Section] = {
    "dora": schema.DoraAdapter(rank=4),
    "vera": schema.VeraAdapter(rank=4),
    "adalora": schema.AdaLoraAdapter(initial_rank=4, target_rank=2),
    "lora": schema.LoraAdapter(rank=4, bias="adapter", train_also=["norm", "lm_head"]),
    "full": schema.FullAdapter(),
}


pytestmark = pytest.mark.usefixtures("own_cache")


def kind(name: str) -> str:
    """Return the tensor's own name; of a weight, also whose."""
    path, _, tensor = name.rpartition(".")
    module = path.rpartition(".")[2]
    return tensor if tensor != "weight" else f"weight of {'proj' if module.endswith('_proj') else module}"


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_decay_acts_on_updates_and_matrices(name: str) -> None:
    """Weight decay is for matrices and VeRA's vectors: not for biases, norms and row lengths, the base's own values."""
    model = make_model("qwen2")
    method = adapters.build(SETTINGS[name], seed=0)
    method.inject(model)
    trainable = method.trainable(model)
    decayed = {key for key, value in trainable.items() if method.decays(key, value)}
    assert {kind(key) for key in decayed} == DECAYED[name]
    assert not {kind(key) for key in trainable.keys() - decayed} & DECAYED[name]


def train(folder: Path, base: Path, steps: int = 4, **changes: Any) -> dict[str, torch.Tensor]:
    """Train the toy recipe with changes, and return the optimizer's last state."""
    settings = {"train__max_steps": steps, "train__save_every": 1, "train__keep_checkpoints": 9}
    pipeline.train(load_recipe(write_recipe(folder, base, **settings, **changes)))
    return state_of(folder, steps)


def state_of(folder: Path, step: int = 4) -> dict[str, torch.Tensor]:
    """Return the optimizer's state after a step."""
    return load_file(folder / "run" / "checkpoints" / f"step-{step}" / "optimizer.safetensors")


def test_decay_in_a_run(tmp_path: Path, base: Path) -> None:
    """A step of whole fine-tuning draws each matrix to zero by rate x decay of itself, and no norm."""
    plain, decayed = (
        train(tmp_path / str(decay), base, steps=1, adapter={"method": "full"}, train__weight_decay=decay,
              train__schedule="constant", train__warmup=0, train__learning_rate=1e-3)
        for decay in (0.0, 10.0)
    )  # fmt: skip
    for name, before in load_file(base / "model.safetensors").items():
        moved = plain[f"{name}.master"] - decayed[f"{name}.master"]
        expected = torch.zeros_like(before) if "norm" in name else 1e-3 * 10.0 * before
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=2e-7)


FORMS: dict[str, dict[str, Any]] = {
    "no masters, 8 bits": {
        "model__dtype": "bfloat16",
        "adapter": {"method": "full", "masters": "stochastic_rounding"},
        "train__optimizer": "adamw_8bit",
    },
    "relora, 8 bits": {
        "adapter": {"method": "relora", "rank": 80, "alpha": 8, "restart_every": 2, "reset_fraction": 0.5},
        "train__optimizer": "adamw_8bit",
    },
}


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, base: Path, form: str, step: int) -> None:
    """Continued after step 1, 2 or 3 of 4, a run ends in the same state of the optimizer, bit for bit."""
    straight = train(tmp_path, base, **FORMS[form])
    assert {value.dtype for value in straight.values()} >= {torch.uint8, torch.float32}
    run = tmp_path / "run"
    for entry in [*run.iterdir(), *(run / "checkpoints").iterdir()]:
        name = entry.name
        if name in ("adapter", "merged", "summary.json") or (
            name.startswith("step-") and int(name[5:]) > step
        ):
            shutil.move(entry, tmp_path / f"aside-{name}")
    pipeline.train(load_recipe(tmp_path / "recipe.yaml"), resume=True)
    resumed = state_of(tmp_path)
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(value, straight[key]) for key, value in resumed.items())
