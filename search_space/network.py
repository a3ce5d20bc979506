"""From an architecture to a network: a network is the sequence of its units.

`plan` turns an architecture into units (stem, downsamples, blocks, head), each with all that it needs to be built,
counted or measured by itself. Everything that is per unit (cost, latency, weight sharing) goes through them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from mixnas.search_space import registry
from mixnas.search_space.architecture import Architecture, Block, Op
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.registry import Context


@dataclass(frozen=True)
class IOSpec:
    """What a task feeds a network and reads from it.

    Attributes:
        kind: "image", "sequence" or "causal".
        size: (height, width) or (length,) of the input.
        in_features: Input channels, or the vocabulary size where the input is tokens.
        num_outputs: Outputs of the head.
        head: "pool" reads (B, num_outputs) from the mean over positions, "token" (B, *size, num_outputs).
        tokens: Whether the input is integers (B, L) rather than features (B, *size, in_features).
    """

    kind: str
    size: tuple[int, ...]
    in_features: int
    num_outputs: int
    head: str = "pool"
    tokens: bool = False

    def example(
        self, batch_size: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None
    ) -> Tensor:
        """A random input batch: standard normal features, or uniform tokens."""
        shape = (batch_size, *self.size)
        if self.tokens:
            return torch.randint(self.in_features, shape, device=device, generator=generator)
        return torch.randn(*shape, self.in_features, device=device, generator=generator)


@dataclass(frozen=True)
class Unit:
    """One part of a network.

    Attributes:
        name: Its place, for example "stages.0.blocks.1"; empty in a key.
        role: "stem", "downsample", "block" or "head".
        op: The stem's or downsample's operator, the block, or None for a head.
        norm: The norm of a block or a head, else None.
        before: Context of its input.
        after: Context of its output (of a head: `num_outputs` wide).
        detail: The head's kind, or "tokens" for a stem that reads integers.
    """

    name: str
    role: str
    op: Op | Block | None
    norm: Op | None
    before: Context
    after: Context
    detail: str = ""

    @property
    def key(self) -> Unit:
        """The same unit without its place: equal keys cost and take the same."""
        return replace(self, name="")


# Makes the module of an operator: its place within the unit, axis, operator, context, and for stems and downsamples the
# context behind it. The super-network passes one that hands out modules sharing its weights.
Make = Callable[..., nn.Module]


def build_op(path: str, axis: str, op: Op, context: Context, *after: Context) -> nn.Module:
    """Build an operator where it stands, freshly initialised."""
    return registry.get(axis, op.name).build(context, *after, **op.options)


@lru_cache(maxsize=65536)
def _check_op(axis: str, op: Op, context: Context) -> None:
    operator = registry.get(axis, op.name)
    label = axis.replace("_", " ")
    if context.kind not in operator.kinds:
        suitable = [n for n in registry.names(axis) if context.kind in registry.get(axis, n).kinds]
        raise ConfigError(
            f"{label} {op.name!r} does not serve {context.kind} tasks (it serves {', '.join(operator.kinds)}). "
            f"Allowed: {', '.join(suitable)}."
        )
    problem = operator.check(context, op.options) if operator.check else None
    if problem:
        raise ConfigError(f"{label} {op}: {problem}. Choose other values, or another width or input size.")


def check_unit(unit: Unit) -> None:
    """Raise `ConfigError` when the unit cannot be built where it stands."""
    try:
        if unit.role in ("stem", "downsample"):
            assert isinstance(unit.op, Op)
            _check_op(unit.role, unit.op, unit.before)
            if unit.role == "stem":
                takes_tokens = getattr(registry.get("stem", unit.op.name).build, "takes_tokens", False)
                if takes_tokens != (unit.detail == "tokens"):
                    given = "tokens" if unit.detail == "tokens" else "features"
                    wants = "tokens" if takes_tokens else "features"
                    raise ConfigError(f"stem {unit.op.name!r} reads {wants}, and the task gives {given}.")
        elif unit.role == "block":
            assert isinstance(unit.op, Block)
            for axis in ("mixer", "gate", "channel_mixer", "quant"):
                _check_op(axis, getattr(unit.op, axis), unit.before)
        if unit.norm is not None:
            _check_op("norm", unit.norm, unit.before)
    except ConfigError as error:
        raise ConfigError(f"{unit.name}: {error}" if unit.name else str(error)) from None


def plan(architecture: Architecture, io: IOSpec) -> tuple[Unit, ...]:
    """The units of a network, in the order in which they run.

    Raises:
        ConfigError: An operator cannot stand where it stands (kind of task, width, size); the message says which.
    """
    units: list[Unit] = []

    def add(*args: object, **kwargs: object) -> Context:
        unit = Unit(*args, **kwargs)  # type: ignore[arg-type]
        check_unit(unit)
        units.append(unit)
        return unit.after

    context = Context(io.in_features, io.size, io.kind)
    for s, stage in enumerate(architecture.stages):
        if s == 0:
            context = add("stem", "stem", architecture.stem, None, context, after_op("stem", architecture.stem, context,
                          stage.width), "tokens" if io.tokens else "")  # fmt: skip
        if s > 0 or stage.downsample.name != "none":
            after = after_op("downsample", stage.downsample, context, stage.width)
            context = add(f"stages.{s}.downsample", "downsample", stage.downsample, None, context, after)
        for b, block in enumerate(stage.blocks):
            context = add(f"stages.{s}.blocks.{b}", "block", block, architecture.norm, context, context)
    add("head", "head", None, architecture.norm, context, Context(io.num_outputs, context.size, io.kind), io.head)
    return tuple(units)


def after_op(axis: str, op: Op, before: Context, width: int) -> Context:
    """The context behind a stem or a downsample."""
    size = registry.get(axis, op.name).build.out_size(before.size, **op.options)  # type: ignore[attr-defined]
    return Context(width, size, before.kind)


def _named(name: str, module: nn.Module) -> nn.Sequential:
    """The operator's name in the parameter's name: operators never share weights by accident, and files read well."""
    wrapper = nn.Sequential()
    wrapper.add_module(name, module)
    return wrapper


class MixerBranch(nn.Module):
    """gate(mixer(norm(x)))."""

    def __init__(self, block: Block, norm: Op, context: Context, make: Make = build_op) -> None:
        super().__init__()
        self.norm = _named(norm.name, make("token.norm", "norm", norm, context))
        self.mixer = _named(block.mixer.name, make("token.mixer", "mixer", block.mixer, context))
        self.gate = nn.ModuleDict({block.gate.name: make("token.gate", "gate", block.gate, context)})
        self._gate = block.gate.name

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        return self.gate[self._gate](self.norm(x), self.mixer)


class ChannelBranch(nn.Module):
    """channel_mixer(norm(x))."""

    def __init__(self, block: Block, norm: Op, context: Context, make: Make = build_op) -> None:
        super().__init__()
        self.norm = _named(norm.name, make("channel.norm", "norm", norm, context))
        mixer = make("channel.channel_mixer", "channel_mixer", block.channel_mixer, context)
        self.channel_mixer = _named(block.channel_mixer.name, mixer)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        return self.channel_mixer(self.norm(x))


class BlockModule(nn.Module):
    """`x + gate(mixer(norm(x)))`, then `x + channel_mixer(norm(x))` (MetaFormer, arXiv 2111.11418, section 3.1)."""

    def __init__(self, block: Block, norm: Op, context: Context, make: Make = build_op) -> None:
        super().__init__()
        self.token = MixerBranch(block, norm, context, make)
        self.channel = ChannelBranch(block, norm, context, make) if block.channel_mixer.name != "none" else None
        self.quant = make("quant", "quant", block.quant, context)
        self.recursion = block.recursion

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        for _ in range(self.recursion):
            x = x + self.quant(x, self.token)
            if self.channel is not None:
                x = x + self.quant(x, self.channel)
        return x

    def branches(self) -> list[nn.Module]:
        """The residual branches, which is what a quantization policy acts on."""
        return [self.token] if self.channel is None else [self.token, self.channel]


class Head(nn.Module):
    """norm, mean over positions (pool), linear."""

    def __init__(self, unit: Unit, make: Make = build_op) -> None:
        super().__init__()
        assert unit.norm is not None
        self.norm = _named(unit.norm.name, make("norm", "norm", unit.norm, unit.before))
        self.linear = nn.Linear(unit.before.width, unit.after.width)
        self.pool = unit.detail == "pool"

    def features(self, x: Tensor) -> Tensor:
        """What the linear layer reads: (B, *size, C) to (B, C) or the same."""
        x = self.norm(x)
        return x.flatten(1, -2).mean(dim=1) if self.pool else x

    def forward(self, x: Tensor) -> Tensor:
        """(B, *size, C) to (B, outputs) or (B, *size, outputs)."""
        return self.linear(self.features(x))


def build_unit(unit: Unit, make: Make = build_op) -> nn.Module:
    """The module of a unit, freshly initialised from torch's global generator, or of operators that `make` gives."""
    if unit.role == "head":
        return Head(unit, make)
    if unit.role == "block":
        assert isinstance(unit.op, Block) and unit.norm is not None
        return BlockModule(unit.op, unit.norm, unit.before, make)
    assert isinstance(unit.op, Op)
    return _named(unit.op.name, make("", unit.role, unit.op, unit.before, unit.after))


