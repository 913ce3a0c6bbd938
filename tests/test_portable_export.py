"""The portable adapter through the commands: from a recipe, a run and PEFT's own folders, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from command_line import ROOT, Result, run_here, snapshot
from lora_variants import difference, stir
from plain_lora_readers import as_llama_cpp, check_plain, read
from toy import write_recipe
from transformers import AutoModelForCausalLM, PreTrainedModel

from lora_cli.errors import InputError
from lora_cli.recipe.load import load_recipe
from lora_cli.runtime.run_folder import MARK

DORA = {"method": "dora", "rank": 4, "alpha": 8}
Merge = Callable[..., Result]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """Return the folder of a DoRA run and its merge: `lora-train`, then `lora-merge`, in one process of their own."""
    folder = tmp_path_factory.mktemp("job")
    write_recipe(
        folder, base, adapter=DORA, train__max_steps=4, export__formats=["portable", "peft"], export__portable_rank=6
    )  # fmt: skip
    call = (
        "import sys; from lora_cli.cli import merge_main, train_main; sys.exit(train_main(['recipe.yaml']) or"
        " merge_main(['run', '--adapter', 'portable', '--output', 'again']))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LORA_CLI_CACHE": str(folder / "cache")}
    command = [sys.executable, "-c", call]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    (folder / "log").write_text(done.stdout + done.stderr)
    return folder


@pytest.fixture
def merge(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Merge:
    """Return the command `lora-merge` in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    return lambda *arguments: run_here(capsys, "merge", *map(str, arguments))


