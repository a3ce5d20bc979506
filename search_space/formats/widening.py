"""A traced program whose bfloat16 is written out for a runtime that has no kernels for it.

What computes in bfloat16 on a CPU takes its operands to float32, computes, and rounds what comes out (oneDNN and ATen
both add products up in float32). Written so, each operation by itself, a program needs no kernel for bfloat16 but the
conversion: the weights stay stored in two bytes, and every value is rounded where torch rounds it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

_MOVE = ("cat", "clone", "constant_pad_nd", "contiguous", "flip", "index_select", "pad", "relu", "roll", "stack")
_EXACT = frozenset(f"aten::{name}" for name in _MOVE)
"""Operations that answer with numbers that they were given, so that there is nothing to round."""

_TO = ("aten::to", "aten::_to_copy")
_CONVERSIONS = (*_TO, "aten::type_as")


def without_bfloat16(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Have a program compute in float32 what it computes in bfloat16, rounding to it after each operation.

    Args:
        program: Changed in place; its inputs and outputs keep their types.

    Returns:
        The program.
    """
    graph = program.graph_module.graph
    narrow = {node for node in graph.nodes if _is_narrow(node)}
    if not narrow:
        return program
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        if node.kwargs.get("dtype") == torch.bfloat16:  # the trace's own check of what is about to change
            graph.erase_node(node)
    widened: set[fx.Node] = set()
    for node in [node for node in graph.nodes if node in narrow]:
        users = [user for user in node.users if user.op != "output"]
        if _name(node) in _CONVERSIONS and node.args[0] in widened:  # it was bfloat16 before
            last = node.args[0]
        else:
            last = _converted(graph, node, torch.bfloat16) if _may_be_wider(node) else node
            last = _converted(graph, last, torch.float32)
        widened.add(last)
        for user in users:
            user.replace_input_with(node, last)
    graph.eliminate_dead_code()
    graph.lint()
    program.graph_module.recompile()
    return program


def _is_narrow(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return node.op in ("placeholder", "call_function") and isinstance(value, Tensor) and value.dtype == torch.bfloat16


def _name(node: fx.Node) -> str:
    """Of an operation, as its library calls it."""
    target: Any = node.target
    return str(target._schema.name) if isinstance(target, torch._ops.OpOverload) else ""


def _converted(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """A conversion behind a node, which stands in the same module."""
    with graph.inserting_after(node):
        made = graph.call_function(torch.ops.aten.to.dtype, (node, dtype))
    made.meta = {**node.meta, "val": node.meta["val"].to(dtype)}
    return made


def _may_be_wider(node: fx.Node) -> bool:
    """Whether a node answers, given float32, with numbers that bfloat16 does not have."""
    if node.op == "placeholder" or _name(node) in (*_EXACT, *_TO):
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return True  # an entry of a tuple
    returned = node.target._schema.returns
    return not returned or any(r.alias_info is None or r.alias_info.is_write for r in returned)
