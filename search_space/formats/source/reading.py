"""Source as it was written: what stands at the top of a module, and what a part of it refers to."""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mixnas.search_space.errors import NasError

OURS = __name__.partition(".")[0]


@dataclass(frozen=True, slots=True)
class Symbol:
    """A name at the top of a module."""

    module: str
    name: str

    @classmethod
    def of(cls, thing: Any) -> Symbol:
        """Where a class or function is defined.

        Raises:
            NasError: Not at the top of a module.
        """
        if "." in thing.__qualname__:
            raise NasError(
                f"{thing.__qualname__} is defined inside something else, where its code cannot be taken from."
            )
        return cls(thing.__module__, thing.__qualname__)


def stands_outside(module: str) -> bool:
    """Whether a module is imported by the code that stands alone, and not taken into it: where it is installed."""
    return _is_installed(module.partition(".")[0])


@cache
def _is_installed(top: str) -> bool:
    if top in sys.stdlib_module_names:
        return True
    spec = importlib.util.find_spec(top) if top != OURS else None
    parts = Path(spec.origin).parts if spec is not None and spec.origin else ()
    return "site-packages" in parts or "dist-packages" in parts


class File:
    """A module's source. Places are in bytes, as `ast` counts columns."""

    def __init__(self, name: str) -> None:
        self.name = name
        module = importlib.import_module(name)
        try:
            text = inspect.getsource(module)
        except (OSError, TypeError) as error:
            raise NasError(f"{name} has no source text that its code could be taken from.") from error
        self.content = text.encode()
        self._starts = [0]
        for line in self.content.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self.names: dict[str, ast.stmt] = {}
        self.imports: dict[str, tuple[str, str | None]] = {}
        self._read(ast.parse(text).body)

    def _read(self, body: Iterable[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.imports.update(self.imported(node))
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                self.names[node.name] = node  # of overloads the last
            elif isinstance(node, ast.Assign):
                stored = (n for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name))
                self.names.update((n.id, node) for n in stored)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                self.names[node.target.id] = node
            elif isinstance(node, ast.If | ast.Try):
                self._read([*node.body, *node.orelse])

    def imported(self, node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, tuple[str, str | None]]]:
        """Local name to module, and the name in it (None: the module itself)."""
        for alias in node.names:
            if isinstance(node, ast.Import):
                bound = alias.asname or alias.name.partition(".")[0]
                yield bound, (alias.name if alias.asname else bound, None)
                continue
            module = node.module or ""
            if node.level:
                package = importlib.import_module(self.name).__package__ or ""
                module = importlib.util.resolve_name("." * node.level + module, package)
            yield alias.asname or alias.name, (module, alias.name)

    def start(self, node: Any) -> int:
        return self._starts[node.lineno - 1] + int(node.col_offset)

    def end(self, node: Any) -> int:
        return self._starts[node.end_lineno - 1] + int(node.end_col_offset)

    def line_start(self, place: int) -> int:
        return self.content.rfind(b"\n", 0, place) + 1

    def line_end(self, place: int) -> int:
        """Behind the line's end."""
        return self.content.find(b"\n", place) + 1 or len(self.content)

    def with_comments(self, place: int) -> int:
        """The start of the line, or of the comments right above it."""
        place = self.line_start(place)
        while place:
            above = self.line_start(place - 1)
            if not self.content[above:place].lstrip().startswith(b"#"):
                return place
            place = above
        return place


@cache
def file_of(name: str) -> File:
    return File(name)


INSTEAD = {
    Symbol(f"{OURS}.search_space.operators.quantization.products", "choose"): Symbol(
        f"{OURS}.search_space.formats.source.portable", "choose"
    ),
    Symbol(f"{OURS}.kernels.dispatch", "exporting"): Symbol(
        f"{OURS}.search_space.formats.source.portable", "exporting"
    ),
}
"""Functions that look at this machine, and what stands in their place."""


def resolve(file: File, name: str) -> Symbol | tuple[str, str | None] | None:
    """What a global name of a file is: something to take, something to import, or None of a builtin."""
    if name in file.names:
        found = Symbol(file.name, name)
        return INSTEAD.get(found, found)
    if name not in file.imports:
        if hasattr(builtins, name):
            return None
        raise NasError(f"{file.name} uses {name}, which is not defined at its top: its code cannot be taken.")
    module, inner = file.imports[name]
    if stands_outside(module):
        return module, inner
    if inner is None:
        return module, None
    try:
        is_module = importlib.util.find_spec(f"{module}.{inner}") is not None
    except ModuleNotFoundError:  # `module` is no package
        is_module = False
    return (f"{module}.{inner}", None) if is_module else followed(module, inner)


