"""What a network is made of, without torch: the sequence of its units.

A unit holds all that it takes to build it, count it, measure it, share its weights and predict its latency by itself.
A block is two units, its branches, because they are independent: what is known of all units of a space is a sum over
its axes, not a product. A unit does not know its place: equal units cost and take the same wherever they stand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mixnas.search_space import registry
from mixnas.search_space.architecture import Architecture, Block, Op
from mixnas.search_space.errors import ConfigError, nearest
from mixnas.search_space.registry import KINDS, Context, Value

if TYPE_CHECKING:
    import torch

ROLES = ("stem", "downsample", "token", "channel", "head")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class IOSpec:
    """What a task feeds a network and reads from it.

    Attributes:
        kind: "image", "sequence" or "causal".
        size: (height, width) or (length,) of the input.
        in_features: Input channels, or the vocabulary size where the input is tokens.
        num_outputs: Outputs of the head.
        head: Name of a head: "pool" answers (B, num_outputs), "token" (B, *grid, num_outputs); see `nas ops head`.
        tokens: Whether the input is integers (B, L) rather than features (B, *size, in_features).
        out_size: Grid of the answers, where it is neither one answer ("pool") nor the input's own size.
        head_knobs: Those of the head's knobs that are not at their defaults: {"scale": 3}, or pairs.
        mean, std: Of each input channel. Given both, a network itself begins with (x - mean) / std, and so does what is
            exported of it: it reads raw numbers, as pixels from 0 to 255.
        padded: Whether sequences of features may be shorter than `size`: they are filled up with NaN at their end.

    Raises:
        ConfigError: A kind, an extent or a number that cannot be.

    Examples:
        >>> import mixnas
        >>> photographs = mixnas.IOSpec("image", (32, 32), in_features=3, num_outputs=10)
        >>> photographs.example(2).shape
        torch.Size([2, 32, 32, 3])
    """

    kind: str
    size: tuple[int, ...]
    in_features: int
    num_outputs: int
    head: str = "pool"
    tokens: bool = False
    out_size: tuple[int, ...] | None = None
    mean: tuple[float, ...] | None = field(default=None, repr=False)
    std: tuple[float, ...] | None = field(default=None, repr=False)
    head_knobs: tuple[tuple[str, Value], ...] = ()
    padded: bool = field(default=False, repr=False)  # without which the digests of earlier super-networks stand

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            near = nearest(str(self.kind), KINDS)
            raise ConfigError(f"IOSpec: kind is {self.kind!r}.{near} Allowed: {', '.join(KINDS)}.")
        extents = 2 if self.kind == "image" else 1
        for name in ("size", "out_size"):
            value = getattr(self, name)
            if name == "out_size" and value is None:
                continue
            if not isinstance(value, tuple | list) or not all(map(_is_count, value)):
                raise ConfigError(f"IOSpec: {name} is {value!r}. It must be whole numbers from 1, as in (32, 32).")
            object.__setattr__(self, name, tuple(value))
        if len(self.size) != extents:
            raise ConfigError(f"IOSpec: size is {self.size!r}. Of kind {self.kind!r} it has {extents} extents.")
        for name in ("in_features", "num_outputs"):
            if not _is_count(getattr(self, name)):
                raise ConfigError(f"IOSpec: {name} is {getattr(self, name)!r}. It must be a whole number from 1.")
        try:  # sorted pairs, so that equal interfaces are equal and hash alike
            knobs = tuple(sorted(dict(self.head_knobs).items()))
            hash(knobs)
        except (TypeError, ValueError):
            given = repr(self.head_knobs)
            raise ConfigError(f'IOSpec: head_knobs is {given}. It must be a mapping, as in {{"scale": 3}}.') from None
        object.__setattr__(self, "head_knobs", knobs)
        if self.padded and (self.kind == "image" or self.tokens):
            raise ConfigError("IOSpec: padded is of sequences of features. Leave it out.")
        self._check_normalisation()

    def _check_normalisation(self) -> None:
        if self.mean is None and self.std is None:
            return
        if self.tokens:
            raise ConfigError("IOSpec: mean and std are of features, and the input is tokens. Leave them out.")
        for name in ("mean", "std"):
            value = getattr(self, name)
            numbers = isinstance(value, tuple | list) and all(map(_is_number, value))
            if not numbers or len(value) != self.in_features or (name == "std" and min(value) <= 0):
                raise ConfigError(
                    f"IOSpec: {name} is {value!r}. mean and std are given together, {self.in_features} finite numbers "
                    "each, one an input channel; std above 0."
                )
            object.__setattr__(self, name, tuple(map(float, value)))

    @property
    def grid(self) -> tuple[int, ...]:
        """The grid of the answers, hence of the targets: () where an example has one answer."""
        if self.out_size is not None:
            return self.out_size
        return () if self.head == "pool" else self.size

    @cached_property
    def head_op(self) -> Op:
        """The head, with every knob.

        Raises:
            ConfigError: No head has that name, or it has no such knob or not with that value.
        """
        operator = registry.get("head", self.head)
        values = {knob: operator.knobs[knob].default for knob in sorted(operator.knobs)}
        for name, value in self.head_knobs:
            if name not in values:
                raise ConfigError(
                    f"IOSpec: head {operator.name!r} has no knob {name!r} (head_knobs).{nearest(name, values)} "
                    f"Its knobs: {', '.join(values) or 'none'}."
                )
            normal = operator.knobs[name].normalise(value)
            if normal is None:
                allowed = operator.knobs[name].describe()
                raise ConfigError(f"IOSpec: head_knobs: {name} is {value!r}. Allowed: {allowed}.")
            values[name] = normal
        return Op(operator.name, tuple(values.items()))

    @property
    def before(self) -> Context:
        """What the stem reads."""
        return Context(self.in_features, self.size, self.kind, self.padded)

    def after(self, size: tuple[int, ...]) -> Context:
        """What a head answers with on the grid `size`."""
        return Context(self.num_outputs, size, self.kind, self.padded)

    def to_plain(self) -> dict[str, Any]:
        """Plain data; `from_plain` is its inverse."""
        plain = asdict(self) | {"size": list(self.size)}
        for name in ("out_size", "mean", "std"):
            if plain[name] is None:
                del plain[name]
            else:
                plain[name] = list(plain[name])
        plain["head_knobs"] = dict(self.head_knobs)
        for name in ("head_knobs", "padded"):  # as it was written before there were these
            if not plain[name]:
                del plain[name]
        return plain

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> IOSpec:
        """The inverse of `to_plain`."""
        grids = {key: tuple(plain[key]) for key in ("size", "out_size") if plain.get(key) is not None}
        return cls(**{**plain, **grids})

    def example(
        self, batch_size: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """A random input batch: normal features, of `mean` and `std` where they are given, or uniform tokens."""
        import torch

        shape = (batch_size, *self.size)
        if self.tokens:
            return torch.randint(self.in_features, shape, device=device, generator=generator)
        x = torch.randn(*shape, self.in_features, device=device, generator=generator)
        if self.mean is None:
            return x
        return x * torch.tensor(self.std, device=device) + torch.tensor(self.mean, device=device)


@dataclass(frozen=True)
class Unit:
    """One part of a network, without its place.

    Attributes:
        role: One of `ROLES`.
        ops: (axis, operator) of each operator in it, in the order in which they are built: of a token branch the norm,
            the mixer and the gate, of a channel branch the norm and the channel mixer, of a head the norm and the head.
        before: Context of its input.
        after: Context of its output.
        quant: The policy of a branch, else None.
        tokens: Whether it reads integers (a stem only).
    """

    role: str
    ops: tuple[tuple[str, Op], ...]
    before: Context
    after: Context
    quant: Op | None = None
    tokens: bool = False

    def op(self, axis: str) -> Op:
        """The operator of an axis; `KeyError` where there is none."""
        return dict(self.ops)[axis]

    @property
    def choices(self) -> tuple[tuple[str, Op], ...]:
        """(axis, operator) of all that was chosen for it, the policy last."""
        return self.ops if self.quant is None else (*self.ops, ("quant", self.quant))

    @cached_property
    def _hash(self) -> int:
        return hash((self.role, self.ops, self.before, self.after, self.quant, self.tokens))

    def __hash__(self) -> int:  # units are keys of large tables
        return self._hash

    def to_plain(self) -> dict[str, Any]:
        """Plain data; `from_plain` is its inverse."""
        plain: dict[str, Any] = {
            "role": self.role,
            "ops": {axis: op.to_plain() for axis, op in self.ops},
            "kind": self.before.kind,
            "before": [self.before.width, *self.before.size],
            "after": [self.after.width, *self.after.size],
        }
        if self.quant is not None:
            plain["quant"] = self.quant.to_plain()
        for name, flag in (("tokens", self.tokens), ("padded", self.before.padded)):
            if flag:
                plain[name] = True
        return plain

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Unit:
        """The inverse of `to_plain`."""
        padded = bool(plain.get("padded", False))
        before, after = (Context(plain[n][0], tuple(plain[n][1:]), plain["kind"], padded) for n in ("before", "after"))
        ops = tuple((axis, Op.from_plain(op)) for axis, op in plain["ops"].items())
        quant = Op.from_plain(plain["quant"]) if "quant" in plain else None
        return cls(plain["role"], ops, before, after, quant, bool(plain.get("tokens", False)))


SizeAfter = Callable[[str, Op, Context], tuple[int, ...]]
"""`size_after(axis, op, before)`: the token grid behind a stem, a downsample or a head."""


def registry_size_after(axis: str, op: Op, before: Context) -> tuple[int, ...]:
    """`SizeAfter` from the operators themselves; imports torch."""
    operator: Any = registry.get(axis, op.name).build
    grid: tuple[int, ...] = operator.out_size(before.size, **op.options)
    return grid


HeadOf = Callable[[IOSpec], Op]
"""`head_of(io)`: the head of networks with an interface, with every knob."""


def registry_head_of(io: IOSpec) -> Op:
    """`HeadOf` from the operators themselves; imports torch."""
    return io.head_op


def stem_unit(op: Op, io: IOSpec, after: Context) -> Unit:
    """The stem."""
    return Unit("stem", (("stem", op),), io.before, after, tokens=io.tokens)


def downsample_unit(op: Op, before: Context, after: Context) -> Unit:
    """What stands before a stage's first block."""
    return Unit("downsample", (("downsample", op),), before, after)


