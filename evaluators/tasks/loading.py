"""Finding a task by its name, and making it. Naming them all imports neither torch nor any task."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixnas.search_space.errors import ConfigError, NasError, nearest

if TYPE_CHECKING:
    from mixnas.evaluators.tasks.task import Task


def names() -> list[str]:
    """Names of the tasks that come with the package."""
    return sorted(_built_in())


@cache
def _built_in() -> dict[str, str]:
    return find_tasks(Path(__file__).parent, __package__)


def find_tasks(folder: Path, package: str) -> dict[str, str]:
    """The tasks in the files of a folder, by name: the classes with a class attribute `name = "..."`.

    The files are read, not imported.

    Args:
        folder: Where they lie.
        package: What the folder is imported as.

    Returns:
        "package.module:Class" by name.

    Raises:
        NasError: Two tasks have one name.
    """
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            name = _name_in(node) if isinstance(node, ast.ClassDef) else None
            if name is None:
                continue
            place = f"{package}.{path.stem}:{node.name}"  # type: ignore[attr-defined]
            if name in found:
                raise NasError(f"two tasks are called {name!r}: {found[name]} and {place}. Rename one.")
            found[name] = place
    return found


def _name_in(node: ast.ClassDef) -> str | None:
    """The text that a class gives its attribute `name`."""
    for statement in node.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            named = any(isinstance(target, ast.Name) and target.id == "name" for target in targets)
            if named and isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str):
                return statement.value.value
    return None


def by_name(spec: str | Mapping[str, Any], /, **options: Any) -> Task:
    """Build a task.

    Args:
        spec: A name ("digits"), "package.module:Class", or a mapping {name: ..., option: value} as in a
            configuration file.
        **options: Keyword arguments of the task's class, added to those of the mapping.

    Returns:
        The task, checked for all that a task must have.

    Raises:
        ConfigError: No such task, module, class or option, or the class does not make a task.
    """
    from mixnas.evaluators.tasks.checks import check_class, check_task

    if isinstance(spec, Mapping):
        options = {**{key: value for key, value in spec.items() if key != "name"}, **options}
        if "name" not in spec:
            raise ConfigError(f"task: no name is given. Write name: with one of {', '.join(names())} or module:Class.")
        spec = spec["name"]
    if not isinstance(spec, str):
        raise ConfigError(f"task: {spec!r} is not a name. Give one of {', '.join(names())} or package.module:Class.")
    cls = _find_class(spec)
    check_class(cls, spec)  # before it is called: a class that is no task might do anything
    _check_options(spec, cls, options)
    try:
        task = cls(**options)
    except NasError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"task {spec!r}: making it failed: {type(error).__name__}: {error}") from error
    return check_task(task, spec)


def _find_class(name: str) -> type:
    path = _built_in().get(name, name)
    module_name, colon, class_name = path.partition(":")
    if not colon or not module_name or not class_name:
        raise ConfigError(
            f"task: no task is called {name!r}.{nearest(name, names())} Allowed: {', '.join(names())}, "
            "or a class of your own as package.module:Class."
        )
    # A user's own module lies beside the configuration more often than it is installed.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise ConfigError(f"task {name!r}: importing {module_name} failed: {error}.") from error
        raise ConfigError(
            f"task {name!r}: no module {error.name!r} is found. Run from the directory that it lies in, "
            "install it, or put its directory on PYTHONPATH."
        ) from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"task {name!r}: importing {module_name} failed: {type(error).__name__}: {error}") from error
    cls = getattr(module, class_name, None)
    if not isinstance(cls, type):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        own = [key for key in classes if vars(module)[key].__module__ == module.__name__]
        raise ConfigError(
            f"task {name!r}: {module_name} has no class {class_name!r}.{nearest(class_name, own)} "
            f"Its classes: {', '.join(own) or 'none'}."
        )
    return cls


def _check_options(name: str, cls: type, options: Mapping[str, Any]) -> None:
    parameters = [p for p in inspect.signature(cls).parameters.values() if p.kind is not p.VAR_POSITIONAL]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    allowed = [p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY]
    for option in options:
        if option not in allowed:
            raise ConfigError(
                f"task {name!r}: no option {option!r}.{nearest(option, allowed)} "
                f"Allowed: {', '.join(allowed) or 'none, it takes no options'}."
            )
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in options:
            raise ConfigError(f"task {name!r}: option {parameter.name!r} must be given; it has no default.")
