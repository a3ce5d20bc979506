"""Conditions that are decided where the code will stand, and what was behind the others left out."""

from __future__ import annotations

import ast
from typing import Any

from mixnas.search_space.formats.source.reading import OURS, Part, Symbol, resolve

FACTS: dict[str, Any] = {
    f"{OURS}.kernels.dispatch.choose": "aten",
    f"{OURS}.kernels.dispatch.use_triton": False,
    f"{OURS}.kernels.dispatch.tracing": False,
    "torch.is_grad_enabled": False,
}
"""What these functions return where the code will stand."""

UNKNOWN = object()


class Folding:
    """Decides the conditions of a function that follow from `FACTS`."""

    def __init__(self, part: Part, function: ast.FunctionDef) -> None:
        self._part, self._file = part, part.file
        self._known: dict[str, Any] = {}
        self._told: dict[str, tuple[ast.Assign, int]] = {}  # where a known name is assigned, and at which place of it
        stores = [n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        self._once = {name for name in stores if stores.count(name) == 1}
        self._block(function.body)
        loaded = {
            n.id
            for n in ast.walk(function)
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and not part.gone(n)
        }
        for name, (statement, place) in self._told.items():
            if name not in loaded:
                self._forget(statement, place)

    def _forget(self, statement: ast.Assign, place: int) -> None:
        """Delete the assignment of a name."""
        (target,) = statement.targets
        if isinstance(target, ast.Name):
            self._part.delete_lines(statement)
            return
        assert isinstance(target, ast.Tuple) and isinstance(statement.value, ast.Tuple)
        for elements in (target.elts, statement.value.elts):
            start, end = self._file.start(elements[place]), self._file.end(elements[place])
            if place + 1 < len(elements):
                end = self._file.start(elements[place + 1])
            else:
                start = self._file.end(elements[place - 1])
            self._part.deleted.append((start, end))

    # -- what is known ------------------------------------------------------------------------------------------------

    def _value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self._known.get(node.id, UNKNOWN)
        if isinstance(node, ast.Call):
            return FACTS.get(self._callee(node.func), UNKNOWN)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = self._value(node.operand)
            return inner if inner is UNKNOWN else not inner
        if isinstance(node, ast.BoolOp):
            values = [self._value(one) for one in node.values]
            deciding = isinstance(node.op, ast.Or)
            if any(v is not UNKNOWN and bool(v) is deciding for v in values):
                return deciding
            return UNKNOWN if UNKNOWN in values else not deciding
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            left, right = self._value(node.left), self._value(node.comparators[0])
            if UNKNOWN not in (left, right) and isinstance(node.ops[0], ast.Eq | ast.NotEq):
                return (left == right) is isinstance(node.ops[0], ast.Eq)
        return UNKNOWN

    def _callee(self, node: ast.expr) -> str:
        if isinstance(node, ast.Name) and (node.id in self._file.names or node.id in self._file.imports):
            found = resolve(self._file, node.id)
            if isinstance(found, Symbol):
                return f"{found.module}.{found.name}"
            return ".".join(filter(None, found)) if found else ""
        if isinstance(node, ast.Attribute):
            return f"{self._callee(node.value)}.{node.attr}"
        return ""

    # -- statements ---------------------------------------------------------------------------------------------------

    def _block(self, statements: list[ast.stmt]) -> bool:
        """Fold a block; whether it always ends in a return."""
        for i, statement in enumerate(statements):
            if self._statement(statement):
                for rest in statements[i + 1 :]:
                    self._part.delete_lines(rest)
                return True
        return False

    def _statement(self, node: ast.stmt) -> bool:
        if isinstance(node, ast.If):
            return self._if(node)
        if isinstance(node, ast.FunctionDef):
            return False
        for name in ("body", "orelse", "finalbody"):
            self._block(getattr(node, name, []))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self._expression(child)
            elif isinstance(child, ast.withitem):
                self._expression(child.context_expr)
        if isinstance(node, ast.Assign):
            self._learn(node)
        return isinstance(node, ast.Return)

    def _learn(self, node: ast.Assign) -> None:
        target, value = node.targets[0], node.value
        pairs: list[tuple[ast.expr, ast.expr]] = [(target, value)]
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            pairs = list(zip(target.elts, value.elts, strict=True))
        for place, (name, given) in enumerate(pairs):
            known = self._value(given)
            if known is UNKNOWN or isinstance(given, ast.Constant):  # what is known has to come of a fact
                continue
            if len(node.targets) == 1 and isinstance(name, ast.Name) and name.id in self._once:
                self._known[name.id] = known
                self._told[name.id] = (node, place)

    def _if(self, node: ast.If) -> bool:
        known, file, part = self._value(node.test), self._file, self._part
        start, end = file.start(node), file.end(node)
        is_elif = file.content[start : start + 4] == b"elif"
        if known is UNKNOWN:
            self._expression(node.test)
            ends = self._block(node.body)
            return self._block(node.orelse) and ends and bool(node.orelse)
        taken = node.body if known else node.orelse
        if not taken:
            part.delete_lines(node)
            return False
        first = file.start(taken[0])
        if file.content[first : first + 4] == b"elif":  # it takes this one's place
            part.deleted.append((start, first if is_elif else first + 2))
            return self._if(taken[0]) if isinstance(taken[0], ast.If) else False
        if is_elif:
            part.replaced[start, file.line_start(first)] = b"else:\n"
            part.deleted.append((start, file.line_start(first)))
        else:
            indent = first - file.line_start(first) - (start - file.line_start(start))
            part.deleted += [(file.with_comments(start), file.line_start(start)), (start, first)]
            place = file.line_end(first)
            while place < file.end(taken[-1]):
                if file.content[place : place + indent].isspace():
                    part.deleted.append((place, place + indent))
                place = file.line_end(place)
        if (last := file.end(taken[-1])) < end:
            part.deleted.append((last, end))
        return self._block(taken)

    # -- expressions --------------------------------------------------------------------------------------------------

    def _expression(self, node: ast.expr) -> None:
        file, part = self._file, self._part
        if isinstance(node, ast.IfExp) and (known := self._value(node.test)) is not UNKNOWN:
            taken = node.body if known else node.orelse
            part.deleted += [(file.start(node), file.start(taken)), (file.end(taken), file.end(node))]
            self._expression(taken)
            return
        if isinstance(node, ast.Call) and (known := self._value(node)) is not UNKNOWN:
            part.deleted.append((file.start(node), file.end(node)))
            part.replaced[file.start(node), file.end(node)] = repr(known).replace("'", '"').encode()
            return
        if isinstance(node, ast.BoolOp) and self._value(node) is UNKNOWN:
            kept = [one for one in node.values if self._value(one) is UNKNOWN]
            gaps = file.content[file.start(node) : file.end(node)]
            if len(kept) == 1 and b"(" not in gaps.replace(file.content[file.start(kept[0]) : file.end(kept[0])], b""):
                part.deleted += [(file.start(node), file.start(kept[0])), (file.end(kept[0]), file.end(node))]
            elif len(kept) == 1:
                self._alone(node, kept[0])
                return
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self._expression(child)
            elif isinstance(child, ast.comprehension):
                self._expression(child.iter)
            elif isinstance(child, ast.keyword):
                self._expression(child.value)

    def _alone(self, node: ast.BoolOp, kept: ast.expr) -> None:
        """Of several operands one is left; the rest have no brackets of their own round the one that is."""
        file, part = self._file, self._part
        start, end = file.start(kept), file.end(kept)
        before, after = file.content[file.start(node) : start], file.content[end : file.end(node)]
        if before.count(b"(") == before.count(b")") and after.count(b"(") == after.count(b")"):
            part.deleted += [(file.start(node), start), (end, file.end(node))]
            self._expression(kept)
