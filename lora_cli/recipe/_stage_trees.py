"""A list of objectives on its way to stages: each entry becomes the tree of a plain recipe, which is read as one."""

from __future__ import annotations

from lora_cli.recipe import suggest
from lora_cli.recipe._stage_files import Known, files_of, resolve_references
from lora_cli.recipe.load import recipe_of
from lora_cli.recipe.nodes import MappingNode, Node, ScalarNode, SequenceNode
from lora_cli.recipe.schema import Recipe, Run
from lora_cli.recipe.stage import BLOCKS, CONSTITUTION, NAME, OF_TRAINING, Stage, StageKeys, exporting

_TOKENS = ("train_tokens", "add_tokens")


class Reading:
    """A tree on its way to a chain; what is wrong is added to `problems`."""

    def __init__(self, tree: MappingNode, problems: list[str]) -> None:
        self.tree, self.problems = tree, problems
        self.place, node = tree.entries["objective"]
        assert isinstance(node, SequenceNode)
        self.items = node.items
        _, run = tree.entries.get("run", ("", None))
        self.run = run if isinstance(run, MappingNode) else MappingNode("")
        _, output = self.run.entries.get("output", ("", None))
        value = output.value if isinstance(output, ScalarNode) else None
        self.output = value if isinstance(value, str) and value else Run().output
        self.stages: list[Stage] = []

    def stages_of_all(self) -> list[Stage] | None:
        """Return the stages; None where one cannot be read."""
        names = self._names()
        if names is None:
            return None
        if CONSTITUTION in self.tree.entries:
            place, _ = self.tree.entries[CONSTITUTION]
            self.problems.append(
                f"{place}: constitution: found beside a list of objectives (make it an entry: name: constitution)"
            )
        for index, (name, item) in enumerate(zip(names, self.items, strict=True)):
            assert isinstance(item, MappingNode)
            tree, later = self._tree_of(index, name, item, names[:index])
            recipe = recipe_of(tree, self.problems)
            if recipe is not None:
                self.stages.append(Stage(name, index + 1, recipe, frozenset(later)))
        return self.stages if len(self.stages) == len(names) else None

    def _names(self) -> list[str] | None:
        """Return the names of all stages; None where they cannot be told."""
        known = len(self.problems)
        if not self.items:
            self.problems.append(
                f"{self.place}: objective: found an empty list (name at least one objective)"
            )
        names: list[str] = []
        for index, item in enumerate(self.items):
            key = f"objective.{index}"
            if not isinstance(item, MappingNode):
                self.problems.append(f"{item.place}: {key}: is no block of keys (write name: sft, dpo, ...)")
                continue
            place, name = _named(item)
            if not NAME.fullmatch(name):
                self.problems.append(
                    f"{place}: {key}.stage: found {suggest.shown(name)}, which names no folder (use at most 64 letters,"
                    " digits, dots, - and _)"
                )
            elif name in names:
                self.problems.append(
                    f"{place}: {key}.stage: found {name} twice (give one of the two another name: stage: NAME)"
                )
            names.append(name)
        return names if len(self.problems) == known else None

    def _tree_of(
        self, index: int, name: str, item: MappingNode, before: list[str]
    ) -> tuple[MappingNode, set[str]]:
        """Return the tree of a stage's own recipe, and the keys in it that name what is yet to be made."""
        makes_rows = _text(item, "name") == CONSTITUTION
        entries = {
            key: pair for key, pair in self.tree.entries.items() if key not in ("objective", CONSTITUTION)
        }
        own = {key: pair for key, pair in item.entries.items() if key not in StageKeys.model_fields}
        for key in BLOCKS:
            if makes_rows and key != "data":
                entries.pop(key, None)
                if key in item.entries:
                    place = item.entries[key][0]
                    self.problems.append(f"{place}: {key}: a constitution trains nothing (remove the block)")
            elif key in item.entries:
                entries[key] = _laid_over(entries.get(key), item.entries[key])
        if makes_rows:
            own.pop("name")
        entries[CONSTITUTION if makes_rows else "objective"] = (item.place, MappingNode(item.place, own))
        folder = f"{self.output.rstrip('/') or self.output}/{index + 1}-{name}"
        written, _ = self.run.entries.get("output", (item.place, None))
        entries["run"] = (self.run.place or item.place, _with(self.run, "output", written, folder))
        tree = MappingNode(self.tree.place, entries)
        later = self._go_on(tree, item.place)
        later |= resolve_references(tree, before, self._known(), self.problems)
        return tree, later

    def _known(self) -> dict[str, Known]:
        """Return of each stage so far its folder, its objective, and the files that another may read."""
        return {
            stage.name: (stage.recipe.run.output, stage.objective, files_of(stage.recipe))
            for stage in self.stages
        }

    def _go_on(self, tree: MappingNode, place: str) -> set[str]:
        """Have a tree start from the last stage that trained the language model; return the key that says so."""
        found = next((at for at in reversed(range(len(self.stages))) if self.stages[at].trains), None)
        if found is None:
            return set()
        stage = self.stages[found]
        block = tree.entries.get("adapter", (place, None))[1]
        adapter = block if isinstance(block, MappingNode) else MappingNode(place)
        if "init_from" in type(stage.recipe.adapter).model_fields:
            for key, tokens in zip(_TOKENS, stage.recipe.chosen_tokens(), strict=True):
                if tokens:
                    self.problems.append(
                        f"{stage.recipe.at(f'adapter.{key}')}: found {tokens[0]!r}, but no stage can start from rows of"
                        " single tokens (train them alone, merge with lora-merge, and give that as model.base)"
                    )
            self.stages[found] = exporting(stage, "peft")
            kept = {key: pair for key, pair in adapter.entries.items() if key in OF_TRAINING}
            started = _with(MappingNode(adapter.place, kept), "init_from", place, stage.recipe.run.output)
            tree.entries["adapter"] = (place, started)
            return {"adapter.init_from"}
        self.stages[found] = exporting(stage, "merged")
        block = tree.entries.get("model", (place, None))[1]
        model = (
            MappingNode(place, dict(block.entries)) if isinstance(block, MappingNode) else MappingNode(place)
        )
        model.entries.pop("revision", None)
        merged = f"{stage.recipe.run.output}/merged"
        tree.entries["model"] = (place, _with(model, "base", place, merged))
        return {"model.base"}


def _named(item: MappingNode) -> tuple[str, str]:
    """Return the name of an entry's stage, and where it was written."""
    for key in ("stage", "name"):
        place, node = item.entries.get(key, (item.place, None))
        if isinstance(node, ScalarNode) and node.value is not None:
            return place, str(node.value)
    return item.place, Recipe().objective.name


def _text(item: MappingNode, key: str) -> str | None:
    node = item.entries.get(key, ("", None))[1]
    return node.value if isinstance(node, ScalarNode) and isinstance(node.value, str) else None


def _laid_over(shared: tuple[str, Node] | None, own: tuple[str, Node]) -> tuple[str, Node]:
    """Return an entry's block over the recipe's own, key by key; what is no block stays as it was written."""
    place, node = own
    if shared is None or not isinstance(node, MappingNode) or not isinstance(shared[1], MappingNode):
        return own
    return place, MappingNode(place, {**shared[1].entries, **node.entries})


def _with(block: MappingNode, key: str, place: str, value: str) -> MappingNode:
    return MappingNode(block.place, {**block.entries, key: (place, ScalarNode(place, value))})
