"""A mark behind what a unit answers, for a trace: an operation that does nothing, and that no pass takes away.

In which module a node of a graph stands torch says too, but there a unit that runs twice is one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mixnas.search_space.network import Network

NAME = "mixnas::unit_answer"


@torch.library.custom_op(NAME, mutates_args=())
def unit_answer(x: Tensor) -> Tensor:
    """A copy: an operation of one's own may not answer what it is given."""
    return x.clone()


@unit_answer.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device)  # what follows is traced alike


def marked_units(network: Network) -> list[str]:
    """The names of units that have a mark, in the order in which they run: all but the head, which answers for all."""
    return [name for name, _ in network.units()[:-1]]


@contextlib.contextmanager
def marking(network: Network) -> Iterator[None]:
    """Within it, each unit of a network but the head has a mark behind its answer, each time that it runs."""

    def marked(_module: Any, _given: Any, answer: Tensor) -> Any:
        return torch.ops.mixnas.unit_answer(answer)

    hooks = [module.register_forward_hook(marked) for module in dict(network.units()[:-1]).values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def taken(program: torch.export.ExportedProgram) -> list[str]:
    """Take the marks out of a program; returns the names of the nodes that they were behind, in the order of the
    graph."""
    graph, names = program.graph_module.graph, []
    for mark in graph.find_nodes(op="call_function", target=torch.ops.mixnas.unit_answer.default):
        answer = mark.args[0]
        names.append(answer.name)
        mark.replace_all_uses_with(answer)
        graph.erase_node(mark)
    graph.lint()
    program.graph_module.recompile()
    return names
