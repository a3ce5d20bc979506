"""What the contracts go through: every registered operator and policy. Constructed, so that none is left to chance."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mixnas.search_space import registry
from mixnas.search_space.architecture import Architecture, Op
from mixnas.search_space.cost import Shapes
from mixnas.search_space.network import IOSpec, build_op, seeded
from mixnas.search_space.operators.layers import projections
from mixnas.search_space.operators.quantization.policy import policy_of
from mixnas.search_space.registry import BETWEEN, KINDS, Context, Knob, Value
from mixnas.search_space.units import registry_size_after

# Small, and height is not width.
IOS = {
    "image": IOSpec("image", (4, 8), 3, 5),
    "sequence": IOSpec("sequence", (7,), 3, 4),
    "causal": IOSpec("causal", (7,), 11, 11, head="token", tokens=True),
}
WIDTH = 16


@dataclass(frozen=True)
class Case:
    """An operator where it stands."""

    axis: str
    op: Op
    before: Context
    after: Context
    tokens: bool = False

    def __str__(self) -> str:
        return f"{self.axis}={self.op}-{self.before.kind}"

    def build(self, quant: Op | None = None, seed: int = 0) -> nn.Module:
        """The operator with weights from a seed; norms and biases away from one and zero, which would hide much."""
        with seeded(torch.Generator().manual_seed(seed)):
            module = build_op(self.axis, self.op, self.before, self.after, quant)
            with torch.no_grad():
                for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                    if tensor.is_floating_point() and ("norm" in name or name.endswith("bias")):
                        tensor.add_(0.2 * torch.rand(tensor.shape))
        return module

    def example(self, batch: int = 2, seed: int = 1) -> Tensor:
        """An input batch."""
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, *self.before.size)
        if self.tokens:
            return torch.randint(self.before.width, shape, generator=generator)
        return torch.randn(*shape, self.before.width, generator=generator)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an example's output."""
        return (*self.after.size, self.after.width)


class Group(tuple[Case, ...]):
    """The cases of one operator, or of some: a test of each by itself would be thousands, which cost more than what
    they do."""

    def __str__(self) -> str:
        names = list(dict.fromkeys(case.op.name for case in self))
        return f"{self[0].axis}={names[0]}" + (f" to {names[-1]}" if len(names) > 1 else "")


def grouped(found: Iterable[Case], together: int = 1) -> list[Group]:
    """By operator, or by so many of an axis."""
    operators: dict[str, dict[str, list[Case]]] = {}
    for case in found:
        operators.setdefault(case.axis, {}).setdefault(case.op.name, []).append(case)
    groups = []
    for of_axis in operators.values():
        each = list(of_axis.values())
        some = (each[first : first + together] for first in range(0, len(each), together))
        groups += [Group(itertools.chain.from_iterable(cases)) for cases in some]
    return groups


def for_each_case(test: Callable[..., None]) -> Callable[..., None]:
    """A test of one `case` (or `plain`) as one of a group; what fails is told with its case."""

    @functools.wraps(test)  # with its signature, so that it asks for the same fixtures
    def every(self: Any, **given: Any) -> None:
        name = "case" if "case" in given else "plain"
        for case in given[name]:
            try:
                test(self, **given | {name: case})
            except Exception as error:
                error.add_note(f"in {case}")
                raise

    return every


