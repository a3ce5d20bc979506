"""The dependency direction of the design, checked on every import statement of the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ["kernels", "search_space", "predictors", "evaluators", "search", "cli"]
FILES = sorted(path for package in ORDER for path in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, at its top or inside functions."""
    names: set[str] = set()
    package = ("mixnas", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def test_there_is_something_to_check():
    assert len(FILES) > 30 and {path.relative_to(ROOT).parts[0] for path in FILES} == set(ORDER)
    assert "mixnas.search_space.errors.NasError" in imported(ROOT / "search_space" / "registry.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path):
    place = ORDER.index(path.relative_to(ROOT).parts[0])
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "mixnas" and len(parts) > 1:
            target = parts[1]
            assert target in ORDER[: place + 1], f"{path.relative_to(ROOT)} imports {name}, which lies below it"
        if ORDER[place] in ("kernels", "search_space", "predictors"):
            assert parts[0] not in ("optuna", "ray"), f"{path.relative_to(ROOT)} imports {parts[0]}"


@pytest.mark.parametrize(
    "module", ["mixnas", "mixnas.cli.main", "mixnas.search_space.space", "mixnas.search_space.files"]
)
def test_light_modules_load_nothing_heavy(module: str):
    code = (
        f"import sys, {module}; heavy = {{'torch', 'optuna', 'ray', 'sklearn', 'triton'}} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
