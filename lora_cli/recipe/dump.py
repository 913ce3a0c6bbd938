"""A recipe becomes YAML with every default written out, so that `load_recipe` reads back the same recipe."""

from __future__ import annotations

from typing import Any

import yaml

from lora_cli.recipe.nodes import resolve
from lora_cli.recipe.schema import Recipe
from lora_cli.redaction import redacted


class _Dumper(yaml.SafeDumper):
    """Quotes every text that the strict reader would take for a number, a truth value or null."""

    def ignore_aliases(self, data: object) -> bool:
        """Write equal lists out: an anchor in a resolved recipe would only puzzle its reader."""
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = None if isinstance(resolve(value), str) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", redacted(value), style=style)


def _list(dumper: yaml.SafeDumper, value: list[object]) -> yaml.SequenceNode:
    nested = any(isinstance(one, dict) and any(isinstance(v, dict) for v in one.values()) for one in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=not nested)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(list, _list)


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML, every default written out, in the order of the schema."""
    return dump_values(recipe.resolved())


def dump_values(values: dict[str, Any]) -> str:
    """Return plain values as YAML that the strict reader reads back."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return text
