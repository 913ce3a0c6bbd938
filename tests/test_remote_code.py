"""`model.trust_remote_code`: code of a base runs where the recipe or the command line says so, and nowhere else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import Result, run_here
from toy import write_base, write_recipe
from transformers import dynamic_module_utils

from lora_cli.errors import InputError
from lora_cli.models import remote_code
from lora_cli.models.safety import check_model_folder, check_tokenizer_folder

MODULE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({mark!r}).touch()


class ToyConfig(LlamaConfig):
    model_type = "toy_of_its_own"


class ToyForCausalLM(LlamaForCausalLM):
    config_class = ToyConfig
"""
AUTO_MAP = {"AutoConfig": "modeling_toy.ToyConfig", "AutoModelForCausalLM": "modeling_toy.ToyForCausalLM"}


def own_code(base: Path, mark: Path) -> Path:
    """Make the toy base one that transformers does not know; its module notes that it ran in the file `mark`."""
    (base / "modeling_toy.py").write_text(MODULE.format(mark=str(mark)))
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "toy_of_its_own", "auto_map": AUTO_MAP, "architectures": ["ToyForCausalLM"]}
    (base / "config.json").write_text(json.dumps(config))
    return base


def test_a_trusted_base_is_trained_evaluated_merged_and_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the key the code runs, and a line warns; a run's own recipe does not count; what is merged carries it."""
    mark = tmp_path / "ran"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    base = own_code(write_base(tmp_path / "base"), mark)
    write_recipe(Path("."), base, train__epochs=1, export__formats=["peft", "merged"])
    trust = "model.trust_remote_code=true"

    def lora(*arguments: str) -> Result:
        return run_here(capsys, "lora", *arguments)

    refused = lora("train", "recipe.yaml")
    assert refused.code == 2
    assert "unless the recipe says model.trust_remote_code: true" in refused.errors
    assert not mark.exists()

    done = lora("train", "recipe.yaml", trust)
    assert done.code == 0, done.errors
    assert mark.exists()
    assert f"warning: model.trust_remote_code: Python code in {base} will run" in done.output
    assert (tmp_path / "run/merged/modeling_toy.py").is_file()
    assert not (tmp_path / "run/adapter/modeling_toy.py").exists()

    mark.unlink()
    for arguments in (["eval", "run"], ["merge", "run", "--output", "out"], ["inspect", "run"]):
        refused = lora(*arguments)
        assert refused.code == 2
        assert "the recipe of a run cannot let code run (add model.trust_remote_code=true" in refused.errors
    refused = lora("eval", "run/merged", "data.eval=eval.jsonl")
    assert refused.code == 2
    assert not mark.exists()

    scores = [
        lora("eval", target, trust, "data.eval=eval.jsonl", "model.dtype=float32", "--json")
        for target in ("run", "run/merged")
    ]
    assert [one.code for one in scores] == [0, 0], [one.errors for one in scores]
    run, merged = (json.loads(one.output)["tuned"]["loss"] for one in scores)
    assert merged == pytest.approx(run, rel=1e-5)
    done = lora("merge", "run", "--output", "out", trust)
    assert done.code == 0, done.errors
    assert (tmp_path / "out/modeling_toy.py").is_file()

    done = lora(
        "train", "recipe.yaml", trust, "run.output=small", "model.quantize=nf4", "export.formats=[peft]"
    )
    assert done.code == 0, done.errors
    assert lora("data", "recipe.yaml", trust).code == 0

    with (base / "modeling_toy.py").open("a") as file:
        file.write("# other code\n")
    refused = lora("eval", "run", trust)
    assert refused.code == 2
    assert "was trained on another base" in refused.errors


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["model.base=owner/name"], "owner/name is a hub id, whose code runs only from one commit"),
        (
            ["model.base=owner/name", "model.revision=main"],
            "is a hub id, whose code runs only from one commit",
        ),
        (["model.base=tiny"], "the bundled model has no code"),
        (["model.trust_remote_code=yes"], "found the text 'yes' (must be true or false"),
    ],
)
def test_trust_needs_code_that_stays_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    """A hub id without a commit and the bundled model are refused by the key's name, before anything is fetched."""
    recipe = write_recipe(tmp_path, tmp_path / "base")
    given = [*arguments, *(["model.trust_remote_code=true"] if len(arguments[0]) < 24 else [])]
    result = run_here(capsys, "train", str(recipe), *given)
    assert result.code == 2
    assert "model.trust_remote_code" in result.errors
    assert told in result.errors


def test_trust_is_for_code_of_the_folder_alone(tmp_path: Path) -> None:
    """Another repository's class, a path, nested code, a tokenizer's code and kernels are refused with the key too."""
    base = own_code(write_base(tmp_path / "base"), tmp_path / "ran")
    assert check_model_folder(base, runs_code=True).model_type == "toy_of_its_own"
    for change in (
        {"auto_map": {"AutoConfig": "owner/name--modeling_toy.ToyConfig"}},
        {"auto_map": {"AutoConfig": "../modeling_toy.ToyConfig"}},
        {"auto_map": {"AutoConfig": "a.b.ToyConfig"}},
        {"auto_map": "modeling_toy.ToyConfig"} | {"text_config": {"auto_map": AUTO_MAP}},
        {"text_config": {"trust_remote_code": True}},
        {"_attn_implementation": "owner/kernel"},
    ):
        other = tmp_path / "other"
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(base, other)
        config = json.loads((base / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | change))
        for check in (check_model_folder, check_tokenizer_folder):
            with pytest.raises(InputError):
                check(other, runs_code=True)
    (base / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["a.B", None]}}))
    with pytest.raises(
        InputError, match=r"tokenizer_config\.json: auto_map names code to run, which is never done"
    ):
        check_model_folder(base, runs_code=True)


def test_trust_belongs_to_one_folder(tmp_path: Path) -> None:
    """A folder is trusted until it is opened without trust, by whatever link; another one gains nothing."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    (tmp_path / "link").symlink_to(one)
    remote_code.settle(tmp_path / "link", runs_code=True)
    assert remote_code.may_run(one)
    assert not remote_code.may_run(two)
    remote_code.settle(one, runs_code=False)
    assert not remote_code.may_run(tmp_path / "link")
