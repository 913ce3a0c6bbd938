"""A key exists only if code outside recipe/ reads it from a value that is a section of the recipe.

Such a value is `x.SECTION`, a name SECTION, a parameter or class attribute annotated with a schema class,
or what such a parameter was assigned to. Adapter keys reach the methods as arguments, which must be used.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence
from pathlib import Path

import pytest
from pydantic import BaseModel

from lora_cli.adapters import method_class
from lora_cli.recipe import objective_blocks, rollout_blocks, schema
from lora_cli.recipe.keys import ANY_NAME, all_keys

PACKAGE = Path(__file__).resolve().parent.parent / "lora_cli"
SECTIONS = {
    name
    for module in (schema, objective_blocks, rollout_blocks)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and issubclass(kind, BaseModel)
}
KEYS = sorted({(key.path, key.variant or "") for key in all_keys() if not key.is_block})

Reads = set[tuple[str, str]]


class Reader(ast.NodeVisitor):
    """Collects (section, key) of every attribute read, and (function, argument) of every argument used."""

    def __init__(self) -> None:
        self.reads: Reads = set()
        self.arguments: Reads = set()
        self.sections: dict[str, set[str]] = {}
        """Name of a variable, or `.name` of an attribute of self -> sections it may be."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Annotations of arguments hold inside the function only."""
        outer = dict(self.sections)
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        self.sections |= {argument.arg: _sections_in(argument.annotation) for argument in arguments}
        used = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
        self.arguments |= {(node.name, argument.arg) for argument in arguments if argument.arg in used}
        self.generic_visit(node)
        self.sections = outer | {name: value for name, value in self.sections.items() if name.startswith(".")}

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """`settings: Train` in the body of a class is an attribute of self."""
        if isinstance(node.target, ast.Name):
            self.sections["." + node.target.id] = _sections_in(node.annotation)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        """`self.settings = settings` and `settings = self.settings` pass a section on."""
        pairs = [(target, node.value) for target in node.targets]
        if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = list(zip(node.targets[0].elts, node.value.elts, strict=False))
        for target, value in pairs:
            name, source = _name(target), _name(value)
            if name and source in self.sections:
                self.sections[name] = self.sections[source]
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """The read itself."""
        if isinstance(node.ctx, ast.Load):
            name = _name(node.value)
            self.reads |= {(section, node.attr) for section in self.sections.get(name, ())}
            if isinstance(node.value, (ast.Attribute, ast.Name)):
                self.reads.add((name.lstrip("."), node.attr))
        self.generic_visit(node)


def _name(node: ast.AST) -> str:
    """Return `x` of a variable, `.x` of an attribute."""
    if isinstance(node, ast.Attribute):
        return "." + node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _sections_in(annotation: ast.AST | None) -> set[str]:
    names = {_name(node).lstrip(".") for node in ast.walk(annotation)} if annotation else set()
    return {_section_of(name) for name in names & SECTIONS}


def _section_of(name: str) -> str:
    """Return the key under which a class of the schema stands: LoraAdapter -> adapter."""
    if name == "DataSource":
        return ANY_NAME  # data.sources.NAME
    return next((end.lower() for end in ("Adapter", "Objective") if name.endswith(end)), name.lower())


def reads(*sources: str) -> Reads:
    """Return every (section, key) that these sources read."""
    found: Reads = set()
    for source in sources:
        reader = Reader()
        reader.visit(ast.parse(source))
        found |= reader.reads
    return found


def method_arguments(source: str) -> set[str]:
    """Return the arguments that the constructors of a method's file use."""
    reader = Reader()
    reader.visit(ast.parse(source))
    return {argument for function, argument in reader.arguments if function == "__init__"}


def passed_on(source: str, called: Reads) -> Reads:
    """Return what the schema's own methods read, of those that other code calls."""
    names = {name for _, name in called} - {"conflicts"}
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return reads(*(ast.unparse(node) for node in functions if node.name in names))


def unread(keys: Sequence[str], found: Reads) -> list[str]:
    """Return the keys that are not among what was read."""
    return [key for key in keys if tuple(key.split(".")[-2:]) not in found]


@pytest.fixture(scope="module")
def found() -> Reads:
    """All that the package reads, outside recipe/."""
    outside = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "recipe"]
    direct = reads(*(path.read_text(encoding="utf-8") for path in outside))
    return direct | passed_on(Path(schema.__file__).read_text(encoding="utf-8"), direct)


@pytest.mark.parametrize(("key", "variant"), KEYS)
def test_every_key_is_read_by_some_code(found: Reads, key: str, variant: str) -> None:
    """A key that nothing reads would be a promise without an effect."""
    method = PACKAGE / "adapters" / f"{variant}.py"
    if key.startswith("adapter.") and key not in ("adapter.method", "adapter.init_from") and method.exists():
        # `qlora` is another name of a method, whose constructor stands in that one's file.
        source = inspect.getsourcefile(method_class(variant))
        assert source is not None
        assert key.split(".")[1] in method_arguments(Path(source).read_text(encoding="utf-8"))
    elif key.startswith("objective.") and key not in ("objective.name", "objective.train_on"):
        source = (PACKAGE / "objectives" / f"{variant}.py").read_text(encoding="utf-8")
        # Those that sample share a base, and are given their block as a whole.
        shared = [
            (PACKAGE / "objectives" / name).read_text(encoding="utf-8")
            for name in ("_rollouts.py", "_completions.py", "_rewards.py")
        ]
        assert key.split(".")[1] in method_arguments(source) or not unread([key], reads(source, *shared))
    else:
        assert unread([key], found) == []


@pytest.mark.parametrize(
    ("source", "key", "is_read"),
    [
        ("recipe.train.power", "train.power", True),
        ("def f(train): return train.power", "train.power", True),
        ("def f(section: Train): return section.power", "train.power", True),
        ("def f(section: LoraAdapter | None): return section.rank", "adapter.rank", True),
        ("class C:\n def __init__(s, a: Train): s.x = a\n def f(s): return s.x.power", "train.power", True),
        ("class C:\n x: Train\n def f(s):\n  y = s.x\n  return y.power", "train.power", True),
        ("# train.power\n'train.power'", "train.power", False),
        ("train.power = 1", "train.power", False),
        ("other.power", "train.power", False),
        ("def f(section: Data): return section.power", "train.power", False),
        ("def f(section: Train): pass\ndef g(section): return section.power", "train.power", False),
    ],
)
def test_reading_a_key_is_told_from_naming_it(source: str, key: str, is_read: bool) -> None:
    """The check itself can fail: writing, naming, or reading it from something else does not count."""
    assert (unread([key], reads(source)) == []) is is_read


def test_an_argument_that_a_method_ignores_does_not_count() -> None:
    """A method's file must use what it is given, not only accept it."""
    assert method_arguments("class M:\n def __init__(self, rank, alpha): self.rank = rank") == {
        "rank",
        "self",
    }


def test_what_the_schema_passes_on_counts_only_if_it_is_called() -> None:
    """`Recipe.export_formats` reads export.formats for its callers; `conflicts` is no use of a key."""
    source = (
        "class R:\n def a(self): return self.export.formats\n def conflicts(self): return self.train.power"
    )
    assert passed_on(source, reads("recipe.a()\nrecipe.conflicts()")) >= {("export", "formats")}
    assert ("train", "power") not in passed_on(source, reads("recipe.a()\nrecipe.conflicts()"))
    assert passed_on(source, set()) == set()
