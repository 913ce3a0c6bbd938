"""`key.path=value` on the command line, written into the tree of a recipe; its place is the override itself.

A number in the path is an entry of a list: `objective.0.train.max_steps=5`.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_cli.errors import InputError
from lora_cli.recipe.nodes import MappingNode, Node, ScalarNode, SequenceNode
from lora_cli.recipe.yaml_reader import read_text
from lora_cli.redaction import is_secret_name, redacted


def apply_overrides(tree: MappingNode, overrides: Sequence[str], problems: list[str]) -> None:
    """Write each override into the tree, in order; what is wrong with one is added to `problems`."""
    keys = [key_of(override) for override in overrides]
    problems += [
        f"override {key}: is given twice (leave one out)" for key in set(keys) if keys.count(key) > 1
    ]
    for override in overrides:
        _apply(tree, override, problems)


def key_of(override: str) -> str:
    """Return the key that an override sets."""
    return override.partition("=")[0].strip()


def place_of(override: str) -> str:
    """Return how messages call an override; what may be a secret is not shown."""
    key, equals, _ = override.partition("=")
    written = f"{key}{equals}***" if any(map(is_secret_name, key.split("."))) else redacted(override)
    return "override " + (written if len(written) <= 80 else written[:77] + "...")


def _apply(tree: MappingNode, override: str, problems: list[str]) -> None:
    place, (key, equals, text) = place_of(override), override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        problems.append(f"{place}: found no key and value (write key.path=value)")
        return
    try:
        value = read_text(text, problems, place=place)
    except InputError as error:
        problems.extend(error.lines)
        return
    block: MappingNode | SequenceNode = tree
    for name in names[:-1]:
        found = _child(block, name, place)
        if isinstance(found, str):
            problems.append(f"{place}: {found}")
            return
        block = found
    if isinstance(block, SequenceNode):
        problems.append(
            f"{place}: leads into the list at {block.place} (give all of it, or LIST.0.KEY=value for a key of its first"
            " entry)"
        )
        return
    block.entries[names[-1]] = (place, value)


def _child(block: MappingNode | SequenceNode, name: str, place: str) -> MappingNode | SequenceNode | str:
    """Return the block or list called `name` in a block, or at that number in a list, as one that may be changed.

    A copy, put in its place: an anchor may have put the same block in two places. A string says why there is none.
    """
    if isinstance(block, SequenceNode):
        if not name.isascii() or not name.isdigit() or int(name[:4]) >= len(block.items):
            return (
                f"there is no entry {name} in the list at {block.place} (it has 0 to {len(block.items) - 1})"
            )
        inner = _copied(block.items[int(name)], place)
        if inner is None:
            return f"entry {name} of the list at {block.place} is not a block of keys (correct it there)"
        block.items[int(name)] = inner
        return inner
    written, node = block.entries.get(name, (place, ScalarNode(place, None)))
    inner = _copied(node, place)
    if inner is None:
        return f"{name} is not a block of keys in the recipe, at {written} (correct it there)"
    block.entries[name] = (written, inner)
    return inner


def _copied(node: Node, place: str) -> MappingNode | SequenceNode | None:
    if isinstance(node, MappingNode):
        return MappingNode(node.place, dict(node.entries))
    if isinstance(node, SequenceNode):
        return SequenceNode(node.place, list(node.items))
    return MappingNode(place) if node.value is None else None
