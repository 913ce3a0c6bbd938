"""`recipe/load.py`: every problem of a recipe in one pass, with its place, its key and what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.errors import InputError
from lora_cli.recipe.dump import dump_recipe
from lora_cli.recipe.keys import all_keys
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.schema import FullAdapter, LoraAdapter, Recipe


def problems_of(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """Return the problems of a recipe, without the name of its file."""
    path = tmp_path / "r.yaml"
    path.write_text(text)
    try:
        load_recipe(path, overrides)
    except InputError as error:
        return [line.replace(f"{path}:", "") for line in error.lines]
    return []


MANY = """\
modle: {base: x}
data:
  train: 5
  fields: {prompt: "{q}", completon: "{a}"}
  max_length: "512"
  format: chat
adapter:
  method: loraa
  rank: 0
train:
  lr: 1e-4
  schedule: cosin
  learning_rate: .nan
  early_stopping: 3
  warmup: 50
  max_steps: 20
  batch_size: 9223372036854775808
  betas: [0.9, 1.0]
learning_rate: 3
export: {formats: [gguf]}
train: {}
evaluate:
"""


def test_every_problem_is_told_in_one_pass_in_the_order_of_the_file(tmp_path: Path) -> None:
    """Unknown keys, wrong types, bounds, duplicates and broken joint rules come together, each once."""
    lines = problems_of(tmp_path, MANY, "run.seed=-1", "foo")
    starts = [line.split(": ")[:2] for line in lines]
    assert starts == [
        ["1:1", "modle"],
        ["3:3", "data.train"],
        ["4:27", "data.fields.completon"],
        ["5:3", "data.max_length"],
        ["8:3", "adapter.method"],
        ["9:3", "adapter.rank"],
        ["11:3", "train.lr"],
        ["12:3", "train.schedule"],
        ["13:3", "train.learning_rate"],
        ["14:3", "train.early_stopping"],
        ["15:3", "train.warmup"],
        ["17:3", "train.batch_size"],
        ["18:3", "train.betas"],
        ["19:1", "learning_rate"],
        ["20:10", "export.formats"],
        ["21:1", "train"],
        ["22:1", "evaluate"],
        ["override foo", "found no key and value (write key.path=value)"],
        ["override run.seed=-1", "run.seed"],
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("modle: {}", "1:1: modle: unknown key (did you mean model?)"),
        ("learning_rate: 1", "1:1: learning_rate: unknown key (did you mean train.learning_rate?)"),
        ("train: {lr: 1}", "1:9: train.lr: unknown key (did you mean train.learning_rate?)"),
        ("train: {epoch: 1}", "1:9: train.epoch: unknown key (did you mean train.epochs?)"),
        ("data: {learning_rate: 1}", "1:8: data.learning_rate: unknown key (did you mean train.l"),
        ("lora_alpha: 1", "1:1: lora_alpha: unknown key (did you mean adapter.alpha?)"),
        ("r: 8", "1:1: r: unknown key (did you mean adapter.rank?)"),
        ("base_model: x", "1:1: base_model: unknown key (did you mean model.base?)"),
        ("output_dir: x", "1:1: output_dir: unknown key (did you mean run.output?)"),
        ("num_train_epochs: 1", "1:1: num_train_epochs: unknown key (did you mean train.epochs?)"),
        ("adapter: {rank: x}", "1:11: adapter.rank: found the text 'x' (must be an integer from 1 to 4096)"),
        ("adapter: {rank: 8.0}", "1:11: adapter.rank: found 8.0 (must be an integer from 1 to 4096)"),
        ("adapter: {rank: true}", "1:11: adapter.rank: found true (must be an integer from 1 to 4096)"),
        ("adapter: {dropout: 1.0}", "found 1.0 (must be a number of at least 0 and below 1)"),
        ("model: {base: 7}", "1:9: model.base: found 7 (must be text; put it in quotes)"),
        ("model: {dtype: bf16}", "(must be one of bfloat16, float32; did you mean bfloat16?)"),
        ("data: {max_length: '8'}", "(must be an integer from 8 to 1048576; remove the quotes)"),
        ("train: {betas: [0.9]}", "1:9: train.betas: found a list, [0.9] (must be a list of a number"),
        ("train: {betas: [0.9, 0.9, 0.9]}", "train.betas: found a list, [0.9, 0.9, 0.9] (must be a list of"),
        ("train: 5", "found 5 (must be a block of keys: epochs, max_steps"),
        ("data: {fields: {prompt: x}}", "1:8: data.fields.completion: is missing (text)"),
        ("data: {fields: {prompt: x, completion: {a}}}", 'found a block, {"a": null} (must be text; put'),
        ("adapter: {method: lora, parameters: all}", "1:25: adapter.parameters: is a key of full, not of adapter"),
        (
            "adapter: {method: relora, restart_every: 9, restart_warmup: 9}",
            "1:45: adapter.restart_warmup: found 9 steps, but a restart comes every 9 steps (at most 8)",
        ),
        (
            "adapter: {method: relora, reset: zero, reset_fraction: 0.5}",
            "1:40: adapter.reset_fraction: found 0.5, but reset zero zeroes everything",
        ),
        ("adapter: {targets: '['}", "1:11: adapter.targets: '[' is not a regular expression"),
        ("adapter: {targets: []}", "1:11: adapter.targets: found nothing"),
        ("adapter: {method: full}\nexport: {formats: [peft]}", "2:10: export.formats: found peft, but full"),
        (
            "adapter: {method: full, masters: stochastic_rounding}\nmodel: {dtype: float32}",
            "1:25: adapter.masters: found stochastic_rounding, but a float32 weight is its own master",
        ),
        ("train: {eval_every: 5}", "1:9: train.eval_every: found 5, but there are no held-out rows"),
    ],
)  # fmt: skip
def test_one_problem_is_one_line_that_says_what_to_do(tmp_path: Path, text: str, expected: str) -> None:
    """Each line has the place, the key, what was found and the nearest thing that is right."""
    lines = problems_of(tmp_path, text)
    assert len(lines) == 1, lines
    assert expected in lines[0]


@pytest.mark.parametrize(
    "text",
    [
        "hf_token: {s}",
        "model: {{api_key: {s}}}",
        "train: {{password: {s}}}",
        "model: {{base: {s}}}",
        "data: {{train: 'https://me:{s}@host/rows.jsonl'}}",
        "adapter: {{targets: [{s}]}}",
        "{s}: 1",
        "train: {{epochs: {s}}}",
    ],
)
def test_secrets_are_refused_and_never_printed(tmp_path: Path, text: str) -> None:
    """A token, key or password in a recipe or override is an error that does not contain it."""
    secret = "hf_" + "Abcdefgh12345678" * 2
    lines = problems_of(tmp_path, text.format(s=secret), f"model.token={secret}", f"train.seed={secret}")
    assert len(lines) >= 3
    assert not any(secret in line for line in lines), lines


def test_a_rule_that_joins_keys_is_silent_where_one_of_them_is_at_fault(tmp_path: Path) -> None:
    """`early_stopping` needs `eval_every`: where that is misspelt or bad, only that is told."""
    lines = problems_of(tmp_path, "train: {early_stopping: 2, eval_every: 0}")
    assert [line.split(": ")[1] for line in lines] == ["train.eval_every"]


def test_overrides_follow_the_recipe(tmp_path: Path) -> None:
    """Values are YAML, they win over the file, absent blocks are made, other uses of an anchor stay."""
    path = tmp_path / "r.yaml"
    path.write_text("adapter: {rank: 4}\ntrain: &t {epochs: 2}\n")
    recipe = load_recipe(
        path,
        ["train.learning_rate=1e-4", "adapter.rank=9", "train.epochs=3", "data.train=no",
         "data.fields={prompt: '{q}', completion: x}", "data.fields.completion='{a}'"],
    )  # fmt: skip
    assert isinstance(recipe.adapter, LoraAdapter)
    assert (recipe.adapter.rank, recipe.train.epochs, recipe.train.learning_rate) == (9, 3.0, 1e-4)
    assert recipe.data.fields is not None
    assert (recipe.data.fields.completion, recipe.data.train) == ("{a}", "no")
    assert recipe.at("adapter.rank") == "override adapter.rank=9: adapter.rank"
    assert recipe.at("train.epochs") == "override train.epochs=3: train.epochs"
    assert recipe.at("train.floor") == "train.floor"


def test_an_override_of_the_method_names_the_keys_it_leaves_behind(tmp_path: Path) -> None:
    """`adapter.method=lora` over a recipe with `parameters` names the key in the way and the override."""
    lines = problems_of(tmp_path, "adapter: {method: full, parameters: all}", "adapter.method=lora")
    assert lines == [
        "1:25: adapter.parameters: is a key of full, not of adapter.method lora, "
        "chosen by override adapter.method=lora (remove one of the two)"
    ]
    path = tmp_path / "r.yaml"
    assert isinstance(load_recipe(path, ["adapter={method: full}"]).adapter, FullAdapter)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.lr=3", "override train.lr=3: train.lr: unknown key (did you mean train.learning_rate?)"),
        ("lr=3", "override lr=3: lr: unknown key (did you mean train.learning_rate?)"),
        ("train.epochs", "override train.epochs: found no key and value (write key.path=value)"),
        ("=3", "found no key and value"),
        ("train..epochs=3", "found no key and value"),
        ("train.epochs=[1", "override train.epochs=[1: not valid YAML"),
        ("train.epochs=!!python/none x", "found the tag '!!python/none'"),
        ("train.epochs=1\x00", "control character"),
        ("train.epochs.x=1", "is not a block of keys in the recipe"),
        ("train=", "override train=: train: found nothing (null) (must be a block"),
    ],
)
def test_a_bad_override_is_named_as_it_was_written(tmp_path: Path, override: str, expected: str) -> None:
    """The place of such a problem is the override itself."""
    lines = problems_of(tmp_path, "train: {epochs: 1}", override)
    assert len(lines) == 1, lines
    assert expected in lines[0]


def test_integers_pass_for_numbers_and_lists_for_pairs(tmp_path: Path) -> None:
    """`epochs: 3`, `warmup: 10` against `warmup: 1.0`, and `betas: [0, 0.5]` are read as meant."""
    recipe = load_recipe(
        None, ["train.epochs=3", "adapter.alpha=16", "train.warmup=10", "train.betas=[0, 0.5]"]
    )
    assert (recipe.train.epochs, recipe.train.warmup, recipe.train.betas) == (3.0, 10, (0.0, 0.5))
    assert type(recipe.train.epochs) is float
    assert type(recipe.train.warmup) is int
    assert type(load_recipe(None, ["train.warmup=1.0"]).train.warmup) is float


def test_the_schema_itself_refuses_what_the_loader_reports() -> None:
    """Building a section in code raises as well: no contradiction gets in around the loader."""
    with pytest.raises(ValueError, match=r"train\.warmup: found 9 .*; train\.early_stopping"):
        Recipe.model_validate({"train": {"max_steps": 3, "warmup": 9, "early_stopping": 2}})


_texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    base=_texts
    | st.sampled_from(["1e-4", "yes", "null", "~", "010", "1", "true", ".nan", "0x1", "2024-01-01", "a: b"]),
    rate=st.floats(1e-12, 10.0),
    targets=st.lists(_texts, min_size=1, max_size=3),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_dumped_recipe_loads_as_the_same_recipe(
    tmp_path_factory: pytest.TempPathFactory, base: str, rate: float, targets: list[str], seed: int
) -> None:
    """Whatever texts and numbers it holds, and with every default written out."""
    recipe = Recipe.model_validate(
        {
            "model": {"base": base},
            "adapter": {"method": "lora", "targets": targets},
            "train": {"learning_rate": rate},
            "run": {"seed": seed},
        }
    )
    path = tmp_path_factory.mktemp("dump") / "r.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path).resolved() == recipe.resolved()


_keys = st.sampled_from(sorted({key.path for key in all_keys()})) | st.text(
    "abtrain._ ", min_size=1, max_size=9
)
_scalars = st.sampled_from(
    ["null", "-1", "0", "1", "9223372036854775808", "1e400", ".nan", "yes", "[]", "{}", "[1, x]"]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(_keys, _scalars | st.text("a1[]{}:,'\"!&*", max_size=6)), max_size=6))
def test_any_overrides_make_a_recipe_or_an_input_error(pairs: list[tuple[str, str]]) -> None:
    """No key and no value raises anything else."""
    lines = ["a line"]
    try:
        load_recipe(None, [f"{key}={value}" for key, value in pairs])
    except InputError as error:
        lines = error.lines
    assert lines
    assert all("\n" not in line for line in lines)


def test_the_locale_does_not_matter(tmp_path: Path) -> None:
    """Under LC_ALL=C with an ASCII terminal the same bytes are printed as elsewhere."""
    path = tmp_path / "r.yaml"
    path.write_text("data: {train: größe.jsonl}\n", encoding="utf-8")
    command = [
        sys.executable,
        "-c",
        "from lora_cli.cli import main; raise SystemExit(main())",
        "recipe",
        "show",
        str(path),
    ]
    environment = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    result = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert "train: größe.jsonl" in result.stdout.decode("utf-8")
