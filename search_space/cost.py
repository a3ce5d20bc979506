"""What a network costs, exactly and without running it: parameters, multiply-accumulates, bytes of its weights.

Every operator is counted by itself, once for each context and policy that it stands under, on shapes only. A unit is
the sum of its operators and a network the sum of its units, so a whole space costs no more to count than its operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mixnas.kernels import work
from mixnas.search_space.architecture import Architecture, Op
from mixnas.search_space.network import build_op, on_shapes, policy_of
from mixnas.search_space.operators.folding import declared, merge, takes_norm
from mixnas.search_space.operators.layers import Conv, Linear, projections
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

    An outer product is one elementwise multiplication, and is not counted; ATen sees no difference.

    Args:
        name: Without namespace and overload, for example "addmm".
        operands: Positional arguments.
        output: The result.
    """
    name = name.rstrip("_")  # what works in place counts alike
    tensors = [operand for operand in operands if isinstance(operand, Tensor)]
    if name in ("mm", "bmm", "_int_mm", "matmul", "linear", *PACKED_PRODUCTS):
        return output.numel() * int(tensors[0].shape[-1])
    if name in ("addmm", "baddbmm", "_addmm_activation"):
        return output.numel() * int(tensors[1].shape[-1])
    if name == "addbmm":
        return output.numel() * int(tensors[1].shape[0]) * int(tensors[1].shape[-1])
    if name == "addr":
        return output.numel()
    if name == "_trilinear":
        return _trilinear_macs(operands)
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


def _trilinear_macs(operands: Sequence[Any]) -> int:
    """Of a sum of products of three tensors (`nn.Bilinear`), each with dimensions of one put in first."""
    shapes = []
    for tensor, expand in zip(operands[:3], operands[3:6], strict=True):
        for dim in expand:
            tensor = tensor.unsqueeze(dim)
        shapes.append(tensor.shape)
    return math.prod(torch.broadcast_shapes(*shapes))


# What changes values only. torch takes some 300 microseconds for one on shapes alone, in Python; a space has thousands.
_FILLS = frozenset(
    ("uniform_", "normal_", "zero_", "fill_", "copy_", "add_", "mul_", "clamp_", "erfinv_", "exponential_")
)
_POINTWISE = frozenset(
    ("add", "sub", "mul", "div", "neg", "exp", "log", "sqrt", "rsqrt", "pow", "abs", "tanh", "sigmoid", "relu", "silu",
     "gelu", "elu", "softplus", "clamp", "round", "floor", "maximum", "minimum")
)  # fmt: skip


class Shapes(TorchDispatchMode):
    """Runs what is inside it on "meta" tensors, whose values nobody sees, and counts products."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def add(self, counted: work.Work) -> None:
        """Take a kernel's count of itself."""
        self.macs += counted.macs

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        namespace, _, name = func.name().partition("::")
        name = name.partition(".")[0]
        if name in _FILLS and isinstance(args[0], Tensor):
            return args[0]
        if name in _POINTWISE and _all_alike(args):
            return torch.empty_like(args[0])
        output = func(*args, **(kwargs or {}))
        if namespace == "aten" and not work.inside():
            self.macs += aten_macs(name, args, output)
        return output


def _all_alike(operands: tuple[Any, ...]) -> bool:
    """Whether all tensors among the operands have the first one's shape and type, which the result then has."""
    first = operands[0]
    if not isinstance(first, Tensor) or not first.is_floating_point():
        return False
    tensors = (operand for operand in operands[1:] if isinstance(operand, Tensor))
    return all(tensor.shape == first.shape and tensor.dtype == first.dtype for tensor in tensors)


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
    plain = _plain(axis, op, before, after, tokens)
    params, weight_bytes = plain.cost.params, plain.cost.weight_bytes
    for fold in plain.folds:
        if fold.layer is None or quant is None or _keeps_form(quant, fold.layer):
            weight_bytes -= fold.saved_bytes
    if quant is None:
        return Cost(params, plain.cost.macs, weight_bytes)
    for layer in plain.layers:
        own = _layer_cost(quant, layer)
        params, weight_bytes = params + own.params, weight_bytes + own.weight_bytes
    return Cost(params, plain.cost.macs, weight_bytes)


