"""`lora recipe explain KEY`: documentation, type, bounds and default of a key or of a block, from the schema."""

from __future__ import annotations

import json
from collections.abc import Iterator

from lora_cli.errors import InputError
from lora_cli.recipe.keys import (
    JsonSchema,
    Key,
    all_keys,
    discriminators,
    json_schema,
    keys_at,
    options_of,
    stage_keys,
    variants,
)
from lora_cli.recipe.suggest import nearest_key


def explain(key: str) -> str:
    """Return type, default and documentation of a key, or of a block with all its keys.

    Raises:
        InputError: there is no such key; the nearest one is suggested.
    """
    if key in ("", "recipe"):
        schema = json_schema()
        blocks = [f"{name}: {_summary(block)}" for name, block in schema["properties"].items()]
        return "\n".join([schema["description"], "", *blocks])
    found = keys_at(key)
    block, _, name = key.rpartition(".")
    if block == "objective" and name in stage_keys():
        return _explain_key(Key(key, "in a list", stage_keys()[name], required=False, is_block=False))
    if not found:
        raise InputError(f"{key}: unknown key{nearest_key(key)}")
    parts: list[str] = []
    for entry in found:
        parts.extend(_explain_block(entry) if entry.is_block else [_explain_key(entry)])
    if key == "objective":
        besides = ", ".join(stage_keys())
        parts.append(
            "Or a list of objectives, run one after the other, each with the keys above and besides: "
            f"{besides}.\nAn entry `name: constitution` has the keys of the block constitution and makes rows."
        )
    return "\n\n".join(dict.fromkeys(parts))


def _summary(schema: JsonSchema) -> str:
    described = [option["description"] for option in options_of(schema) if "description" in option]
    return " ".join(" | ".join(described).split())


def _explain_key(key: Key) -> str:
    block = key.path.partition(".")[0]
    title = key.path if key.variant is None else f"{key.path} (with {block} {key.variant})"
    expected, default = key.expected, key.default
    chooser, chosen = discriminators().get(block, ("", ""))
    if key.path == f"{block}.{chooser}":
        title, expected, default = key.path, "one of " + ", ".join(variants(block)), chosen
    documentation = " ".join(key.schema.get("description", "").split())
    shown = "required" if key.required else f"default {json.dumps(default)}"
    return f"{title}: {expected}; {shown}\n    {documentation}"


def _explain_block(block: Key) -> Iterator[str]:
    yield f"{block.path}: {block.schema.get('description') or _summary(block.schema)}"
    yield from (_explain_key(key) for key in all_keys() if key.path.startswith(block.path + "."))
