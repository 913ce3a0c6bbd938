"""Two gloo processes keep optimizers of their own, and must end with the same weights in both, bit for bit."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import write_base, write_recipe

FORMS: dict[str, dict[str, Any]] = {
    "8 bits, no masters": {
        "model__dtype": "bfloat16",
        "adapter": {"method": "full", "masters": "stochastic_rounding"},
        "train__optimizer": "adamw_8bit",
    },
    "relora, warm start": {
        "adapter": {"method": "relora", "rank": 4, "alpha": 8, "restart_every": 1, "warm_start_steps": 2},
    },
}


def free_ports(number: int) -> list[int]:
    """Return ports nobody listens on."""
    listeners = [socket.socket() for _ in range(number)]
    for listener in listeners:
        listener.bind(("127.0.0.1", 0))
    ports: list[int] = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def train_here(recipe: Path, weights: Path) -> None:
    """Train a recipe in this process and save what the model's parameters are before it is evaluated."""
    from lora_cli import pipeline
    from lora_cli.recipe.load import load_recipe
    from lora_cli.stages import evaluate

    original = evaluate.run

    def run(settings: Any, model: Any, *arguments: Any, **options: Any) -> Any:
        torch.save(
            {name: value.detach().clone() for name, value in model.model.state_dict().items()}, weights
        )
        return original(settings, model, *arguments, **options)

    evaluate.run = run
    try:
        pipeline.train(load_recipe(recipe))
    finally:
        evaluate.run = original


def train_in_turn(rank: int, folder: Path, ports: dict[str, int]) -> None:
    """Be one of two processes that train every recipe together."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    for form, port in ports.items():
        os.environ["MASTER_PORT"] = str(port)
        train_here(folder / form / "recipe.yaml", folder / form / f"{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train every recipe in two processes, and return the folder with the weights of each."""
    made = tmp_path_factory.mktemp("two")
    base = write_base(made / "base")
    for form, changes in FORMS.items():
        write_recipe(made / form, base, train__max_steps=4, train__batch_size=7, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_CLI_CACHE", str(made / "cache"))
        ports = dict(zip(FORMS, free_ports(len(FORMS)), strict=True))
        torch.multiprocessing.spawn(train_in_turn, (made, ports), nprocs=2)
    return made


@pytest.mark.parametrize("form", sorted(FORMS))
def test_both_processes_end_with_the_same_weights(folder: Path, form: str) -> None:
    """What one process trained and what the other did is equal, bit for bit."""
    first, second = (torch.load(folder / form / f"{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_two_processes_warm_up_as_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full-rank warm start and the cycles after it end as in one process with the same batches, to 1e-6 in fp32."""
    monkeypatch.setenv("LORA_CLI_CACHE", str(folder / "cache"))
    (form,) = (name for name in FORMS if name.startswith("relora"))
    recipe = write_recipe(
        folder / "alone", folder / "base", train__max_steps=4, train__batch_size=7, **FORMS[form]
    )
    train_here(recipe, folder / "alone" / "0.pt")
    alone, together = (torch.load(folder / name / "0.pt") for name in ("alone", form))
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        assert float((value - together[name]).norm()) <= 1e-6 * float(value.norm()), name
