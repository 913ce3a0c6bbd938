"""A YAML file and `key.path=value` overrides become a `Recipe`, or one list of all that is wrong with them.

Every line of the list is `FILE:LINE:COLUMN: key.path: what was found (what to do)`. pydantic decides what is
valid; the words come from the schema, because pydantic's name its union members and validators, not keys.
Where keys are at fault the rest is validated once more without them, so that rules that join keys are in the
same list; a rule that depends on a key at fault stays silent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lora_cli.errors import InputError
from lora_cli.recipe import keys, suggest
from lora_cli.recipe.nodes import MappingNode, Node, ScalarNode, SequenceNode, resolve
from lora_cli.recipe.overrides import apply_overrides
from lora_cli.recipe.schema import Conflict, Recipe
from lora_cli.recipe.yaml_reader import read_file
from lora_cli.redaction import holds_secret, is_secret_name, redacted

Path_ = tuple[str, ...]


def load_recipe(path: Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in a file (None: the defaults) with `key.path=value` overrides applied in order.

    Raises:
        InputError: with one line per problem, all of them at once; or its objective is a list, see `chain.py`.
    """
    problems: list[str] = []
    tree = read_tree(path, overrides, problems)
    place, objective = tree.entries.get("objective", ("", None))
    if isinstance(objective, SequenceNode):
        raise InputError(
            f"{place}: objective: found a list, which lora-train runs one after the other (give a recipe of one"
            " objective, or the recipe.yaml of one stage's folder)"
        )
    recipe = recipe_of(tree, problems)
    if problems or recipe is None:
        raise refusal(problems)
    return recipe


def read_tree(path: Path | None, overrides: Sequence[str], problems: list[str]) -> MappingNode:
    """Return the tree of a recipe file with the overrides in it; what is wrong is added to `problems`.

    Raises:
        InputError: the file cannot be read at all.
    """
    tree = MappingNode("recipe") if path is None else read_file(path, problems)
    apply_overrides(tree, overrides, problems)
    return tree


def recipe_of(tree: MappingNode, problems: list[str]) -> Recipe | None:
    """Return the recipe that a tree stands for; what is wrong with it is added to `problems`."""
    draft = _Draft()
    draft.values = draft.plain(tree, ())
    recipe = _validate(draft, problems)
    if recipe is not None:
        recipe._places.update({".".join(key): place for key, place in draft.places.items()})
    return recipe


def refusal(problems: Iterable[str]) -> InputError:
    """Return the fault of a recipe with these problems, in the order of the file."""
    return InputError(sorted(dict.fromkeys(problems), key=_reading_order))


@dataclass(slots=True)
class _Draft:
    """What was written, as plain values, with the place of each key; `bad` are the keys at fault."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Path_, str] = field(default_factory=dict)
    bad: list[Path_] = field(default_factory=list)

    def plain(self, node: Node, path: Path_) -> Any:
        """Return a node as plain values, noting where each key was written."""
        if isinstance(node, ScalarNode):
            return node.value
        if isinstance(node, SequenceNode):
            return [self.plain(item, (*path, str(index))) for index, item in enumerate(node.items)]
        values = {}
        for name, (place, value) in node.entries.items():
            self.places[(*path, name)] = place
            if value.faulty:
                self.bad.append((*path, name))
            else:
                values[name] = self.plain(value, (*path, name))
        return values

    def at(self, path: Path_) -> str:
        """Return `place: key.path`; of a key that was not written, the place of the block it belongs to."""
        known = next((path[:end] for end in range(len(path), 0, -1) if path[:end] in self.places), None)
        key = redacted(".".join(path))
        return f"{self.places[known]}: {key}" if known else key

    def get(self, path: Path_) -> Any:
        """Return the value at a path, None where there is none."""
        value: Any = self.values
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def remove(self, path: Path_) -> None:
        """Take a key at fault out, so that the rest can be validated."""
        self.bad.append(path)
        parent = self.get(path[:-1])
        if isinstance(parent, dict):
            parent.pop(path[-1], None)


def _validate(draft: _Draft, problems: list[str]) -> Recipe | None:
    problems.extend(_secrets(draft, draft.values, ()))
    recipe = None
    for _ in range(keys.MAX_LEVELS):  # taking a key out can only uncover that a block lacks a required one
        conflicts: list[Conflict] = []
        _fill_discriminators(draft)
        try:
            recipe = Recipe.model_validate_json(json.dumps(draft.values), context=conflicts)
            break
        except ValidationError as error:
            problems.extend(_faults(draft, error))
    bad = {".".join(path) for path in draft.bad}
    for conflict in conflicts:
        if not any(_related(key, other) for key in (conflict.key, *conflict.reads) for other in bad):
            problems.append(f"{draft.at(tuple(conflict.key.split('.')))}: {conflict.message}")
    return recipe


def _fill_discriminators(draft: _Draft) -> None:
    """pydantic's tagged unions have no default tag: `adapter: {rank: 8}` needs its method filled in."""
    for block, (key, default) in keys.discriminators().items():
        value = draft.values.get(block)
        if isinstance(value, dict):
            value.setdefault(key, default)


