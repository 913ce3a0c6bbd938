"""Every decoder family through the commands: trained, read by PEFT, PEFT's read by us, merged, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from architectures import FAMILIES, write_family
from command_line import run_here, snapshot
from safetensors.torch import load_file
from toy import write_recipe
from transformers import AutoModelForCausalLM

from lora_cli import adapters
from lora_cli.adapters import _peft
from lora_cli.adapters._targets import match_targets

MIXTURES = ["mixtral", "qwen3_moe"]
WITH_ROUTERS = [*MIXTURES, "llama4_text"]
ATTENTION = [family for family in FAMILIES if family != "mamba"]
LORA: dict[str, Any] = {"method": "lora", "rank": 4, "alpha": 8}
METHODS: dict[str, dict[str, Any]] = {
    "dora": {"method": "dora", "rank": 4, "alpha": 8},
    "vera": {"method": "vera", "rank": 16, "d_initial": 1.0},
    "adalora": {"method": "adalora", "initial_rank": 4, "target_rank": 2, "tinit": 0, "tfinal": 1},
    "relora": {"method": "relora", "rank": 4, "alpha": 8, "restart_every": 2},
    "qlora": {"method": "qlora", "rank": 4, "alpha": 8},
    "full": {"method": "full"},
}
SECOND = {
    "llama": ["dora"],
    "mistral": ["vera"],
    "qwen2": ["adalora"],
    "qwen3": ["relora"],
    "gemma2": ["qlora", "full"],
    "gemma3_text": ["dora"],
    "gpt2": ["vera", "adalora"],
    "phi3": ["adalora"],
    "opt": ["relora", "qlora"],
    "gpt_neox": ["qlora", "vera"],
    "mixtral": ["full"],
    "qwen3_moe": ["dora"],
    "llama4_text": ["relora"],
    "falcon": ["adalora"],
}
"""What is trained on a family besides LoRA, so that each method is on two of them or more."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a model folder of each family, which no test changes."""
    folder = tmp_path_factory.mktemp("families")
    return {family: write_family(folder / family, family) for family in FAMILIES}


pytestmark = pytest.mark.usefixtures("own_cache")


def plain(folder: Path) -> Any:
    """Return the folder's model as transformers alone loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Return the logits of fixed tokens, more than the window of those that have one."""
    return model(input_ids=torch.arange(4, 52).view(2, 24), use_cache=False).logits


def apart(first: Any, second: Any) -> float:
    """Return the largest difference of two models' logits."""
    return float((logits(first) - logits(second)).abs().max())


def train(folder: Path, base: Path, capsys: pytest.CaptureFixture[str], adapter: dict[str, Any]) -> str:
    """Train three steps by the command, with every format the method has, and return what it printed."""
    export: dict[str, Any] = {"formats": ["merged"] if adapter["method"] == "full" else ["peft", "merged"]}
    if adapter["method"] == "qlora":
        export["merge_base"] = "full"
    recipe = write_recipe(folder, base, adapter=adapter, export=export, train__max_steps=3)
    result = run_here(capsys, "train", str(recipe))
    assert result.code == 0, result.errors
    return result.output


@pytest.mark.parametrize(
    ("family", "method"),
    [(family, name) for family in ATTENTION for name in ("lora", *SECOND[family])],
)
def test_a_run_opens_in_peft_and_in_transformers(
    tmp_path: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str], family: str, method: str
) -> None:
    """A trained adapter has in PEFT the file's keys and our logits to 1e-5; so has the merged model."""
    base = bases[family]
    train(tmp_path, base, capsys, METHODS.get(method, LORA))
    run = tmp_path / "run"
    scores = json.loads((run / "summary.json").read_text())["eval"]
    assert scores["tuned"]["loss"] < scores["base"]["loss"]
    merged = plain(run / "merged")
    assert apart(merged, plain(base)) > 0.01
    if method == "full":
        scored = run_here(
            capsys, "eval", str(run / "merged"), f"data.eval={tmp_path / 'eval.jsonl'}",
            "model.dtype=float32", "--json",
        )  # fmt: skip
        again = json.loads(scored.output)["tuned"]["loss"]
        assert again == pytest.approx(scores["tuned"]["loss"], rel=1e-6)
        return
    theirs = peft.PeftModel.from_pretrained(plain(base), run / "adapter").eval()
    assert set(peft.get_peft_model_state_dict(theirs)) == set(load_file(run / "adapter" / _peft.TENSOR_FILE))
    ours = plain(base)
    adapters.load(run / "adapter", ours)
    assert apart(ours, theirs) <= 1e-5
    assert apart(merged, theirs) <= 1e-5


