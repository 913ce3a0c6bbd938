"""`objective:` as a list: stages that run one after the other on the same model, each with a recipe of its own.

    objective:                                               OUTPUT/1-sft    from the recipe's base
      - {name: sft, data: {train: a.jsonl}}                  OUTPUT/2-dpo    from what OUTPUT/1-sft has made
      - {name: dpo, data: {train: pairs.jsonl}}

An entry has its objective's keys and those of `StageKeys`; the latter lie key by key over the recipe's own blocks. Each
stage becomes the tree of a plain recipe, in which every value keeps the place where it was written, and is read as one.

A stage goes on from the last one before it that trained the language model: from its adapter, where the method can
start from one, else from its merged model. A reward model is trained beside that line, and a constitution only makes
rows. `stage:NAME/FILE` is a file of an earlier stage's folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.errors import InputError
from lora_cli.recipe._stage_files import PREFIX
from lora_cli.recipe._stage_trees import Reading
from lora_cli.recipe.dump import dump_values
from lora_cli.recipe.load import read_tree, recipe_of, refusal
from lora_cli.recipe.nodes import MappingNode, SequenceNode
from lora_cli.recipe.overrides import key_of, place_of
from lora_cli.recipe.schema import Recipe, Run
from lora_cli.recipe.stage import BLOCKS, CONSTITUTION, Stage


@dataclass(frozen=True, slots=True)
class Chain:
    """A recipe whose `objective` is a list."""

    run: Run
    stages: tuple[Stage, ...]
    place: str
    """Where `run.output` was written."""

    @property
    def folder(self) -> Path:
        """Where it is kept; each stage has a folder in it."""
        return Path(self.run.output).expanduser()

    def policy(self) -> Stage | None:
        """Return the last stage that trains the language model."""
        return next((stage for stage in reversed(self.stages) if stage.trains), None)

    def resolved(self) -> dict[str, Any]:
        """Return the chain as plain YAML values, every default written out."""
        first = self.stages[0].recipe.resolved()
        folders = {one.recipe.run.output: f"{PREFIX}{one.name}" for one in self.stages}
        entries = [_as_written(_entry(stage), folders) for stage in self.stages]
        return {
            "model": first["model"], "adapter": first["adapter"], "objective": entries,
            "run": self.run.model_dump(mode="json"),
        }  # fmt: skip


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe | Chain:
    """Return the recipe in a file, or the chain where its objective is a list, with the overrides applied in order.

    Raises:
        InputError: with one line per problem, all of them at once.
    """
    problems: list[str] = []
    tree = read_tree(path, overrides, problems)
    found: Recipe | Chain | None
    if isinstance(tree.entries.get("objective", ("", None))[1], SequenceNode):
        reading = Reading(tree, problems)
        stages = reading.stages_of_all()
        found = _chain(stages, reading.output) if stages else None
        problems += _without_effect(tree, overrides) if stages else []
    else:
        found = recipe_of(tree, problems)
    if problems or found is None:
        raise refusal(problems)
    return found


def load_chain(path: Path) -> Chain:
    """Return the chain in a file.

    Raises:
        InputError: it is none, or has problems.
    """
    found = load(path)
    if isinstance(found, Recipe):
        raise InputError(f"{path}: its objective is no list of stages")
    return found


def dump_chain(chain: Chain) -> str:
    """Return the chain as YAML, every default written out, so that `load` reads back the same chain."""
    return dump_values(chain.resolved())


def _chain(stages: Sequence[Stage], output: str) -> Chain:
    first = stages[0].recipe
    return Chain(first.run.model_copy(update={"output": output}), tuple(stages), first.at("run.output"))


def _entry(stage: Stage) -> dict[str, Any]:
    values = stage.recipe.resolved()
    if stage.recipe.constitution is not None:
        return {"name": CONSTITUTION, "stage": stage.name, **values["constitution"], "data": values["data"]}
    own = {key: value for key, value in values["objective"].items() if key != "name"}
    named = {"name": stage.recipe.objective.name, "stage": stage.name}
    return named | own | {key: values[key] for key in BLOCKS}


def _as_written(value: Any, folders: dict[str, str]) -> Any:
    """Return values with the folders of stages as references to them."""
    if isinstance(value, dict):
        return {key: _as_written(inner, folders) for key, inner in value.items()}
    if isinstance(value, list):
        return [_as_written(inner, folders) for inner in value]
    if isinstance(value, str):
        for folder, name in folders.items():
            if value == folder or value.startswith(f"{folder}/"):
                return name + value.removeprefix(folder)
    return value


def _without_effect(tree: MappingNode, overrides: Sequence[str]) -> Iterator[str]:
    """Yield a line for each override of a key that every entry has of its own."""
    _, node = tree.entries["objective"]
    assert isinstance(node, SequenceNode)
    entries = [item for item in node.items if isinstance(item, MappingNode)]
    for override in overrides:
        block, _, rest = key_of(override).partition(".")
        key = rest.partition(".")[0]
        if block not in BLOCKS or not key:
            continue
        inner = [item.entries.get(block, ("", None))[1] for item in entries]
        if all(isinstance(one, MappingNode) and key in one.entries for one in inner):
            yield (
                f"{place_of(override)}: {block}.{key}: has no effect, every entry of objective has its own (write"
                f" objective.0.{block}.{key}=... for that of the first)"
            )