def followed(module: str, name: str) -> Symbol | tuple[str, str | None]:
    """A name of a module, or of where that module has it from."""
    found = resolve(file_of(module), name)
    assert found is not None
    return found


@dataclass
class Part:
    """Some statements of a file with what is left out, and what they refer to.

    Attributes:
        deleted: Ranges that go.
        replaced: Ranges with other text.
        uses: Ranges that are a name, with what it is.
        attributes: Names that are asked of objects.
        imports: Names to be imported: local name to (module, name in it).
    """

    file: File
    deleted: list[tuple[int, int]] = field(default_factory=list)
    replaced: dict[tuple[int, int], bytes] = field(default_factory=dict)
    uses: dict[tuple[int, int], Symbol] = field(default_factory=dict)
    attributes: set[str] = field(default_factory=set)
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)

    def gone(self, node: ast.AST) -> bool:
        start, end = self.file.start(node), self.file.end(node)
        return any(a <= start and end <= b for a, b in self.deleted)

    def delete_lines(self, node: ast.AST) -> None:
        """A statement, with the comments above it."""
        self.deleted.append((self.file.with_comments(self.file.start(node)), self.file.line_end(self.file.end(node))))


_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def _bound(function: _Function) -> set[str]:
    """Names that are local to a function."""
    arguments = function.args
    given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    found = {one.arg for one in given if one is not None}
    pending: list[ast.AST] = [function.body] if isinstance(function, ast.Lambda) else list(function.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            continue
        if isinstance(node, ast.Lambda):
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found.update(alias.asname or alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            found.add(node.name)
        pending.extend(ast.iter_child_nodes(node))
    return found


class Names(ast.NodeVisitor):
    """Finds the global names of a statement, and what is asked of objects."""

    def __init__(self, part: Part) -> None:
        self._part, self._local = part, [set[str]()]

    def visit(self, node: ast.AST) -> None:
        if hasattr(node, "lineno") and self._part.gone(node):
            return
        super().visit(node)

    def _function(self, node: _Function) -> None:
        outside: list[ast.AST | None] = [*node.args.defaults, *node.args.kw_defaults]
        if not isinstance(node, ast.Lambda):
            annotated = [
                *node.args.posonlyargs,
                *node.args.args,
                *node.args.kwonlyargs,
                node.args.vararg,
                node.args.kwarg,
            ]
            outside += [*node.decorator_list, node.returns, *(a.annotation for a in annotated if a is not None)]
        for inner in outside:
            if inner is not None:
                self.visit(inner)
        self._local.append(_bound(node))
        for statement in [node.body] if isinstance(node, ast.Lambda) else node.body:
            self.visit(statement)
        self._local.pop()

    visit_FunctionDef = visit_Lambda = _function  # noqa: N815

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for inner in (*node.decorator_list, *node.bases, *node.keywords, *node.body):
            self.visit(inner)

    def _comprehension(self, node: Any) -> None:
        targets = {n.id for g in node.generators for n in ast.walk(g.target) if isinstance(n, ast.Name)}
        self._local.append(targets)
        self.generic_visit(node)
        self._local.pop()

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension  # noqa: N815

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for _, (module, _name) in self._part.file.imported(node):
            if not stands_outside(module):
                raise NasError(f"{self._part.file.name} imports {module} inside a function: its code cannot be taken.")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._part.attributes.add(node.attr)
        file = self._part.file
        if isinstance(node.value, ast.Name) and not self._is_local(node.value.id):
            found = resolve(file, node.value.id)
            if isinstance(found, tuple) and found[1] is None and not stands_outside(found[0]):
                target = followed(found[0], node.attr)
                if isinstance(target, Symbol):
                    self._part.uses[file.start(node), file.end(node)] = target
                    return
                raise NasError(f"{file.name} uses {node.value.id}.{node.attr}: its code cannot be taken.")
        self.visit(node.value)

    def _is_local(self, name: str) -> bool:
        return any(name in names for names in self._local)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store) or self._is_local(node.id):
            return
        file = self._part.file
        found = resolve(file, node.id)
        if isinstance(found, Symbol):
            self._part.uses[file.start(node), file.end(node)] = found
        elif found is not None:
            self._part.imports[node.id] = found