def token_unit(norm: Op, mixer: Op, gate: Op, quant: Op, context: Context) -> Unit:
    """`x + gate(mixer(norm(x)))`."""
    return Unit("token", (("norm", norm), ("mixer", mixer), ("gate", gate)), context, context, quant)


def channel_unit(norm: Op, channel_mixer: Op, quant: Op, context: Context) -> Unit:
    """`x + channel_mixer(norm(x))`."""
    return Unit("channel", (("norm", norm), ("channel_mixer", channel_mixer)), context, context, quant)


def head_unit(norm: Op, head: Op, io: IOSpec, context: Context, size: tuple[int, ...]) -> Unit:
    """Norm and head; `size` is the grid that it answers on."""
    return Unit("head", (("norm", norm), ("head", head)), context, io.after(size))


def branches(block: Block, norm: Op, context: Context) -> Iterator[tuple[str, Unit]]:
    """The units of one pass through a block, by the last part of their names."""
    yield "token", token_unit(norm, block.mixer, block.gate, block.quant, context)
    if block.channel_mixer.name != "none":
        yield "channel", channel_unit(norm, block.channel_mixer, block.channel_quant, context)


def plan(
    architecture: Architecture,
    io: IOSpec,
    size_after: SizeAfter = registry_size_after,
    head_of: HeadOf = registry_head_of,
) -> tuple[tuple[str, Unit], ...]:
    """The units of a network by name, in the order in which they run.

    Names are "stem", "stages.1.downsample", "stages.0.blocks.2.token", "stages.0.blocks.2.channel" and "head". The
    units of a block with recursion stand as often as they run, each time under the same name.

    Args:
        architecture: Which.
        io: What it reads and answers.
        size_after: See `SizeAfter`; from the operators themselves, which needs torch, if not given.
        head_of: See `HeadOf`; likewise.
    """
    units: list[tuple[str, Unit]] = []
    context = io.before
    for s, stage in enumerate(architecture.stages):
        if s == 0:
            after = Context(stage.width, size_after("stem", architecture.stem, context), io.kind, io.padded)
            units.append(("stem", stem_unit(architecture.stem, io, after)))
            context = after
        if s > 0 or stage.downsample.name != "none":
            after = Context(stage.width, size_after("downsample", stage.downsample, context), io.kind, io.padded)
            units.append((f"stages.{s}.downsample", downsample_unit(stage.downsample, context, after)))
            context = after
        for b, block in enumerate(stage.blocks):
            once = [(f"stages.{s}.blocks.{b}.{n}", unit) for n, unit in branches(block, architecture.norm, context)]
            units += once * block.recursion
    head = head_of(io)
    units.append(("head", head_unit(architecture.norm, head, io, context, size_after("head", head, context))))
    return tuple(units)


