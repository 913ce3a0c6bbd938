"""The floors: who may import whom, and what the command line must not import before it has to."""

from __future__ import annotations

import ast
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lora_cli"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
FLOORS = {
    "cli": 6,
    "__main__": 7,
    "chain": 5,
    "chain_preflight": 5,
    "pipeline": 4,
    "without_training": 4,
    "preflight": 4,
    "stages": 3,
    "data": 2,
    "adapters": 2,
    "objectives": 2,
    "constitution": 2,
    "runtime": 2,
    "models": 1,
    "recipe": 0,
    "types": 0,
    "targets": 0,
    "errors": 0,
    "redaction": 0,
    "network": 0,
}
"""First part of the name below lora_cli -> floor. Others: see SHARED."""
SHARED = ("disk", "failpoints", "interrupts", "manifest", "paths", "publish", "seeding")
"""Leaves without a floor: every floor may import them, they import only `errors` and each other."""
HELPERS = ("_base", "_fused", "_low_rank", "_peft", "_portable", "_targets", "_whole")
"""What every adapter method may import; `_NAME_*` belongs to the method NAME alone."""
LINES = {"module": 300, "function": 60}
"""The longest that there may be, docstrings and signatures among them."""
TORCH_FREE = ("recipe", "errors", "redaction", "network", "preflight", "chain_preflight", "cli")
HEAVY = ("torch", "transformers", "peft", "datasets", "bitsandbytes", "safetensors", "accelerate")


def imports_of(tree: ast.AST, module: str, is_package: bool, *, of_types: bool = False) -> Iterator[str]:
    """Yield the full name of all that a module imports, inside functions too; not what is for types only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not of_types:
            for branch in node.orelse:
                yield from imports_of(branch, module, is_package)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parents = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES else base
        else:
            yield from imports_of(node, module, is_package, of_types=of_types)


def imports(module: str, source: str | None = None) -> set[str]:
    """Return what a module of the package imports."""
    path = MODULES[module]
    tree = ast.parse(path.read_text(encoding="utf-8") if source is None else source)
    return set(imports_of(tree, module, path.name == "__init__.py"))


def room(module: str) -> str:
    """Return the part of a module's name that has a floor: lora_cli.data.read -> data."""
    return module.split(".")[1] if "." in module else ""


def violations(module: str, imported: set[str]) -> list[str]:
    """Return the imports of a module that do not go downward."""
    here, found = room(module), []
    for name in sorted(imported):
        there = room(name)
        if not name.startswith("lora_cli.") or there == here:
            continue
        if here in SHARED:
            allowed = there in (*SHARED, "errors", "types")
        elif there in SHARED or FLOORS.get(there) == FLOORS.get(here) == 0:
            allowed = here not in ("errors", "types") and not (here == "recipe" and there in SHARED)
        else:
            allowed = FLOORS[there] < FLOORS[here]
        if not allowed:
            found.append(f"{module} imports {name}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downward_never_sideways(module: str) -> None:
    """Each package imports only packages of lower floors; imports inside functions count too."""
    if module != "lora_cli":
        assert room(module) in FLOORS or room(module) in SHARED, f"{module} has no floor"
        assert violations(module, imports(module)) == []


@pytest.mark.parametrize(
    "module", [name for name in MODULES if room(name) == "stages" and name.count(".") == 2]
)
def test_stages_do_not_import_each_other(module: str) -> None:
    """A stage may share helpers, which begin with an underscore, but knows no other stage."""
    others = [name for name in imports(module) if name.startswith("lora_cli.stages.")]
    assert [name for name in others if not name.rpartition(".")[2].startswith("_")] == []


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("lora_cli.adapters.")])
def test_a_method_imports_at_most_one_other_method(module: str) -> None:
    """A method knows the shared helpers, those named after it, and at most one other method; helpers know none."""
    inside = {name for name in imports(module) if name.startswith("lora_cli.adapters.")}
    methods = {name for name in inside if not name.rpartition(".")[2].startswith("_")}
    if module.rpartition(".")[2].startswith("_"):
        assert methods == set() or module.endswith("._peft"), f"{module} imports the method {methods}"
    else:
        own = module.replace("adapters.", "adapters._") + "_"
        others = {name for name in inside - methods if not name.startswith(own)}
        assert others <= {f"lora_cli.adapters.{name}" for name in HELPERS}
        assert len(methods) <= 1


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in TORCH_FREE])
def test_recipe_errors_preflight_and_cli_import_no_torch(module: str) -> None:
    """Not even inside a function: what needs torch is reached through `pipeline`."""
    assert {name.split(".")[0] for name in imports(module)} & set(HEAVY) == set()


