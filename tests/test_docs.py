"""What README and docs say of the project is so."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from lora_cli.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_file_tree_is_complete() -> None:
    """The README's tree names every module of the package, and no module that does not exist."""
    tree = README.split("```\nlora_cli/\n", 1)[1].split("```", 1)[0]
    named = set(re.findall(r"[\w]+\.py\b", tree))
    modules = {path.name for path in (ROOT / "lora_cli").rglob("*.py") if path.stat().st_size > 200}
    assert modules - {"__init__.py"} <= named
    assert named <= modules | {path.name for path in (ROOT / "scripts").glob("*.py")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link of a page leads to a file of the project."""
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_and_recipes_named_exist(page: Path) -> None:
    """Every script, recipe and test that a page names is there."""
    for name in re.findall(
        r"\b(?:scripts|configs|benchmarks|tests)/[\w./-]+\.(?:sh|py|yaml)", page.read_text(encoding="utf-8")
    ):
        assert (ROOT / name).exists(), name


def test_no_path_of_a_machine_is_committed() -> None:
    """No committed text names a home or work folder of the machine it was written on."""
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, files.split("\0")):
        path = ROOT / name
        if (
            path.suffix in {".py", ".md", ".yaml", ".yml", ".toml", ".json", ".sh", ".txt"}
            and "tests" not in path.parts
        ):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"(^|[^A-Za-z0-9_.])/(work|root|home)/\w", text), name


def test_the_recipe_explained_is_valid(tmp_path: Path) -> None:
    """The recipe in the README loads, with the overrides that the README shows."""
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        (tmp_path / "recipe.yaml").write_text(block)
        recipe = load_recipe(
            tmp_path / "recipe.yaml", ["train.learning_rate=5e-4", "adapter.targets=[q_proj,v_proj]"]
        )
        assert recipe.train.learning_rate == 5e-4
