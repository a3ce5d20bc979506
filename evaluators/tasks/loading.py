"""Finding a task by its name, and making it. Naming them all imports neither torch nor any task."""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixnas.search_space.errors import ConfigError, NasError, listed, nearest, shown
from mixnas.search_space.files import read_bytes

if TYPE_CHECKING:
    from mixnas.evaluators.tasks.task import Task


_LONGEST_NAME = 100


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
    """The text that a class gives its attribute `name`, alone or beside others (`name, metric = "mine", "mae"`)."""
    for statement in node.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for value in (given for target in targets for given in _given_to_name(target, statement.value)):
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    return value.value
    return None


def _given_to_name(target: ast.expr, value: ast.expr) -> Iterator[ast.expr]:
    if isinstance(target, ast.Name) and target.id == "name":
        yield value
    elif isinstance(target, ast.Tuple | ast.List) and isinstance(value, ast.Tuple | ast.List):
        for one, given in zip(target.elts, value.elts, strict=False):
            yield from _given_to_name(one, given)


def is_built_in(spec: Any) -> bool:
    """Whether a configuration's `task` names one that comes with the package: no other program is run for it."""
    name = spec.get("name") if isinstance(spec, Mapping) else spec
    return isinstance(name, str) and name in _built_in()


def source_of(module_name: str) -> Path | None:
    """The file of a module, found as an import would find it, but without importing anything; None where it has none.

    Args:
        module_name: With its packages, "package.module".
    """
    places: list[str] | None = None
    found = None
    for part in _parts(module_name):
        try:
            if places is None:
                path = [*sys.path, *([] if "" in sys.path else [os.getcwd()])]
                found = importlib.machinery.PathFinder.find_spec(part, path) or importlib.util.find_spec(part)
            else:
                found = importlib.machinery.PathFinder.find_spec(part, places)
        except (ImportError, ValueError, AttributeError, OSError):
            return None
        if found is None:
            return None
        places = list(found.submodule_search_locations or [])
    return Path(found.origin) if found is not None and found.has_location and found.origin else None


def _parts(module_name: str) -> list[str]:
    parts = module_name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def by_name(spec: str | Mapping[str, Any], /, **options: Any) -> Task:
    """Build a task.

    Args:
        spec: A name ("digits"), "package.module:Class", or a mapping {name: ..., option: value} as in a
            configuration file.
        **options: Keyword arguments of the task's class, added to those of the mapping; and what every task has:
            `teacher`, a trained network to learn from (`evaluators.teaching`), `init`, a run or an export to begin
            with (`evaluators.starting`), and `at_most`, the number of examples that each split has at most.

    Returns:
        The task, checked for all that a task must have.

    Raises:
        ConfigError: No such task, module, class or option, or the class does not make a task.
    """
    if isinstance(spec, Mapping):
        options = {**{key: value for key, value in spec.items() if key != "name"}, **options}
        if "name" not in spec:
            raise ConfigError(f"task: no name is given. Write name: with one of {', '.join(names())} or module:Class.")
        spec = spec["name"]
    if not isinstance(spec, str):
        raise ConfigError(f"task: {shown(spec)} is not a name. Give one of {listed(names())} or package.module:Class.")
    from mixnas.evaluators.isolation import undisturbed
    from mixnas.evaluators.tasks import checks  # and torch with them, whose state is put back too

    at_most, teacher, init = (options.pop(name, None) for name in ("at_most", "teacher", "init"))
    with undisturbed():
        task = _made(spec, options, checks.check_class)
    with undisturbed():
        checked = checks.check_task(task, spec)
    if teacher is not None:
        from mixnas.evaluators.teaching import Teacher, TeacherConfig

        checked.teacher = Teacher(TeacherConfig.from_plain(teacher, f"task {spec!r}: teacher"), checked)
    if init is not None:
        from mixnas.evaluators.starting import Start

        checked.start = Start(init, f"task {spec!r}: init")
    if at_most is None:
        return checked
    from mixnas.evaluators.tasks.thinning import thinned

    return thinned(checked, at_most)


def _made(spec: str, options: Mapping[str, Any], check_class: Callable[[type, str], None]) -> object:
    cls = _find_class(spec)
    check_class(cls, spec)  # before it is called: a class that is no task might do anything
    _check_options(spec, cls, options)
    try:
        return cls(**options)
    except NasError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"task {spec!r}: making it failed: {type(error).__name__}: {error}") from error


def _find_class(name: str) -> type:
    path = _built_in().get(name, name)
    module_name, _, class_name = path.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), class_name)) or len(path) > _LONGEST_NAME:
        raise ConfigError(
            f"task: no task is called {shown(name)}.{nearest(name, names())} Allowed: {listed(names())}, "
            "or a class of your own as package.module:Class."
        )
    # A user's own module lies beside the configuration more often than it is installed.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    if module_name not in sys.modules:
        _check_source(name, module_name, class_name)
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
            f"Its classes: {listed(own) or 'none'}."
        )
    return cls


def _check_source(name: str, module_name: str, class_name: str) -> None:
    """Refuse a module that, as its text stands, has no such class or one that is no task's: importing it runs it.

    Raises:
        ConfigError: See above. What the text does not tell (a star import, an extension) is left to the import.
    """
    file = source_of(module_name)
    if file is None or file.suffix != ".py":
        return
    try:
        nodes = list(_at_module_level(ast.parse(read_bytes(file)).body))
    except (SyntaxError, ValueError, RecursionError, ConfigError):
        return  # the import says what is wrong
    if any(isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in nodes):
        return
    own = [node for node in nodes if isinstance(node, ast.ClassDef)]
    classes = [node for node in own if node.name == class_name]
    if not classes and class_name not in set(_may_be_classes(nodes)):
        raise ConfigError(
            f"task {shown(name)}: {module_name} has no class {class_name!r}, as its text shows; it was not imported."
            f"{nearest(class_name, [n.name for n in own])} Its classes: {listed(n.name for n in own) or 'none'}."
        )
    if classes and not any(node.bases or _has_methods(node) for node in classes):
        raise ConfigError(
            f"task {shown(name)}: {class_name} of {file} is no task, as its text shows; it was not imported. "
            "Inherit from mixnas.evaluators.tasks.Task and give name, io and the splits."
        )


def _at_module_level(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that an import carries out, those under an `if`, a `try` or a `with` too."""
    for node in body:
        yield node
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for part in ("body", "orelse", "finalbody"):
                yield from _at_module_level(getattr(node, part, ()))
            for handler in getattr(node, "handlers", ()):
                yield from _at_module_level(handler.body)


def _may_be_classes(nodes: Iterable[ast.stmt]) -> Iterator[str]:
    """Names that are imported from elsewhere or made by a call; a module or a plain value is no class."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign) and isinstance(
            node.value, ast.Name | ast.Attribute | ast.Call | ast.Subscript
        ):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def _has_methods(node: ast.ClassDef) -> bool:
    """Whether a class that inherits from nothing is meant as a task."""
    return any(isinstance(one, ast.FunctionDef) and one.name in ("loss", "new_metric") for one in node.body)


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