class Whole(nn.Module):
    """An operator as a module of one input: a gate gets something to act on."""

    def __init__(self, case: Case, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._is_gate = case.axis == "gate"

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to the operator's answer."""
        y: Tensor = self.module(x, _mix) if self._is_gate else self.module(x)
        return y


def _mix(x: Tensor) -> Tensor:
    return 0.5 * x + 1


def cases(axis: str, *, knobs: bool, width: int = WIDTH, size: tuple[int, ...] | None = None) -> list[Case]:
    """Every operator of an axis in every kind of task that it serves.

    Args:
        axis: Which.
        knobs: Whether also with each knob, one after the other, at other values than its default.
        width: Channels of what it reads, and of what a stem answers.
        size: Grid, where it is not that of the kind's `IOS`; kinds of other dimensions are left out.
    """
    found = []
    for kind, name in itertools.product(KINDS, registry.names(axis)):
        grid = size or IOS[kind].size
        serves = kind in registry.get(axis, name).kinds and len(grid) == len(IOS[kind].size)
        if serves and (axis, name) != ("channel_mixer", "none"):  # that one is not built
            found += [_stand(axis, op, kind, width, grid) for op in ops(axis, name, Context(width, grid, kind), knobs)]
    return found


def _stand(axis: str, op: Op, kind: str, width: int, grid: tuple[int, ...]) -> Case:
    tokens = axis == "stem" and _takes_tokens(op.name)
    io = IOS[kind]
    before = Context(11 if tokens else io.in_features if axis == "stem" else width, grid, kind)
    if axis not in BETWEEN:
        return Case(axis, op, before, before)
    after = {"stem": width, "downsample": width + 8, "head": io.num_outputs}[axis]
    return Case(axis, op, before, Context(after, registry_size_after(axis, op, before), kind), tokens)


def ops(axis: str, name: str, context: Context, knobs: bool) -> list[Op]:
    """An operator with its knobs at their defaults, or near them where those don't fit; and see `cases`."""
    operator = registry.get(axis, name)

    def fits(values: dict[str, Value]) -> bool:
        return operator.check is None or operator.check(context, values) is None

    tried = itertools.product(*([knob.default, *_others(knob)] for knob in operator.knobs.values()))
    default = next(filter(fits, (dict(zip(operator.knobs, values, strict=True)) for values in tried)), None)
    assert default is not None, f"{axis} {name} fits nowhere in {context}"
    chosen = [default]
    if knobs:
        varied = (default | {name: v} for name, knob in operator.knobs.items() for v in _others(knob))
        chosen += [values for values in varied if fits(values)]
    return list(dict.fromkeys(Op(name, tuple(sorted(values.items()))) for values in chosen))


def _others(knob: Knob) -> list[Value]:
    """Up to two values at the ends of what is allowed."""
    tried = (knob.low, 2) if knob.choices is None else (knob.choices[0], knob.choices[-1])
    normal = (knob.normalise(value) for value in tried if value is not None)
    return [value for value in dict.fromkeys(normal) if value is not None and value != knob.default]


@cache
def refused(axis: str, op: Op, context: Context, quant: Op) -> str:
    """Why a policy does not take an operator's projections, or nothing: some take certain numbers of inputs only."""
    policy = policy_of(quant)
    check = getattr(policy, "check", None)
    if check is None:
        return ""
    for inputs, outputs in _shapes(axis, op, context):
        if policy.covers(inputs) and check(outputs, inputs):
            return str(check(outputs, inputs))
    return ""


@cache
def _shapes(axis: str, op: Op, context: Context) -> list[tuple[int, int]]:
    """Inputs and outputs of an operator's projections."""
    with torch.device("meta"), Shapes():
        module = build_op(axis, op, context, context)
    return [(layer.weight[0].numel(), len(layer.weight)) for _, layer in projections(module)]


def _takes_tokens(stem: str) -> bool:
    return getattr(registry.get("stem", stem).build, "takes_tokens", False)


def _coarse(stem: Op) -> Op:
    """The stem with a stride that leaves few tokens."""
    return Op(stem.name, tuple((knob, 2 if knob in ("stride", "patch_size") else v) for knob, v in stem.knobs))


def _options(axis: str, kind: str) -> list[Op]:
    """The operators of an axis that serve a kind, with the knobs that fit."""
    context = Context(WIDTH, IOS[kind].size, kind)
    serving = [name for name in registry.names(axis) if kind in registry.get(axis, name).kinds]
    found = [ops(axis, name, context, knobs=False)[0] for name in serving]
    if axis == "stem":
        found = [_coarse(op) for op in found if _takes_tokens(op.name) == IOS[kind].tokens]
    return found


def _rows(lists: dict[str, list[Op]]) -> list[dict[str, Any]]:
    """Plain data that goes through several lists side by side, beginning again with the shorter ones."""
    rows = range(max(map(len, lists.values())))
    return [{axis: found[i % len(found)].to_plain() for axis, found in lists.items()} for i in rows]


def _taken(kind: str, quant: str, block: dict[str, Any], *axes: str) -> str:
    """The policy, or none where it does not take the projections of these operators of a block."""
    knobs = {knob: found.default for knob, found in registry.get("quant", quant).knobs.items()}
    policy, context = Op(quant, tuple(sorted(knobs.items()))), Context(WIDTH, IOS[kind].size, kind)
    return "fp32" if any(refused(axis, Op.from_plain(block[axis]), context, policy) for axis in axes) else quant


def covering(kind: str, quants: Sequence[str]) -> list[Architecture]:
    """A few architectures in which each mixer, gate and channel mixer stands under each policy that takes it, and each
    other operator of a kind stands somewhere."""
    blocks = _rows({axis: _options(axis, kind) for axis in ("mixer", "gate", "channel_mixer")})
    frames = _rows({axis: _options(axis, kind) for axis in ("stem", "norm", "downsample")})
    found = []
    for j in range(max(len(quants), len(frames))):
        first, second = quants[j % len(quants)], quants[(j + 1) % len(quants)]
        under = []
        for block in blocks:
            quant = {"mixer": _taken(kind, first, block, "mixer", "gate")}
            quant["channel_mixer"] = _taken(kind, second, block, "channel_mixer")
            under.append(block | {"quant": quant})
        found.append(_architecture(frames[j % len(frames)], under))
    return found


def once(kind: str, quants: Sequence[str]) -> Architecture:
    """An architecture of a share of the operators: those of the three kinds' together are all, and the policies.

    Each operator stands once: there is a block for each mixer, and those behind the last gate have none.
    """
    names = {axis: registry.names(axis) for axis in ("mixer", "gate", "channel_mixer")}

    def mine(axis: str) -> list[Op]:
        found = []
        for op in _options(axis, kind):
            kinds = registry.get(axis, op.name).kinds
            if kinds[names[axis].index(op.name) % len(kinds)] == kind:
                found.append(op)
        return found or _options(axis, kind)[:1]

    lists = {axis: mine(axis) for axis in names}
    most, none = max(map(len, lists.values())), Op("none")
    others = {"mixer": Op("identity"), "gate": none, "channel_mixer": none}
    blocks = _rows({axis: found + [others[axis]] * (most - len(found)) for axis, found in lists.items()})
    for i, block in enumerate(blocks):
        block["quant"] = _taken(kind, quants[i % len(quants)], block, "mixer", "gate", "channel_mixer")
    return _architecture({axis: _options(axis, kind)[-1].to_plain() for axis in ("stem", "norm", "downsample")}, blocks)


def _architecture(frame: dict[str, Any], blocks: list[dict[str, Any]]) -> Architecture:
    """Two stages; the first block runs twice."""
    blocks = [block | {"recursion": 2 if i == 0 else 1} for i, block in enumerate(blocks)]
    last = {"mixer": "identity", "channel_mixer": "mlp"}
    stages = [
        {"width": WIDTH, "blocks": blocks},
        {"width": WIDTH + 8, "downsample": frame["downsample"], "blocks": [last]},
    ]
    return Architecture.from_dict({"stem": frame["stem"], "norm": frame["norm"], "stages": stages})
