"""What stands under each field of the schema, read from its source where it is asked for.

pydantic can read it as it makes the classes (`use_attribute_docstrings`), which takes 60 ms of every command; only
`lora recipe` and a misspelt key need it.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

from lora_cli.recipe.section import Section


def documented(schema: dict[str, Any], kind: type[Section]) -> dict[str, Any]:
    """Add to the JSON Schema of a section, and of all that it refers to, the texts of the fields; return it."""
    kinds = {one.__name__: one for one in _kinds(Section)}
    for name, block in [(kind.__name__, schema), *schema.get("$defs", {}).items()]:
        for field, described in block.get("properties", {}).items():
            if text := _text(kinds[name], field):
                described["description"] = text
    return schema


def _kinds(kind: type[Section]) -> Iterator[type[Section]]:
    yield kind
    for inner in kind.__subclasses__():
        yield from _kinds(inner)


def _text(kind: type[Section], field: str) -> str | None:
    """Return what stands under a field, in the class that declares it last."""
    for owner in kind.__mro__:
        if field in inspect.get_annotations(owner):
            return _texts(owner.__module__).get(owner.__name__, {}).get(field)
    return None


@cache
def _texts(module: str) -> dict[str, dict[str, str]]:
    """Return the texts under the fields of each class of a module."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {one.name: dict(_under_fields(one)) for one in ast.walk(tree) if isinstance(one, ast.ClassDef)}


def _under_fields(definition: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, below in pairwise(definition.body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            yield field.target.id, inspect.cleandoc(below.value.value)