def _faults(draft: _Draft, error: ValidationError) -> Iterator[str]:
    """Yield one line per key at fault, and take these keys out of the draft."""
    found: dict[Path_, str] = {}
    for detail in error.errors(include_url=False, include_context=False, include_input=False):
        # An item that a list lacks or has too much is a fault of the list's value, not of a key.
        kind = detail["type"] if isinstance(detail["loc"][-1], str) else "value"
        path = _key_path(draft.values, detail["loc"], kind)
        if path not in found or kind in ("extra_forbidden", "missing"):
            found[path] = kind
    paths = [path for path in found if not any(path[:end] in found for end in range(1, len(path)))]
    unknown = {path: _unknown(draft, path) for path in paths if found[path] == "extra_forbidden"}
    for path in paths:
        match found[path]:
            case "extra_forbidden":
                line = f"{draft.at(path)}: {unknown[path]}"
            case "missing" if any(f"mean {'.'.join(path)}?" in hint for hint in unknown.values()):
                continue  # misspelt, and reported as such
            case "missing":
                expected = _expected(draft, path)
                line = f"{draft.at(path)}: is missing ({expected})"
            case _:
                line = f"{draft.at(path)}: {_wrong(draft, path)}"
        if path not in draft.bad:
            yield line
    for path in paths:  # after all lines: they look at the keys beside them
        value = str(draft.get(path))
        draft.remove(path[:-1] if found[path] == "missing" else path)
        if found[path].startswith("union_tag"):  # go on with the method that was meant, or without the block
            if near := suggest.nearest(value, keys.variants(path[0])):
                draft.values[path[0]][path[1]] = near
            else:
                draft.remove(path[:1])


def _key_path(values: Any, location: tuple[str | int, ...], kind: str) -> Path_:
    """Return the user's key: pydantic's location also names union members and positions in lists."""
    path: list[str] = []
    for step in location:
        if isinstance(values, list):
            break
        if isinstance(values, dict) and step in values:
            values = values[step]
            path.append(str(step))
    if kind == "missing":
        path.append(str(location[-1]))
    elif kind.startswith("union_tag"):
        path.append(keys.discriminators()[path[0]][0])
    return tuple(path)


def _variant(draft: _Draft, path: Path_) -> str | None:
    """Return the adapter method (or objective) whose keys a path may have, None where there is no choice."""
    discriminator = keys.discriminators().get(path[0])
    return draft.get((path[0], discriminator[0])) if discriminator else None


def _expected(draft: _Draft, path: Path_) -> str:
    name = ".".join(path)
    discriminator = keys.discriminators().get(path[0])
    if discriminator and path[1:] == (discriminator[0],):
        return "one of " + ", ".join(keys.variants(path[0]))
    found = keys.keys_at(name, _variant(draft, path)) or keys.keys_at(name)
    if not found:  # an entry of a mapping, whose names are the user's own
        return keys.entry_of(keys.keys_at(".".join(path[:-1]), _variant(draft, path))[0])
    return found[0].expected


def _unknown(draft: _Draft, path: Path_) -> str:
    name = ".".join(path)
    if is_secret_name(path[-1]):
        return "a secret has no place in a recipe, which is copied into the run (set HF_TOKEN instead)"
    owners = [key.variant for key in keys.keys_at(name) if key.variant is not None]
    if not owners:
        hint = suggest.nearest_key(name, taken=(".".join(key) for key in draft.places))
        if (
            not hint
            and len(path) > 1
            and (blocks := keys.keys_at(".".join(path[:-1]), _variant(draft, path)))
        ):
            hint = f" (its block is {blocks[0].expected})"
        return f"unknown key{hint or f' (there are {_names(keys.top_level())})'}"
    discriminator = keys.discriminators()[path[0]][0]
    place = draft.places.get((path[0], discriminator), "")
    chosen = f"{path[0]}.{discriminator} {_variant(draft, path)}"
    if place.startswith("override "):
        chosen += f", chosen by {place.partition(': ')[0]}"
    return f"is a key of {', '.join(owners)}, not of {chosen} (remove one of the two)"


def _wrong(draft: _Draft, path: Path_) -> str:
    value, expected = draft.get(path), _expected(draft, path)
    text = f"found {suggest.shown(value)}"
    near = None
    if isinstance(value, str):
        if isinstance(resolve(value), (int, float)) and "number" in expected + expected.replace(
            "integer", "number"
        ):
            return f"{text} (must be {expected}; remove the quotes)"
        near = suggest.nearest(value, re.findall(r"[\w-]+", expected.replace("one of", "")))
    elif expected.startswith("text") and value is not None and not isinstance(value, list):
        return f"{text} (must be {expected}; put it in quotes)"
    return f"{text} (must be {expected}{f'; did you mean {near}?' if near else ''})"


def _secrets(draft: _Draft, value: Any, path: Path_) -> Iterator[str]:
    """Yield a line per text that looks like a token or an address with a password in it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if not is_secret_name(name):  # reported as an unknown key
                yield from _secrets(draft, inner, (*path, name))
    elif isinstance(value, list):
        for inner in value:
            yield from _secrets(draft, inner, path)
    elif holds_secret(value):
        yield f"{draft.at(path)}: found a token or password (use HF_TOKEN; a recipe is copied into the run)"


def _related(one: str, other: str) -> bool:
    return one == other or one.startswith(other + ".") or other.startswith(one + ".")


def _names(words: Iterable[str]) -> str:
    return ", ".join(words)


def _reading_order(line: str) -> tuple[bool, int, int]:
    """Sort by line and column of the file; overrides, which follow it on the command line, come last."""
    match = re.match(r".*?:(\d+):(\d+): ", line)
    if line.startswith("override ") or match is None:
        return (True, 0, 0)
    return (False, int(match[1]), int(match[2]))
