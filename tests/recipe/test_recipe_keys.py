"""`recipe/keys.py` and `recipe/suggest.py`: what the schema says about its keys."""

from __future__ import annotations

import json

import pytest

from lora_cli.errors import InputError
from lora_cli.recipe.explain import explain
from lora_cli.recipe.keys import all_keys, discriminators, json_schema
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.suggest import OTHER_NAMES, nearest_key
from lora_cli.redaction import holds_secret, is_secret_name, redacted

PATHS = sorted({key.path for key in all_keys()})


@pytest.mark.parametrize("path", PATHS)
def test_every_key_is_documented_and_explained(path: str) -> None:
    """`explain` gives each key and block its documentation; null is a default only where it is allowed."""
    text = explain(path)
    assert text.startswith(path)
    assert len(text.split("\n")[-1].strip()) > 10
    for key in all_keys():
        if key.path == path and not key.is_block:
            assert key.schema.get("description"), f"{path} has no docstring"
            assert key.required or key.default is not None or "null" in key.expected


def test_a_key_of_two_methods_is_explained_for_each() -> None:
    """`adapter.method` says which values it has with which method."""
    assert "with adapter lora" in explain("adapter.rank")
    assert "with adapter full" in explain("adapter.parameters")


def test_an_unknown_key_is_explained_by_the_nearest() -> None:
    """`explain` of a wrong key is an error with a suggestion."""
    with pytest.raises(InputError, match=r"did you mean train\.warmup\?"):
        explain("warmup_steps")


def test_the_names_of_other_tools_lead_to_keys_that_exist() -> None:
    """Every entry is a key of the schema; no foreign name is a block of ours or there twice."""
    foreign = [name for names in OTHER_NAMES.values() for name in names]
    assert set(OTHER_NAMES) <= set(PATHS)
    assert len(foreign) == len(set(foreign))
    assert not set(foreign) & {path for path in PATHS if "." not in path}
    for ours, names in OTHER_NAMES.items():
        for name in names:
            leaves = [path for path in PATHS if path.rpartition(".")[2] == name]
            assert nearest_key(name) == f" (did you mean {leaves[-1] if leaves else ours}?)"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("init_r", "initial_rank"),
        ("target_r", "target_rank"),
        ("deltaT", "delta_t"),
        ("orth_reg_weight", "orthogonal_weight"),
        ("init_lora_weights", "init"),
        ("use_rslora", "scaling"),
        ("use_dora", "method"),
        ("modules_to_save", "train_also"),
        ("lora_alpha", "alpha"),
        ("target_modules", "targets"),
        ("layers_to_transform", "layers"),
        ("rho", "eva_rho"),
    ],
)
def test_pefts_names_in_the_adapter_block_lead_to_ours(theirs: str, ours: str) -> None:
    """A key of PEFT's configs, written in a recipe's adapter block, is answered with the key that does the same."""
    with pytest.raises(InputError, match=rf"adapter\.{theirs}: .*\(did you mean adapter\.{ours}\?\)"):
        load_recipe(None, [f"adapter.{theirs}=1"])


def test_a_word_like_nothing_gets_no_suggestion() -> None:
    """A wrong guess is worse than none."""
    assert nearest_key("qqqq") == ""
    assert nearest_key("train.qqqq") == ""


def test_the_json_schema_accepts_the_resolved_defaults() -> None:
    """It is JSON, refuses unknown keys, and has the blocks of a resolved recipe."""
    schema = json.loads(json.dumps(json_schema()))
    assert schema["additionalProperties"] is False
    assert list(schema["properties"]) == list(load_recipe(None).resolved())


def test_secrets_are_told_from_keys_and_names() -> None:
    """Keys like `max_new_tokens` and hub ids are no secrets; tokens and addresses with a password are."""
    assert not any(is_secret_name(path) for path in PATHS)
    assert all(is_secret_name(name) for name in ("token", "hf_token", "api_key", "wandb-api-key", "PASSWORD"))
    assert not any(
        map(holds_secret, ("hf_internal_testing/tiny", "models/sk-small", "https://host/x@y", "a:b@c"))
    )
    assert all(map(holds_secret, ("hf_" + "a1B2" * 8, "sk-proj-" + "a1B2" * 8, "https://u:p@host/x")))
    assert redacted("https://u:p@host/x") == "https://***host/x"


def test_blocks_with_variants_are_those_of_the_schema() -> None:
    """The keys that choose a block's variant, read from the fields, are the discriminators of the JSON Schema."""
    schema, found = json_schema(), {}
    for name, block in schema["properties"].items():
        for option in (block, *block.get("anyOf", ()), *block.get("oneOf", ())):
            if "discriminator" in option:
                key = option["discriminator"]["propertyName"]
                found[name] = (key, block["default"][key])
    assert found
    assert discriminators() == found
