"""The dependency direction of the design, checked on every import statement of the package; and no circle of imports.

Imports are read from the files' text. A module-level import is one that runs when its module is imported: not inside a
function, not under `if TYPE_CHECKING:`.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ["kernels", "search_space", "predictors", "evaluators", "search", "cli"]
FILES = sorted(path for package in ORDER for path in (ROOT / package).rglob("*.py"))

FLOOR = ("search_space.errors", "search_space.files", "search_space.settings", "search_space.reporting")
FORBIDDEN = [
    # from, to, why
    ("search_space.operators", "search_space.network", "an operator does not know the network that it stands in"),
    ("search_space.operators", "search_space.supernet", "an operator does not know whose weights it has"),
    ("search_space.operators", "search_space.formats", "an operator is not written by itself"),
    ("predictors.measuring", "predictors.latency", "measuring does not know what is fitted on it"),
]


def module_name(path: Path, root: Path = ROOT) -> str:
    """`mixnas.search.job` of search/job.py; a package's name of its `__init__.py`."""
    parts = ["mixnas", *path.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def targets(node: ast.Import | ast.ImportFrom, path: Path, root: Path = ROOT) -> set[str]:
    """Absolute names that an import statement asks for: modules, or `module.name`."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    package = ("mixnas", *path.relative_to(root).parts[:-1])
    base = package[: len(package) - node.level + 1] if node.level else ()
    module = ".".join([*base, *([node.module] if node.module else [])])
    return {f"{module}.{alias.name}" for alias in node.names}


@cache
def imported(path: Path) -> set[str]:
    """Absolute names that a file imports, at its top or inside functions."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {name for node in nodes for name in targets(node, path)}


def at_import(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements of a module that run when it is imported."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from at_import(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for field in ("body", "orelse", "finalbody"):
                yield from at_import(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from at_import(handler.body)


def import_graph(root: Path, files: list[Path]) -> dict[str, set[str]]:
    """The modules that each module imports while it is imported itself.

    Importing `a.b.c` runs the packages `a` and `a.b` first. Those count too, but for the packages that the importing
    module lies in: they have begun in any case. What it asks of such a package by name counts.
    """
    names = {module_name(path, root) for path in files}
    graph: dict[str, set[str]] = {}
    for path in files:
        name = module_name(path, root)
        found: set[str] = set()
        for node in at_import(ast.parse(path.read_text()).body):
            for target in targets(node, path, root):
                module = target if target in names else target.rpartition(".")[0]
                found |= {module, *set(_packages(module)).difference(_packages(name))}
        graph[name] = (found & names) - {name}
    return graph


def _packages(name: str) -> list[str]:
    """The packages that a module lies in."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle in order, the first again at the end; [] where there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(reversed(error.args[1]))
    return []


def test_there_is_something_to_check():
    assert len(FILES) > 30 and {path.relative_to(ROOT).parts[0] for path in FILES} == set(ORDER)
    assert "mixnas.search_space.errors.NasError" in imported(ROOT / "search_space" / "registry.py")
    modules = {module_name(path).removeprefix("mixnas.") for path in FILES}
    for rule in FORBIDDEN:
        assert set(rule[:2]) <= modules, f"{rule[:2]}: no such module: change the rule"


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


def test_what_is_imported_of_the_package_is_there():
    modules = {"mixnas", *(module_name(path) for path in FILES)}
    for path in FILES:
        for name in imported(path):
            if name.startswith("mixnas."):
                there = name in modules or name.rpartition(".")[0] in modules
                assert there, f"{path.relative_to(ROOT)} imports {name}: no such module"


@pytest.mark.parametrize("rule", FORBIDDEN, ids=lambda rule: f"{rule[0]} to {rule[1]}")
def test_folders_know_only_what_they_may(rule: tuple[str, str, str]):
    source, target, why = rule
    for path in FILES:
        if f"{module_name(path)}.".startswith(f"mixnas.{source}."):
            for name in imported(path):
                broken = f"{name}.".startswith(f"mixnas.{target}.")
                assert not broken, f"{path.relative_to(ROOT)} imports {name}: {why}"


@pytest.mark.parametrize("module", FLOOR)
def test_the_floor_stands_on_itself(module: str):
    path = ROOT / f"{module.replace('.', '/')}.py"
    for name in imported(path):
        if name.startswith("mixnas"):
            assert f"{name}.".startswith(tuple(f"mixnas.{other}." for other in FLOOR)), f"{path.name} imports {name}"


def test_no_circle_of_imports():
    files = [ROOT / "__init__.py", ROOT / "nas.py", *FILES]
    graph = import_graph(ROOT, files)
    assert graph["mixnas.search.run.directory"] >= {"mixnas.search_space.errors", "mixnas.search_space.files"}
    found = circle(graph)
    assert not found, " imports ".join(found)


def test_a_circle_is_found_where_there_is_one(tmp_path: Path):
    def check(**texts: str) -> list[str]:
        for name, text in texts.items():
            path = tmp_path / f"{name.replace('__', '/')}.py" if name != "package" else tmp_path / "a" / "__init__.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return circle(import_graph(tmp_path, sorted(tmp_path.rglob("*.py"))))

    assert check(package="", a__x="from mixnas.a import y", a__y="import torch") == []
    found = check(a__y="try:\n    from mixnas.b import thing\nexcept ImportError:\n    pass", b="import mixnas.a.x")
    assert found[0] == found[-1] and set(found) == {"mixnas.a.x", "mixnas.a.y", "mixnas.b"}
    assert check(b="def later():\n    import mixnas.a.x") == []
    assert check(b="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import mixnas.a.x") == []
    # a package's own file counts for whoever imports from the package, from outside
    assert check(package="from mixnas.b import z", b="from mixnas.a.x import thing") != []
    assert check(package="from .x import thing", a__x="from . import y", a__y="", b="") == []
    assert check(package="from .x import thing\nhere = 1", a__x="from mixnas.a import here") != []


@pytest.mark.parametrize(
    "module", ["mixnas", "mixnas.cli.main", "mixnas.search_space.space", "mixnas.search_space.files"]
)
def test_light_modules_load_nothing_heavy(module: str):
    code = (
        f"import sys, {module}; heavy = {{'torch', 'optuna', 'ray', 'sklearn', 'triton'}} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