@pytest.mark.parametrize(
    ("module", "source", "count"),
    [
        ("lora_cli.data.read", "from lora_cli.stages import train", 1),
        ("lora_cli.data.read", "import lora_cli.runtime.dist", 1),
        ("lora_cli.data.read", "def f():\n    from lora_cli.adapters import _peft", 1),
        ("lora_cli.data.read", "from ..pipeline import train", 1),
        ("lora_cli.data.read", "from .faults import Faults\nfrom ..errors import InputError", 0),
        ("lora_cli.errors", "from lora_cli.recipe.schema import Recipe", 1),
        ("lora_cli.preflight", "from lora_cli import pipeline", 1),
    ],
)
def test_a_wrong_import_would_be_seen(module: str, source: str, count: int) -> None:
    """The check itself can fail: absolute, relative and late imports are all read."""
    assert len(violations(module, imports(module, source))) == count


def too_long(source: str) -> list[str]:
    """Return the functions of a module that are too long, and `module` where all of it is."""
    functions = (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    found = [node.name for node in functions if (node.end_lineno or 0) - node.lineno >= LINES["function"]]
    return found + ["module"] * (len(source.splitlines()) > LINES["module"])


@pytest.mark.parametrize("module", MODULES)
def test_no_module_or_function_is_too_long(module: str) -> None:
    """What is longer than a reader can hold has a part that wants a name and a place of its own."""
    assert too_long(MODULES[module].read_text(encoding="utf-8")) == []


def test_what_is_too_long_is_seen() -> None:
    """The check itself can fail, at one line more than is allowed."""
    body = "    pass\n" * (LINES["function"] - 1)
    assert too_long(f"class A:\n  def f():\n{body}") == []
    assert too_long(f"class A:\n  def f():\n{body}    pass\n") == ["f"]
    assert too_long("a = 1\n" * LINES["module"]) == []
    assert too_long("a = 1\n" * (LINES["module"] + 1)) == ["module"]


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_the_command_line_imports_nothing_heavy() -> None:
    """Importing lora_cli.cli, and refusing a bad recipe, loads neither torch nor transformers nor numpy."""
    code = (
        "import sys; from lora_cli.cli import train_main; code = train_main(['/nowhere.yaml', 'lr=1']); "
        "print(code, sorted({m.split('.')[0] for m in sys.modules} & set(sys.argv[1:])))"
    )
    result = _python("-c", code, "numpy", "pyarrow", "rich", *HEAVY)
    assert result.stdout.strip() == "2 []", result.stdout + result.stderr


def test_a_good_recipe_is_checked_without_them() -> None:
    """Checking a recipe, its first rows, its chat template and its base imports neither torch nor numpy."""
    code = (
        "import sys; from lora_cli.cli import train_main; code = train_main([sys.argv[1], '--check']); "
        "print(code, sorted({m.split('.')[0] for m in sys.modules} & set(sys.argv[2:])))"
    )
    recipe = str(ROOT / "configs/quickstart.yaml")
    result = _python("-c", code, recipe, "numpy", "pyarrow", "rich", *HEAVY)
    assert result.stdout.splitlines()[-1] == "0 []", result.stdout + result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "seconds"),
    [(["--help"], 0, 0.2), (["{recipe}", "--check"], 2, 0.45), (["{good}", "--check"], 0, 0.5)],
)
def test_help_and_checks_are_quick(tmp_path: Path, arguments: list[str], code: int, seconds: float) -> None:
    """The best of 5 processes keeps the limit, in CPU seconds, which other processes disturb little."""
    recipe, good = tmp_path / "r.yaml", ROOT / "configs/quickstart.yaml"
    recipe.write_text("modle: {}\ntrain: {lr: 1, epochs: x}\nadapter: {rank: 0}\n")
    best = 60.0
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = _python("-m", "lora_cli", *(part.format(recipe=recipe, good=good) for part in arguments))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        assert result.returncode == code, result.stderr
    assert best <= seconds, f"{best:.3f} s"
