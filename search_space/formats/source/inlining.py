"""Code that stands alone: the classes and functions that something uses, out of their files into one text.

What is taken is the source as it was written, with its comments. Three things are left out: what registers and counts,
methods that nobody calls, and the ways that inference in ATen does not go (`folding`).
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterable
from functools import cached_property

from mixnas.search_space.formats.source.folding import Folding
from mixnas.search_space.formats.source.reading import OURS, Names, Part, Symbol, file_of, resolve, stands_outside

ENTRIES = ("forward", "prepare", "deploy", "merge")
"""Methods that are called from outside."""


class _Piece:
    """A definition at the top of a file."""

    def __init__(self, symbol: Symbol) -> None:
        self.symbol, self.file = symbol, file_of(symbol.module)
        self.node = self.file.names[symbol.name]
        self.part = Part(self.file)
        self.kept: set[str] = set()  # methods
        self._drop_decorators(self.node)
        if isinstance(self.node, ast.FunctionDef):
            Folding(self.part, self.node)
        if isinstance(self.node, ast.ClassDef):
            for member in self.node.body:
                self._drop_decorators(member)
        else:
            Names(self.part).visit(self.node)

    def _drop_decorators(self, node: ast.AST) -> None:
        """Those that are this package's: they register and count."""
        for decorator in getattr(node, "decorator_list", []):
            names = [n for n in ast.walk(decorator) if isinstance(n, ast.Name)]
            found = resolve(self.file, names[0].id) if names else None
            module = found.module if isinstance(found, Symbol) else found[0] if found else ""
            if module.partition(".")[0] == OURS:
                start = self.file.line_start(self.file.start(decorator))
                self.part.deleted.append((start, self.file.line_end(self.file.end(decorator))))

    @cached_property
    def members(self) -> dict[str, ast.stmt]:
        """Methods and attributes of a class, by name; what is only annotated is no member."""
        if not isinstance(self.node, ast.ClassDef):
            return {}
        found: dict[str, ast.stmt] = {}
        for node in self.node.body:
            if isinstance(node, ast.FunctionDef):
                found[node.name] = node
            elif isinstance(node, ast.Assign):
                found.update((t.id, node) for t in node.targets if isinstance(t, ast.Name))
        return found

    @cached_property
    def _needed(self) -> frozenset[str]:
        """Members that are there for a base class that is imported."""
        cls = getattr(importlib.import_module(self.symbol.module), self.symbol.name)
        bases = [base for base in cls.__mro__[1:] if stands_outside(base.__module__) and base is not object]
        return frozenset(name for name in self.members if any(name in vars(base) for base in bases))

    def keep(self, mentioned: set[str]) -> bool:
        """Keep the members whose names are mentioned; whether there are new ones."""
        before = len(self.kept)
        for name, node in self.members.items():
            if name in self.kept or not (name in mentioned or name in self._needed or name.startswith("__")):
                continue
            self.kept.add(name)
            if isinstance(node, ast.FunctionDef):
                Folding(self.part, node)
            Names(self.part).visit(node)
        if isinstance(self.node, ast.ClassDef) and not before:
            names = Names(self.part)
            rest = [n for n in self.node.body if n not in self.members.values()]
            for outside in (*self.node.decorator_list, *self.node.bases, *self.node.keywords, *rest):
                names.visit(outside)
        return len(self.kept) > before

    def text(self, names: dict[Symbol, str]) -> str:
        """As it will stand, under these names."""
        file, part = self.file, self.part
        deleted = list(part.deleted)
        for name, node in self.members.items():
            if name not in self.kept:
                top = min([node, *getattr(node, "decorator_list", [])], key=file.start)
                deleted.append((file.with_comments(file.start(top)), file.line_end(file.end(node))))
        replaced = dict(part.replaced)
        for place, symbol in part.uses.items():
            replaced[place] = names[symbol].encode()
        top = min([self.node, *getattr(self.node, "decorator_list", [])], key=file.start)
        start, end = file.with_comments(file.start(top)), file.line_end(file.end(self.node))
        own = names[self.symbol]
        if own != self.symbol.name:
            replaced[self._name_place()] = own.encode()
        text = _edited(file.content, start, end, deleted, replaced).decode()
        text = re.sub(r"\n\s*\n(\s*\n)+", "\n\n", text).strip("\n")
        return text + "\n"

    def _name_place(self) -> tuple[int, int]:
        found = re.compile(rb"\b" + self.symbol.name.encode() + rb"\b").search(
            self.file.content, self.file.start(self.node)
        )
        assert found is not None
        return found.span()