def on_base(base: Path) -> PreTrainedModel:
    """Return the plain base."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def test_a_run_writes_it_and_says_what_it_loses(job: Path, base: Path) -> None:
    """Log, card and summary of a process hold the same error; the folder is what readers of plain LoRA take."""
    run = job / "run"
    figures = json.loads((run / "summary.json").read_text())["export"]["portable_update"]
    assert figures["rank"] == check_plain(run / "portable", str(base.resolve())) == 6
    assert 0.0 < figures["worst_error"] < 1.0
    assert set(figures["errors"]) == {key[17:-14] for key in read(run / "portable")[1] if "lora_A" in key}
    told = f"relative error {figures['mean_error']:.1e} in the mean, {figures['worst_error']:.1e} at worst"
    card = (run / "portable" / "README.md").read_text()
    for text in ((job / "log").read_text(), card):
        assert told in text
        assert "vLLM reads it with --max-lora-rank 8" in text
    assert "| held-out | base | tuned |" in card
    assert "vLLM" not in (run / "adapter" / "README.md").read_text()
    live = peft.PeftModel.from_pretrained(on_base(base), run / "adapter").eval()
    plain = peft.PeftModel.from_pretrained(on_base(base), run / "portable").eval()
    assert difference(as_llama_cpp(run / "portable", on_base(base)), plain) <= 1e-5
    assert 0.0 < difference(plain, live) < difference(on_base(base), live)
    for name in ("tokenizer.json", "generation_config.json", "manifest.json"):
        assert (run / "portable" / name).is_file()


def test_a_finished_run_is_known_and_a_lost_folder_missed(
    job: Path, merge: Merge, capsys: pytest.CaptureFixture[str]
) -> None:
    """Started again, the run has nothing to do; its portable adapter is one of the folders that it must have."""
    recipe = str(job / "recipe.yaml")
    before = snapshot(job / "run")
    assert run_here(capsys, "train", recipe).code == 0
    assert snapshot(job / "run") == before
    (job / "run" / "portable").rename(job / "aside")
    result = run_here(capsys, "train", recipe)
    (job / "aside").rename(job / "run" / "portable")
    assert result.code == 2
    assert "portable/ is missing" in result.errors


def test_merge_writes_what_the_run_wrote(job: Path) -> None:
    """`lora-merge RUN --adapter portable` writes the tensors and settings of the run, bit for bit."""
    assert (job / "log").read_text().count("LORA of rank 6: relative error") == 2
    merged, runs = read(job / "again"), read(job / "run" / "portable")
    assert merged[0] == runs[0]
    assert all(torch.equal(merged[1][name], tensor) for name, tensor in runs[1].items())


def test_an_existing_output_and_a_second_run_are_refused(job: Path, merge: Merge, tmp_path: Path) -> None:
    """What stands there stays, to the byte."""
    assert merge(job / "run", "--adapter", "portable", "-o", "out").code == 0
    before = snapshot(tmp_path / "out")
    result = merge(job / "run", "--adapter", "portable", "-o", "out")
    assert (result.code, result.output) == (2, "")
    assert "--output: out exists already" in result.errors
    assert snapshot(tmp_path / "out") == before


def test_a_portable_adapter_is_scored_and_merged(job: Path, base: Path, merge: Merge, tmp_path: Path) -> None:
    """It is an adapter like any other: merged into its base it computes what PEFT does with it."""
    assert merge(job / "run" / "portable", "-o", "out", f"model.base={base}", "model.dtype=float32").code == 0
    theirs = peft.PeftModel.from_pretrained(on_base(base), job / "run" / "portable").eval()
    assert difference(on_base(tmp_path / "out"), theirs) <= 1e-5


@pytest.mark.parametrize(
    ("config", "rank"),
    [
        (peft.LoraConfig(r=4, use_rslora=True, rank_pattern={"q_proj": 7}, target_modules=["q_proj", "up_proj"]), 7),
        (peft.LoraConfig(r=4, alpha_pattern={"layers.1.*": 3}, target_modules=["down_proj"]), 4),
        (peft.VeraConfig(r=5, target_modules=["v_proj"]), 5),
    ],
    ids=["rslora, ranks", "alphas", "vera"],
)  # fmt: skip
def test_pefts_own_adapters_become_portable(
    config: peft.PeftConfig, rank: int, base: Path, merge: Merge, tmp_path: Path
) -> None:
    """What PEFT trained and saved is written as uniform LoRA with PEFT's logits, to 1e-5."""
    config.task_type = "CAUSAL_LM"
    live = peft.get_peft_model(on_base(base), config).eval()
    stir(parameter for parameter in live.parameters() if parameter.requires_grad)
    live.save_pretrained(tmp_path / "theirs")
    arguments = ("theirs", "--adapter", "portable", "-o", "out", f"model.base={base}", "model.dtype=float32")
    result = merge(*arguments)
    assert result.code == 0, result.errors
    assert "exact up to float32 rounding" in result.output
    assert check_plain(tmp_path / "out", str(base.resolve())) == rank
    assert difference(as_llama_cpp(tmp_path / "out", on_base(base)), live) <= 1e-5
    assert difference(peft.PeftModel.from_pretrained(on_base(base), tmp_path / "out").eval(), live) <= 1e-5


def test_pefts_dora_is_refused_above_the_threshold(base: Path, merge: Merge, tmp_path: Path) -> None:
    """Exit 5 with one line, whose command then merges the adapter without loss."""
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    live = peft.get_peft_model(on_base(base), config).eval()
    stir(parameter for parameter in live.parameters() if parameter.requires_grad)
    live.save_pretrained(tmp_path / "theirs")
    bounds = ("export.portable_rank=1", "export.max_portable_error=0.01")
    result = merge("theirs", "--adapter", "portable", "-o", "out", f"model.base={base}", *bounds)
    assert result.code == 5
    (line,) = result.errors.splitlines()
    assert line.startswith("error: export.max_portable_error: at rank 1 the portable adapter misses ")
    assert not (tmp_path / "out").exists()
    command = line.split("merge it instead: lora-merge ")[1].split(";")[0].replace("DIR", "out")
    assert merge(*command.split(), "model.dtype=float32").code == 0
    assert difference(on_base(tmp_path / "out"), live) <= 1e-5