def is_unit(name: str) -> bool:
    """Whether the path of a module in a network is the name of a unit."""
    return name in ("stem", "head") or name.endswith((".downsample", ".token", ".channel"))


def describe_frame(unit: Unit) -> dict[str, float]:
    """What `describe` says of a unit whatever its operators are."""
    return {
        f"role={unit.role}": 1.0,
        "width_in": float(unit.before.width),
        "width": float(unit.after.width),
        "tokens": float(unit.after.tokens),
        "tokens_in": float(unit.before.tokens),
    }


def describe_op(axis: str, op: Op) -> dict[str, float]:
    """What `describe` says of one operator of a unit."""
    described = {f"{axis}={op.name}": 1.0}
    for knob, value in op.knobs:
        if isinstance(value, str):
            described[f"{axis}.{op.name}.{knob}={value}"] = 1.0
        else:
            described[f"{axis}.{op.name}.{knob}"] = float(value)
    return described


def describe(unit: Unit) -> dict[str, float]:
    """A unit's settings as numbers: its width and grid, which operators it has, and their knobs.

    Names: "role=token", "width", "tokens", "mixer=dwconv", "mixer.dwconv.kernel_size" and so on; absent ones are zero.
    """
    described = describe_frame(unit)
    for axis, op in unit.choices:
        described |= describe_op(axis, op)
    return described
