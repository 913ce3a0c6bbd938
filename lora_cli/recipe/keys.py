"""What the schema says about its keys: a table of paths, their types in words, and the JSON Schema.

All is read from the JSON Schema that pydantic generates: it is uniform where the annotations are not (unions,
bounds, literals and defaults have one form each).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from lora_cli.recipe.field_texts import documented
from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.stage import CONSTITUTION, StageKeys

JsonSchema = dict[str, Any]

MAX_LEVELS = 6
"""Blocks nest no deeper than this; `data.sources.NAME.fields.prompt` has five levels."""
ANY_NAME = "*"
"""Stands in a path for a name of the user's own: `data.sources.*.weight`."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key or block a user may write; `variant` is the adapter method or objective it belongs to, if any."""

    path: str
    variant: str | None
    schema: JsonSchema
    required: bool
    is_block: bool

    @property
    def leaf(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]

    @property
    def expected(self) -> str:
        """What the value must be, in words."""
        return in_words(self.schema)

    @property
    def default(self) -> Any:
        """The default, None where there is none."""
        return self.schema.get("default")


def json_schema() -> JsonSchema:
    """Return the JSON Schema of a recipe, for editors that complete and check YAML."""
    schema = copy.deepcopy(_schema())
    defs, objective = schema["$defs"], schema["properties"]["objective"]
    entries = []
    for name in [*objective["discriminator"]["mapping"].values(), "Constitution"]:
        kind = name.rpartition("/")[2]
        defs[f"{kind}Stage"] = _with_stage_keys(defs[kind])
        entries.append({"$ref": f"#/$defs/{kind}Stage"})
    stages = {"type": "array", "minItems": 1, "items": {"anyOf": entries}}
    schema["properties"]["objective"] = {"anyOf": [objective, stages], "default": objective["default"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "lora-cli recipe",
    }


@cache
def stage_keys() -> JsonSchema:
    """Return the keys that an entry of a list of objectives has besides, by name."""
    keys: JsonSchema = documented(StageKeys.model_json_schema(), StageKeys)["properties"]
    return keys


def _with_stage_keys(block: JsonSchema) -> JsonSchema:
    """Return the block of an objective, or of a constitution, as an entry of a list of objectives."""
    properties, required = {**block["properties"]}, block.get("required", [])
    if "name" not in properties:
        properties = {"name": {"const": CONSTITUTION, "type": "string"}} | properties
        required, stages = ["name", *required], {key: stage_keys()[key] for key in ("stage", "data")}
    else:
        stages = stage_keys()
    return {
        **block,
        "title": f"{block['title']}Stage",
        "properties": properties | stages,
        "required": required,
    }


@cache
def _schema() -> JsonSchema:
    return documented(Recipe.model_json_schema(), Recipe)


@cache
def all_keys() -> tuple[Key, ...]:
    """Return every block and key, in the order of the schema; a key of two methods is there twice."""
    return tuple(_walk("", None, _schema()))


def keys_at(path: str, variant: str | None = None) -> list[Key]:
    """Return the keys at a path, only those of `variant` where one is given and the path has variants."""
    found = [key for key in all_keys() if _same(key.path, path)]
    return [key for key in found if variant is None or key.variant in (None, variant)]


def _same(known: str, path: str) -> bool:
    if ANY_NAME not in known:
        return known == path
    parts, names = known.split("."), path.split(".")
    return len(parts) == len(names) and all(
        one in (ANY_NAME, name) for one, name in zip(parts, names, strict=True)
    )


def entry_of(mapping: Key) -> str:
    """Return what an entry of a mapping such as `adapter.rank_pattern` must be, in words."""
    return in_words(mapping.schema["additionalProperties"])


def discriminators() -> dict[str, tuple[str, str]]:
    """Return the key that chooses between a block's variants, and its default: adapter -> (method, lora).

    Asked for every recipe, so from the fields themselves: the schema takes 50 ms to make.
    """
    return {
        name: (field.discriminator, getattr(field.default, field.discriminator))
        for name, field in Recipe.model_fields.items()
        if isinstance(field.discriminator, str)
    }


def variants(block: str) -> list[str]:
    """Return the names a block's variants have: adapter -> lora, full."""
    options = options_of(_schema()["properties"][block])
    return [name for option in options for name in option.get("discriminator", {}).get("mapping", {})]


def top_level() -> list[str]:
    """Return the names of the blocks: model, data, adapter, ..."""
    return list(_schema()["properties"])


def in_words(schema: JsonSchema) -> str:
    """Return what a value must be: `an integer from 1 to 4096`, `auto or an integer of at least 1`."""
    if options := schema.get("anyOf") or schema.get("oneOf"):
        words = [in_words(option) for option in options]
        blocks = [word for word in words if word.startswith("a block")]
        rest = [word for word in words if word not in blocks]
        return " or ".join(dict.fromkeys(blocks[:1] + rest))
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(str(choice) for choice in schema["enum"])
    match schema.get("type"):
        case "integer":
            return "an integer" + _bounds(schema)
        case "number":
            return "a number" + _bounds(schema)
        case "string":
            return "text"
        case "boolean":
            return "true or false"
        case "null":
            return "null"
        case "array" if "prefixItems" in schema:
            return "a list of " + ", ".join(in_words(item) for item in schema["prefixItems"])
        case "array":
            return f"a list of {in_words(schema['items'])}" if "items" in schema else "a list"
        case "object" if isinstance(entry := schema.get("additionalProperties"), dict):
            return f"a mapping of names to {in_words(entry).removeprefix('an ').removeprefix('a ')}"
    names = ", ".join(_resolve(schema).get("properties", {}))
    return f"a block of keys: {names}" if names else "a block of keys"


def _bounds(schema: JsonSchema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f" from {_plain(low)} to {_plain(high)}"
    words = {
        "minimum": "of at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    parts = [f"{word} {_plain(schema[name])}" for name, word in words.items() if name in schema]
    return " " + " and ".join(parts) if parts else ""


def _plain(bound: float) -> str:
    return str(int(bound)) if bound == int(bound) else str(bound)


def _walk(prefix: str, variant: str | None, schema: JsonSchema) -> Iterator[Key]:
    required = schema.get("required", [])
    for name, value in schema.get("properties", {}).items():
        path = f"{prefix}.{name}" if prefix else name
        blocks = [option for option in options_of(value) if "properties" in option]
        yield Key(path, variant, value, name in required, is_block=bool(blocks))
        choosing = [option["discriminator"] for option in options_of(value) if "discriminator" in option]
        for option in options_of(value):
            entry = option.get("additionalProperties")
            if isinstance(entry, dict) and "properties" in (block := _resolve(entry)):
                yield Key(f"{path}.{ANY_NAME}", variant, block, required=False, is_block=True)
                yield from _walk(f"{path}.{ANY_NAME}", variant, block)
        for block in blocks:
            chosen = block["properties"][choosing[0]["propertyName"]]["const"] if choosing else variant
            yield from _walk(path, chosen, block)


def _resolve(schema: JsonSchema) -> JsonSchema:
    if "$ref" in schema:
        target: JsonSchema = _schema()["$defs"][schema["$ref"].rpartition("/")[2]]
        return target
    return schema


def options_of(schema: JsonSchema) -> Iterator[JsonSchema]:
    """Yield the schema and everything it may be instead, references followed."""
    schema = _resolve(schema)
    yield schema
    for option in schema.get("anyOf", []) + schema.get("oneOf", []) + schema.get("allOf", []):
        yield from options_of(option)