def _edited(
    content: bytes, start: int, end: int, deleted: Iterable[tuple[int, int]], replaced: dict[tuple[int, int], bytes]
) -> bytes:
    """Part of a text. What is replaced inside something that is deleted goes with it, unless it is the whole of it."""
    gone = sorted({(a, b) for a, b in deleted if a < b})
    changes = [
        (place, text) for place, text in replaced.items()
        if place in gone or not any(a <= place[0] and place[1] <= b for a, b in gone)
    ]  # fmt: skip
    written = {place for place, _ in changes}
    changes += [(place, b"") for place in gone if place not in written]
    out, at = b"", start
    for (a, b), text in sorted(changes, key=lambda change: (change[0][0], -change[0][1])):
        if b <= at or a >= end:
            continue
        out += content[at : max(a, at)] + text
        at = b
    return out + content[at:end]


class Standalone:
    """Collects definitions, and writes them as one text.

    Args:
        reserved: Names that the text's own part defines.
    """

    def __init__(self, reserved: Iterable[str] = ()) -> None:
        self._reserved = frozenset(reserved)
        self._pieces: dict[Symbol, _Piece] = {}
        self._mentioned = set(ENTRIES)

    def take(self, symbols: Iterable[Symbol]) -> None:
        """Take definitions, and all that they use.

        Raises:
            NasError: Something's code cannot be taken; the message says what.
        """
        pending = list(symbols)
        while True:
            while pending:
                symbol = pending.pop()
                if symbol not in self._pieces:
                    self._pieces[symbol] = piece = _Piece(symbol)
                    self._mentioned |= piece.part.attributes
                    pending += piece.part.uses.values()
            for piece in list(self._pieces.values()):
                piece.keep(self._mentioned)
                self._mentioned |= piece.part.attributes
                pending += [used for used in piece.part.uses.values() if used not in self._pieces]
            if not pending and not any(piece.keep(self._mentioned) for piece in list(self._pieces.values())):
                return

    @cached_property
    def names(self) -> dict[Symbol, str]:
        """What each definition is called: as in its file, but where two have one name."""
        taken = [symbol.name for symbol in self._pieces]
        others = {alias for piece in self._pieces.values() for alias in piece.part.imports} | self._reserved
        found = {}
        for symbol in self._pieces:
            clear = taken.count(symbol.name) == 1 and symbol.name not in others
            place = symbol.module.rpartition(".")[2]
            found[symbol] = symbol.name if clear else f"_{place}_{symbol.name.lstrip('_')}"
        return found

    def imports(self, further: Iterable[tuple[str, tuple[str, str | None]]] = ()) -> str:
        """The import statements, the standard library's first."""
        wanted = {*further, *(item for piece in self._pieces.values() for item in piece.part.imports.items())}
        plain: dict[str, str] = {}
        froms: dict[str, list[str]] = {}
        for alias, (module, name) in sorted(wanted, key=str):
            if name is None:
                plain[f"import {module}" + ("" if alias == module else f" as {alias}")] = module
            elif module == "__future__":
                continue
            else:
                froms.setdefault(module, []).append(name if alias == name else f"{name} as {alias}")
        lines = [(module, line) for line, module in plain.items()]
        lines += [(module, f"from {module} import {', '.join(names)}") for module, names in froms.items()]
        groups: list[list[str]] = [[], []]
        for module, line in sorted(lines, key=lambda pair: (pair[1].startswith("from"), pair[1])):
            groups[module.partition(".")[0] not in sys.stdlib_module_names].append(line)
        return "\n\n".join("\n".join(group) for group in groups if group)

    def text(self) -> str:
        """The definitions, each behind those that it uses."""
        ordered: dict[Symbol, None] = {}
        open_: set[Symbol] = set()

        def add(symbol: Symbol) -> None:
            if symbol in ordered or symbol in open_:
                return
            open_.add(symbol)
            for used in self._pieces[symbol].part.uses.values():
                add(used)
            ordered[symbol] = None

        for symbol in self._pieces:
            add(symbol)
        return "\n\n".join(self._pieces[symbol].text(self.names) for symbol in ordered)