@dataclass(frozen=True)
class _Plain:
    """An operator without a policy.

    Attributes:
        cost: Its cost, batch norms included.
        layers: What a policy may take the place of.
        folds: Batch norms that a layer takes in when it is deployed.
    """

    cost: Cost
    layers: tuple[_Layer, ...]
    folds: tuple[_Fold, ...]


@dataclass(frozen=True)
class _Layer:
    """A projection, as far as its cost under a policy depends on it."""

    build: Callable[..., Linear | Conv]
    arguments: tuple[Any, ...]
    bias: bool

    @classmethod
    def of(cls, layer: Linear | Conv) -> _Layer:
        """What a layer is."""
        if isinstance(layer, Linear):
            return cls(Linear, (layer.in_features, layer.out_features), layer.bias is not None)
        sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        return cls(Conv, (*sizes, layer.groups), layer.bias is not None)

    def make(self) -> Linear | Conv:
        """One like it."""
        return self.build(*self.arguments, bias=self.bias)


@dataclass(frozen=True)
class _Fold:
    """A batch norm behind a layer.

    Attributes:
        layer: The layer, where a policy may take its place; else None.
        saved_bytes: What is stored less with the norm in the layer.
    """

    layer: _Layer | None
    saved_bytes: int

    @classmethod
    def of(cls, norm: nn.Module, layer: nn.Module) -> _Fold:
        """What a norm and the layer before it are."""
        bias = 0 if layer.bias is not None else norm.bias.numel() * norm.bias.element_size()
        return cls(_Layer.of(layer) if isinstance(layer, Linear | Conv) else None, stored_bytes(norm) - bias)


@lru_cache(maxsize=1 << 16)
def _keeps_form(quant: Op, layer: _Layer) -> bool:
    """Whether a projection is stored as it stands under a policy, so that it takes a norm in."""
    with torch.device("meta"), torch.no_grad(), Shapes():
        return takes_norm(policy_of(quant).prepare(layer.make()))


@lru_cache(maxsize=1 << 16)
def _plain(axis: str, op: Op, before: Context, after: Context, tokens: bool) -> _Plain:
    with on_shapes(axis, op), torch.device("meta"), torch.no_grad(), Shapes() as shapes:
        module = build_op(axis, op, before, after).eval()
        shape = (1, *before.size)
        example = torch.zeros(shape, dtype=torch.long) if tokens else torch.zeros(*shape, before.width)
        with work.watching(shapes.add):
            module(example, _itself) if axis == "gate" else module(example)
    params = sum(parameter.numel() for parameter in module.parameters())
    layers = tuple(_Layer.of(layer) for _, layer in projections(module))
    folds = tuple(_Fold.of(module.get_submodule(norm), module.get_submodule(layer)) for norm, layer in declared(module))
    with torch.device("meta"):
        return _Plain(Cost(params, shapes.macs, stored_bytes(merge(module))), layers, folds)


@lru_cache(maxsize=1 << 16)
def _layer_cost(quant: Op, layer: _Layer) -> Cost:
    """What a policy adds to the cost of a projection: it takes the place of each by itself."""
    policy = policy_of(quant)
    with torch.device("meta"), torch.no_grad(), Shapes():
        plain = layer.make()
        params, stored = sum(p.numel() for p in plain.parameters()), stored_bytes(plain)
        prepared = policy.prepare(plain)
        own, weight_bytes = sum(p.numel() for p in prepared.parameters()), policy.weight_bytes(prepared)
    return Cost(own - params, 0, weight_bytes - stored)


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