@pytest.mark.parametrize("family", ATTENTION)
def test_pefts_adapter_is_read_and_merged(
    tmp_path: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str], family: str
) -> None:
    """An adapter that PEFT wrote computes with us what it does in PEFT, to 1e-5, live and merged by the command."""
    # PEFT's all-linear reaches the routers and experts of mixtures.
    targets: Any = "all-linear" if family not in WITH_ROUTERS else ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(plain(bases[family]), config).eval()
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = plain(bases[family])
    adapters.load(tmp_path / "adapter", ours)
    assert apart(ours, theirs) <= 1e-5
    assert apart(ours, plain(bases[family])) > 0.01
    result = run_here(
        capsys, "merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged"),
        f"model.base={bases[family]}", "model.dtype=float32",
    )  # fmt: skip
    assert result.code == 0, result.errors
    assert apart(plain(tmp_path / "merged"), theirs) <= 1e-5


@pytest.mark.parametrize("family", ATTENTION)
def test_all_linear_is_pefts(bases: dict[str, Path], family: str) -> None:
    """`all-linear` names the layers that PEFT's names; of a mixture without its routers and its 3-D experts."""
    model = plain(bases[family])
    ours = match_targets(model, "all-linear")
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = [
        path.removeprefix("base_model.model.")
        for path, module in peft.get_peft_model(model, config).named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    ]
    left_out = [path for path in theirs if path not in ours]
    assert [path for path in theirs if path in ours] == ours
    assert bool(left_out) is (family in WITH_ROUTERS)
    assert all(re.search(r"\.mlp\.gate|\.mlp\.experts|\.router", path) for path in left_out)


@pytest.mark.parametrize("targets", ["mlp", ["experts"], ["q_proj", "w1"], ["down_proj"], ".*experts.*"])
@pytest.mark.parametrize("family", MIXTURES)
def test_experts_as_targets_are_refused(
    tmp_path: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str], family: str, targets: Any
) -> None:
    """Targets that name experts are refused in one line that says what they are and how they can be trained."""
    recipe = write_recipe(tmp_path, bases[family], adapter=LORA | {"targets": targets}, train__max_steps=2)
    before = snapshot(tmp_path)
    result = run_here(capsys, "train", str(recipe))
    (line,) = result.errors.splitlines()
    assert result.code == 2
    assert "its experts are 3-D tensors, down_proj, gate_up_proj, which get no adapter" in line
    assert "method full and parameters '.*experts.*'" in line
    assert {path for path in snapshot(tmp_path) if not path.startswith("cache")} == set(before)


def test_experts_are_trained_by_full(
    tmp_path: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """With `full` and the pattern that the refusal names, the experts are trained, and nothing else."""
    train(tmp_path, bases["mixtral"], capsys, {"method": "full", "parameters": ".*experts.*"})
    before, after = (plain(folder).state_dict() for folder in (bases["mixtral"], tmp_path / "run" / "merged"))
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {name for name in before if ".experts." in name}


def test_a_mixtures_dense_layers_are_told_of(
    tmp_path: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Dense layers that PEFT would take for experts are adapted, and the log says that PEFT cannot read them."""
    base = write_family(tmp_path / "base", "qwen3_moe", mlp_only_layers=[0])
    output = train(tmp_path / "all", base, capsys, LORA)
    assert "experts held in 3-D tensors; they get no adapter" in output
    assert "PEFT 0.21 takes down_proj, gate_proj, up_proj for names of the experts" in output
    run = tmp_path / "all" / "run"
    with pytest.warns(UserWarning, match="missing adapter keys"):
        theirs = peft.PeftModel.from_pretrained(plain(base), run / "adapter").eval()
    assert apart(theirs, plain(run / "merged")) > 0.01  # else the line can go
    output = train(tmp_path / "attention", base, capsys, LORA | {"targets": "attention"})
    assert "PEFT 0.21" not in output


def test_pefts_adapter_of_experts_is_refused(
    tmp_path: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter that PEFT placed on experts is refused by the setting that says so, not read without them."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(plain(bases["mixtral"]), config)
    theirs.save_pretrained(tmp_path / "adapter")
    result = run_here(
        capsys, "merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged"),
        f"model.base={bases['mixtral']}",
    )  # fmt: skip
    assert result.code == 2
    assert "target_parameters is [" in result.errors
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("targets", ["all-linear", ["out_proj"], ["x_proj"]])
def test_a_state_space_model_is_refused(
    tmp_path: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str], targets: Any
) -> None:
    """Layers whose weights a model's code reads past the layer, only while training too, are refused in one line."""
    recipe = write_recipe(tmp_path, bases["mamba"], adapter=LORA | {"targets": targets})
    result = run_here(capsys, "train", str(recipe))
    (line,) = result.errors.splitlines()
    assert result.code == 2
    assert "does not call one of the layers but reads its parts" in line
    assert not (tmp_path / "run").exists()
