"""`stage:NAME/FILE` in a recipe: a file, or the folder, of an earlier stage of the chain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lora_cli.recipe import suggest
from lora_cli.recipe.nodes import MappingNode, Node, ScalarNode, SequenceNode
from lora_cli.recipe.schema import Recipe

PREFIX = "stage:"
_REWARD = "reward"

Known = tuple[str, str, frozenset[str]]
"""Of a stage: its folder, its objective, and the files that another may read."""


def is_reference(value: object) -> bool:
    """Say whether a value names something of another stage."""
    return isinstance(value, str) and value.startswith(PREFIX)


def files_of(recipe: Recipe) -> frozenset[str]:
    """Return the files of rows that a stage with this recipe leaves behind."""
    settings = recipe.constitution
    if settings is None:
        return frozenset()
    made = {"sft.jsonl": settings.rounds, "pairs.jsonl": settings.samples}
    return frozenset(name for name, count in made.items() if count)


def resolve_references(
    tree: MappingNode, before: Sequence[str], known: Mapping[str, Known], problems: list[str]
) -> set[str]:
    """Put paths into a stage's tree in place of its references; return the keys that have one.

    `before` are the names of the stages before it; `known` those of them that could be read.
    """
    keys = set()
    for key, node, is_folder in _places(tree):
        if not is_reference(node.value):
            continue
        keys.add(key)
        fault = _resolve(node, is_folder, before, known)
        if fault:
            problems.append(f"{node.place}: {key}: {fault}")
    return keys


def _places(tree: MappingNode) -> Iterator[tuple[str, ScalarNode, bool]]:
    """Yield the values that may be references, each a node of its own, with their keys; of folders true."""
    data = _block(tree, "data")
    for name in ("train", "eval"):
        for node in _own_values(data, name):
            yield f"data.{name}", node, False
    sources = _block(data, "sources")
    for name in list(sources.entries) if sources is not None else ():
        for node in _own_values(_block(sources, name), "path"):
            yield f"data.sources.{name}.path", node, False
    for node in _own_values(_block(tree, "constitution"), "prompts"):
        yield "constitution.prompts", node, False
    yield from _rewards(_block(tree, "objective"), "objective")
    yield from _rewards(_block(_block(tree, "evaluate"), "win_rate"), "evaluate.win_rate")


def _rewards(block: MappingNode | None, key: str) -> Iterator[tuple[str, ScalarNode, bool]]:
    """Yield the runs that a block's list of rewards names, likewise."""
    if block is None or not isinstance(rewards := block.entries.get("rewards", ("", None))[1], SequenceNode):
        return
    items = [
        MappingNode(one.place, dict(one.entries)) if isinstance(one, MappingNode) else one
        for one in rewards.items
    ]
    block.entries["rewards"] = (block.entries["rewards"][0], SequenceNode(rewards.place, list(items)))
    for item in items:
        for node in _own_values(item if isinstance(item, MappingNode) else None, "run"):
            yield f"{key}.rewards", node, True


def _block(parent: MappingNode | None, key: str) -> MappingNode | None:
    """Return the block called `key` as a copy in its place, so that what other stages share is not changed."""
    if parent is None or not isinstance(node := parent.entries.get(key, ("", None))[1], MappingNode):
        return None
    copy = MappingNode(node.place, dict(node.entries))
    parent.entries[key] = (parent.entries[key][0], copy)
    return copy


def _own_values(block: MappingNode | None, key: str) -> Iterator[ScalarNode]:
    """Yield the value of a key, or those of its list, as copies in their place."""
    if block is None or key not in block.entries:
        return
    place, node = block.entries[key]
    copy = _copied(node)
    block.entries[key] = (place, copy)
    for one in copy.items if isinstance(copy, SequenceNode) else [copy]:
        if isinstance(one, ScalarNode):
            yield one


def _copied(node: Node) -> Node:
    if isinstance(node, ScalarNode):
        return ScalarNode(node.place, node.value, node.faulty)
    if isinstance(node, SequenceNode):
        return SequenceNode(node.place, [_copied(one) for one in node.items], node.faulty)
    return node


def _resolve(
    node: ScalarNode, is_folder: bool, before: Sequence[str], known: Mapping[str, Known]
) -> str | None:
    """Put the path into a node; return what is wrong with the reference."""
    written = str(node.value)
    name, _, file = written.removeprefix(PREFIX).partition("/")
    if name not in before:
        near = suggest.nearest(name, before)
        there = f"did you mean {PREFIX}{near}?" if near else f"before it are {', '.join(before) or 'none'}"
        return f"found {written}, which is no stage before this one ({there})"
    if name not in known:
        return None  # what is wrong with that stage is told already
    folder, objective, files = known[name]
    if is_folder:
        if file or objective != _REWARD:
            return f"found {written}, but a run that rewards is a stage of the objective {_REWARD} (name one)"
        node.value = folder
        return None
    if file not in files:
        made = f"it makes {', '.join(sorted(files))}" if files else f"{objective} makes no rows"
        return f"found {written}, but there is no such file of stage {name} ({made})"
    node.value = f"{folder}/{file}"
    return None