class Network(nn.Module):
    """The network of an architecture.

    Args:
        architecture: Which.
        io: What it reads and answers.
        generator: Source of the initial weights' seed; without one, torch's global generator is used.
        units: Modules by unit name to use instead of building them (the super-network shares weights so).

    Shape:
        Input (B, *size, in_features), or (B, L) integers; output as `io.head` says.
    """

    def __init__(
        self,
        architecture: Architecture,
        io: IOSpec,
        *,
        generator: torch.Generator | None = None,
        units: Iterable[tuple[str, nn.Module]] | None = None,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.io = io
        if units is None:
            planned = plan(architecture, io)
            if generator is None:
                units = [(unit.name, build_unit(unit)) for unit in planned]
            else:
                with seeded(generator):
                    units = [(unit.name, build_unit(unit)) for unit in planned]
        for name, module in units:
            _add_nested(self, name, module)
        self._order = [name for name, _ in units]
        self._sequence = [module for _, module in units]

    def units(self) -> list[tuple[str, nn.Module]]:
        """The modules in the order in which they run, by place."""
        return list(zip(self._order, self._sequence, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        for module in self._sequence:
            x = module(x)
        return x

    def deploy(self) -> Network:
        """Store weights as each block's quantization policy stores them on the device, in place; returns itself."""
        for module in self._sequence:
            if isinstance(module, BlockModule):
                for branch in module.branches():
                    module.quant.deploy(branch)  # type: ignore[operator]
        return self


def _add_nested(root: nn.Module, name: str, module: nn.Module) -> None:
    *parents, last = name.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    root.add_module(last, module)


class seeded:  # noqa: N801 - a context manager, used like a function
    """Within it, torch's global CPU generator is seeded from `generator`; afterwards it is as it was."""

    def __init__(self, generator: torch.Generator) -> None:
        self._seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))

    def __enter__(self) -> None:
        self._state = torch.random.get_rng_state()
        torch.random.default_generator.manual_seed(self._seed)

    def __exit__(self, *_: object) -> None:
        torch.random.set_rng_state(self._state)


# -- counting ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Parameters, multiply-accumulates of one example, and bytes of the weights as deployed."""

    params: int
    macs: int
    weight_bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.params + other.params, self.macs + other.macs, self.weight_bytes + other.weight_bytes)


