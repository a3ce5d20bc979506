"""What a network costs, exactly and without running it: parameters, multiply-accumulates, bytes of its weights.

Every operator is counted by itself, once for each context and policy that it stands under, on shapes only. A unit is
the sum of its operators and a network the sum of its units, so a whole space costs no more to count than its operators.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mixnas.kernels import work
from mixnas.search_space.architecture import Architecture, Op
from mixnas.search_space.network import build_op, policy_of
from mixnas.search_space.operators.quantization.policy import stored_bytes
from mixnas.search_space.registry import BETWEEN, Context
from mixnas.search_space.units import IOSpec, Unit, plan

METRICS = ("params", "macs", "weight_bytes")
PACKED_PRODUCTS = ("_weight_int8pack_mm", "_weight_int4pack_mm", "_weight_int4pack_mm_for_cpu")
"""ATen's products with a weight that is stored in fewer bits than it is multiplied in."""


@dataclass(frozen=True)
class Cost:
    """Parameters, multiply-accumulates of one example, and bytes of the weights as deployed."""

    params: int
    macs: int
    weight_bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.params + other.params, self.macs + other.macs, self.weight_bytes + other.weight_bytes)


def aten_macs(name: str, operands: tuple[Any, ...], output: Any) -> int:
    """Multiply-accumulates of an ATen operation that is a matrix product or a convolution; 0 of any other.

    Args:
        name: Without namespace and overload, for example "addmm".
        operands: Positional arguments.
        output: The result.
    """
    tensors = [operand for operand in operands if isinstance(operand, Tensor)]
    if name in ("mm", "bmm", "_int_mm", "matmul", "linear", *PACKED_PRODUCTS):
        return output.numel() * int(tensors[0].shape[-1])
    if name in ("addmm", "baddbmm"):
        return output.numel() * int(tensors[1].shape[-1])
    if name in ("mv", "addmv"):
        return tensors[-2].numel()
    if name in ("dot", "vdot"):
        return tensors[0].numel()
    if name in ("convolution", "_convolution", "convolution_overrideable"):
        transposed = operands[6]
        return (tensors[0] if transposed else output).numel() * tensors[1][0].numel()
    if name.startswith("_scaled_dot_product") or name == "scaled_dot_product_attention":
        query, key, value = tensors[:3]
        return query[..., 0].numel() * int(key.shape[-2]) * (int(query.shape[-1]) + int(value.shape[-1]))
    return 0


class _Macs(TorchDispatchMode):
    """Adds up what runs inside it, kernels by what they say of themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def add(self, counted: work.Work) -> None:
        """Take a kernel's count."""
        self.total += counted.macs

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        namespace, _, name = func.name().partition("::")
        if namespace == "aten" and not work.inside():
            self.total += aten_macs(name.partition(".")[0], args, output)
        return output


@lru_cache(maxsize=1 << 18)
def op_cost(axis: str, op: Op, quant: Op | None, before: Context, after: Context, tokens: bool = False) -> Cost:
    """Cost of one operator where it stands.

    Args:
        axis: Its axis.
        op: The operator.
        quant: The policy of its branch, None outside branches and for norms.
        before: Context of its input.
        after: Context of its output.
        tokens: Whether it reads integers.
    """
    with torch.device("meta"):
        module = build_op(axis, op, before, after, quant)
    params = sum(parameter.numel() for parameter in module.parameters())
    stored = stored_bytes(module) if quant is None else policy_of(quant).weight_bytes(module)
    return Cost(params, _op_macs(axis, op, before, after, tokens), stored)


@lru_cache(maxsize=1 << 16)
def _op_macs(axis: str, op: Op, before: Context, after: Context, tokens: bool) -> int:
    """A policy changes how products are computed, not how many there are."""
    with torch.device("meta"), torch.no_grad():
        module = build_op(axis, op, before, after).eval()
        shape = (1, *before.size)
        example = torch.zeros(shape, dtype=torch.long) if tokens else torch.zeros(*shape, before.width)
        counter = _Macs()
        with work.watching(counter.add), counter:
            module(example, _itself) if axis == "gate" else module(example)
    return counter.total


def _itself(x: Tensor) -> Tensor:
    return x


def unit_cost(unit: Unit) -> Cost:
    """Cost of one unit."""
    total = Cost(0, 0, 0)
    for axis, op in unit.ops:
        quant = None if axis == "norm" else unit.quant
        after = unit.after if axis in BETWEEN else unit.before
        total = total + op_cost(axis, op, quant, unit.before, after, unit.tokens)
    return total


def cost_of(units: Iterable[tuple[str, Unit]]) -> Cost:
    """Cost of units by name; one that stands several times has its weights once and computes each time."""
    params = macs = weight_bytes = 0
    counted = set()
    for name, unit in units:
        own = unit_cost(unit)
        macs += own.macs
        if name not in counted:
            counted.add(name)
            params, weight_bytes = params + own.params, weight_bytes + own.weight_bytes
    return Cost(params, macs, weight_bytes)


def cost(architecture: Architecture, io: IOSpec) -> Cost:
    """Cost of a whole network. A block with recursion has its weights once and computes as often as it runs."""
    return cost_of(plan(architecture, io))
