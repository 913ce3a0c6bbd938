"""The same recipe in two processes: the same weights, metrics and answers, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forked_commands import ForkServer
from run_results import differences, result_of
from safetensors.torch import load_file
from toy_methods import METHODS, write_method

pytestmark = pytest.mark.reliability("twice")
NAMES = list(METHODS)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"model__dtype": "bfloat16"},
    {"model__dtype": "bfloat16", "data__packing": True},
]


@pytest.fixture(scope="module")
def servers(server: ForkServer) -> Iterator[tuple[ForkServer, ForkServer]]:
    """Two parents of processes, in which Python orders sets of texts differently."""
    with ForkServer(PYTHONHASHSEED="2") as other:
        yield server, other


@pytest.mark.cases(7, 21)
def test_a_recipe_gives_the_same_bytes_twice(
    servers: tuple[ForkServer, ForkServer], base: Path, tmp_path: Path, case: int
) -> None:
    """Every method, in float32, in bfloat16 and packed: exports, metrics, answers and last checkpoint are equal."""
    method, variant = NAMES[case % 7], VARIANTS[(case + case // 7) % 3]
    if method == "full" and variant:
        variant = {**variant, "adapter": {"method": "full", "masters": "stochastic_rounding"}}
    results, states = [], []
    for place, server in zip(("one", "other"), servers, strict=True):
        folder = tmp_path / place / "job"
        write_method(folder, base, method, **variant)
        server.succeed(folder, "train", "recipe.yaml")
        results.append(result_of(folder / "run"))
        files = sorted((folder / "run" / "checkpoints" / "step-10").glob("*.safetensors"))
        states.append(
            {f"{file.name} {key}": value for file in files for key, value in load_file(file).items()}
        )
    assert len(results[0]) > 5
    assert differences(*results) == []
    assert states[0].keys() == states[1].keys()
    assert [key for key, value in states[0].items() if not value.equal(states[1][key])] == []