def _macs_of(module: nn.Module, example: Tensor) -> int:
    total = 0

    def count(m: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(m, nn.Linear):
            total += output.numel() * m.in_features
        elif isinstance(m, nn.Conv1d | nn.Conv2d):
            total += output.numel() * m.weight[0].numel()
        if hasattr(m, "own_macs"):
            total += m.own_macs(*inputs)  # type: ignore[operator]

    handles = [m.register_forward_hook(count) for m in module.modules()]
    with torch.no_grad():
        module(example)
    for handle in handles:
        handle.remove()
    return total


@lru_cache(maxsize=65536)
def _key_cost(key: Unit) -> Cost:
    with torch.device("meta"):
        module = build_unit(key).eval()
        tokens = key.detail == "tokens"
        shape = (1, *key.before.size)
        example = torch.zeros(shape, dtype=torch.long) if tokens else torch.zeros(*shape, key.before.width)
        macs = _macs_of(module, example)
    params = sum(p.numel() for p in module.parameters())
    if isinstance(module, BlockModule):
        weight_bytes = sum(module.quant.weight_bytes(branch) for branch in module.branches())  # type: ignore[operator]
    else:
        weight_bytes = 4 * params
    return Cost(params, macs, weight_bytes)


def unit_cost(unit: Unit) -> Cost:
    """Cost of one unit, exact; computed once per key, on shapes only."""
    return _key_cost(unit.key)


def cost(architecture: Architecture, io: IOSpec) -> Cost:
    """Cost of a whole network, exact: the sum over its units."""
    total = Cost(0, 0, 0)
    for unit in plan(architecture, io):
        total = total + unit_cost(unit)
    return total