def test_a_run_that_is_refused_leaves_what_the_named_command_merges(
    base: Path, tmp_path: Path, merge: Merge, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 5 after training; the adapter stands, no portable one does, and the command in the line does its work."""
    path = write_recipe(
        tmp_path, base, adapter=DORA, train__max_steps=2,
        export__formats=["portable", "peft"], export__max_portable_error=1e-6,
    )  # fmt: skip
    result = run_here(capsys, "train", str(path))
    assert result.code == 5
    assert not (tmp_path / "run" / "portable").exists()
    command = result.errors.split("merge it instead: lora-merge ")[1].split(";")[0].replace("DIR", "out")
    assert merge(*command.split()).code == 0
    live = peft.PeftModel.from_pretrained(on_base(base), tmp_path / "run" / "adapter").eval()
    assert difference(on_base(tmp_path / "out"), live) <= 1e-5


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["export.portable_rank=0"], "override export.portable_rank=0: export.portable_rank: found 0"),
        (["export.portable_rank=513"], "found 513"),
        (["export.portable_rank=many"], "found the text 'many'"),
        (["export.max_portable_error=2"], "found 2"),
        (["--dtype", "float32"], "--dtype float32: has no effect on an adapter"),
        (
            ["export.merge_base=full"],
            "override export.merge_base=full: has no effect with --adapter portable",
        ),
        (["export.formats=[peft]"], "override export.formats=[peft]: has no effect here"),
        (["--adapter", "gguf"], "'gguf' is not"),
    ],
)
def test_options_without_sense_are_refused(
    job: Path, merge: Merge, tmp_path: Path, arguments: list[str], line: str
) -> None:
    """Exit 2 with one line, before anything is written."""
    result = merge(job / "run", "--adapter", "portable", "-o", "out", *arguments)
    assert (result.code, result.output) == (2, "")
    assert len(result.errors.splitlines()) == 1
    assert line in result.errors
    assert not (tmp_path / "out").exists()


def test_options_of_the_portable_adapter_need_it(job: Path, merge: Merge) -> None:
    """Its rank says nothing about a merged model."""
    result = merge(job / "run", "-o", "out", "export.portable_rank=4")
    assert result.code == 2
    assert "override export.portable_rank=4: has no effect without --adapter portable" in result.errors


@pytest.mark.parametrize(
    ("adapter", "line"),
    [
        ("{method: full}", "full fine-tuning has no adapter to write (use merged)"),
        ("{train_also: [norm]}", "adapter.train_also trains norm whole (use merged)"),
        ("{bias: all}", "adapter.bias is all (use merged)"),
    ],
)
def test_what_the_recipe_tells_is_refused_before_training(
    base: Path, tmp_path: Path, merge: Merge, capsys: pytest.CaptureFixture[str], adapter: str, line: str
) -> None:
    """Exit 2, by lora-train for the format and by lora-merge for a run of that recipe, with nothing written."""
    text = f"model: {{base: {base}}}\ndata: {{train: rows.jsonl}}\nadapter: {adapter}\nrun: {{output: out}}\n"
    (tmp_path / "recipe.yaml").write_text(text + "export: {formats: [merged, portable]}\n")
    result = run_here(capsys, "train", "recipe.yaml", "--check")
    assert result.code == 2
    assert "export.formats: found portable" in result.errors
    assert line in result.errors
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(f"{MARK}\n{text}")
    result = merge("run", "--adapter", "portable", "-o", "made")
    assert result.code == 2
    assert result.errors.startswith("error: --adapter portable: found portable")
    assert line in result.errors
    assert not (tmp_path / "made").exists()


def test_a_tied_head_is_refused_before_training(
    base: Path, tmp_path: Path, merge: Merge, capsys: pytest.CaptureFixture[str]
) -> None:
    """What only the model tells is told before the first step, and leaves no run."""
    path = write_recipe(
        tmp_path, base, adapter={"method": "lora", "targets": ["lm_head"]}, export__formats=["portable"]
    )
    result = run_here(capsys, "train", str(path))
    assert result.code == 2
    assert "error: portable: lm_head has an adapter and shares its weight with the embedding" in result.errors
    assert not (tmp_path / "run").exists()


def test_keys_of_the_portable_adapter_need_the_format(tmp_path: Path) -> None:
    """A rank or threshold with no portable adapter is a mistake, not a wish without effect."""
    with pytest.raises(
        InputError, match=r"export.portable_rank: found 8, but no portable adapter is written"
    ):
        load_recipe(None, ["export.portable_rank=8"])
    load_recipe(None, ["export.portable_rank=8", "export.formats=[portable]"])
