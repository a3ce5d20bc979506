"""The registry of operators: what can stand at each place of an architecture.

An operator is one `torch.nn.Module` in one file, registered under its standard name; a quantization policy is one
frozen object. The registry itself needs no torch; the files are found by one walk of `operators/`, the first time that
a name is looked up.
"""

from __future__ import annotations

import fnmatch
import importlib
import inspect
import math
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from mixnas.search_space.errors import ConfigError, NasError, exactly, listed, nearest, shown
from mixnas.search_space.extensions import HINT, import_extensions

KINDS = ("image", "sequence", "causal")
AXES = ("stem", "norm", "downsample", "mixer", "gate", "channel_mixer", "quant", "head")
BETWEEN = ("stem", "downsample", "head")
"""Axes whose operators stand between two contexts: they are built with both, and tell their `out_size`."""

LARGEST = 65_536
"""Of a knob that names no bound of its own."""

Value = int | float | str | bool
_Class = TypeVar("_Class", bound=type)


@dataclass(frozen=True)
class Context:
    """Where an operator stands.

    Attributes:
        width: Channels, the last dimension.
        size: Token grid: (height, width) of an image, (length,) of a sequence.
        kind: "image", "sequence" (bidirectional) or "causal".
        padded: Whether examples may be shorter than `size`: what is not there is NaN between units.
    """

    width: int
    size: tuple[int, ...]
    kind: str
    padded: bool = False

    @property
    def tokens(self) -> int:
        """Number of positions."""
        total = 1
        for extent in self.size:
            total *= extent
        return total


@dataclass(frozen=True)
class Knob:
    """A setting of an operator: its default and what is allowed. The default's type is the knob's type."""

    default: Value
    _: KW_ONLY
    low: float | None = None
    high: float | None = None
    step: float | None = None
    choices: tuple[Value, ...] | None = None
    doc: str = ""

    def describe(self) -> str:
        """What is allowed, in words."""
        if self.choices is not None:
            return "one of " + ", ".join(str(c) for c in self.choices)
        if isinstance(self.default, bool):
            return "true or false"
        parts = ["a whole number" if isinstance(self.default, int) else "a number"]
        if self.low is not None or self.high is not None:
            parts.append(f"from {'-inf' if self.low is None else exactly(self.low)}")
            parts.append(f"to {exactly(LARGEST if self.high is None else self.high)}")
        if self.step is not None:
            parts.append(f"in steps of {exactly(self.step)}")
        return " ".join(parts)

    def normalise(self, value: Any) -> Value | None:
        """The value in the knob's own type, or None when it is not allowed."""
        if isinstance(self.default, bool) or isinstance(value, bool):
            ok = isinstance(self.default, bool) and isinstance(value, bool)
        elif isinstance(self.default, int):
            ok = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
            value = int(value) if ok else value
        elif isinstance(self.default, float):
            ok = isinstance(value, int | float) and abs(value) <= sys.float_info.max
            value = float(value) if ok else value
        else:
            ok = isinstance(value, str)
        if not ok or (self.choices is not None and value not in self.choices):
            return None
        if isinstance(value, int | float) and not isinstance(value, bool):
            high = LARGEST if self.high is None else self.high
            if (self.low is not None and value < self.low) or value > high:
                return None
            if self.step is not None and not _is_multiple(value - (self.low or 0), self.step):
                return None
        return value


def _is_multiple(value: float, step: float) -> bool:
    """Exactly of whole numbers; of decimals, which have no exact floats, as nearly as floats tell."""
    if isinstance(value, int) and isinstance(step, int):
        return value % step == 0
    return math.isclose(value / step, round(value / step), rel_tol=1e-9, abs_tol=1e-9)


@dataclass(frozen=True)
class Operator:
    """A registered operator.

    Attributes:
        axis: Where it may stand.
        name: Its standard name.
        build: Its module's class, or a policy's: called with the context (see `BETWEEN`) and the knobs by name; a
            policy with the knobs alone.
        kinds: The kinds of task that it serves.
        paper: Where it comes from.
        knobs: Its settings.
        check, pointwise, one_length: See `register`.
    """

    axis: str
    name: str
    build: type
    kinds: tuple[str, ...]
    paper: str
    knobs: Mapping[str, Knob] = field(default_factory=dict)
    check: Callable[[Context, Mapping[str, Value]], str | None] | None = None
    pointwise: bool = False
    one_length: bool = False

    @cached_property
    def takes_valid(self) -> bool:
        """Whether its `forward` can be told which positions are there, `valid` (B, L, 1)."""
        return "valid" in inspect.signature(self.build.forward).parameters  # type: ignore[attr-defined]

    def serves_padded(self, kind: str) -> bool:
        """Whether its answers where something is are the same whatever lies behind it, and however much of it.

        What sees no later position need not be told, unless it gives one answer to all of them.
        """
        if self.axis == "quant" or self.pointwise or self.takes_valid:
            return True
        if self.one_length:
            return False
        return kind == "causal" and self.axis not in BETWEEN


STRUCTURE: Mapping[str, Knob] = {
    "width": Knob(1, low=1, high=16_384, doc="channels of a stage"),
    "depth": Knob(1, low=1, high=256, doc="blocks of a stage"),
    "recursion": Knob(1, low=1, high=64, doc="how often a block runs with one set of weights"),
}
"""The settings of stages and blocks, as `Knob`s."""

MOST_CHOICES = 256
"""Values in one list of choices."""
MOST_COMBINATIONS = 4096
"""Combinations of one operator's knobs."""
MOST_STAGES = 64
MOST_BLOCKS = 1024
"""Blocks of a space, the deepest of each stage together."""
MOST_VARIABLES = 20_000
"""Choices of a space that depend on nobody else's, or on another one: `SearchSpace.variables`."""

_operators: dict[tuple[str, str], Operator] = {}
_aliases: dict[tuple[str, str], str] = {}


def register(
    axis: str,
    name: str,
    *,
    paper: str,
    kinds: tuple[str, ...] = KINDS,
    knobs: Mapping[str, Knob] | None = None,
    check: Callable[[Context, Mapping[str, Value]], str | None] | None = None,
    aliases: tuple[str, ...] = (),
    pointwise: bool = False,
    one_length: bool = False,
) -> Callable[[_Class], _Class]:
    """Class decorator that registers a module as an operator.

    Args:
        axis: One of `AXES`: the place in an architecture where it may stand.
        name: The standard name in the literature, as it is written in an architecture file: letters, digits and
            underscores, and no attribute of a torch container (it becomes part of the names of parameters).
        paper: Where it comes from.
        kinds: The kinds of task that it serves.
        knobs: Its settings; the class takes them as keyword arguments of the same names.
        check: `check(context, knobs)` returns why that combination is impossible, or None.
        aliases: Former names, under which stored architectures may have it; the canonical form has `name`.
        pointwise: Whether it answers at each position from that position alone. What looks at others may be told which
            of them are there: `forward` then has an argument `valid`, (B, L, 1) bool or None for all.
        one_length: Whether what it answers at a position depends on how many there are in all, even where no later one
            is looked at: its weights are of one length, or all positions share something.

    Raises:
        NasError: The name is taken or cannot be one, or the axis or a kind does not exist.
    """
    if axis not in AXES:
        raise NasError(f"operator {name!r}: no axis {axis!r}; the axes are {', '.join(AXES)}.")
    if not kinds or set(kinds) - set(KINDS):
        raise NasError(f"operator {name!r}: kinds {kinds!r} must be some of {', '.join(KINDS)}.")
    _check_name(axis, name)
    knobs = dict(knobs or {})
    for knob_name, knob in knobs.items():
        if not knob_name.isidentifier() or knob_name == "name":
            raise NasError(
                f"{axis} {name!r}: a knob cannot be called {knob_name!r}. It is a keyword argument of the class and a "
                "key of a configuration, where `name` is the operator's: letters, digits and underscores."
            )
        if knob.normalise(knob.default) is None:
            raise NasError(f"{axis} {name!r}: the default of {knob_name} is not {knob.describe()}.")

    def decorate(cls: _Class) -> _Class:
        for known in (name, *aliases):
            taken = _operators.get((axis, _aliases.get((axis, known), known)))
            if taken is not None and taken.build is not cls:
                here, there = (f"{c.__module__}.{c.__qualname__}" for c in (cls, taken.build))
                raise NasError(f"{axis} {known!r} is registered twice: by {there} and by {here}. Rename one.")
        _operators[axis, name] = Operator(axis, name, cls, kinds, paper, knobs, check, pointwise, one_length)
        _aliases.update({(axis, alias): name for alias in aliases})
        return cls

    return decorate


def _check_name(axis: str, name: str) -> None:
    """Refuse a name under which torch holds no submodule."""
    from torch import nn

    if not isinstance(name, str) or not name.isidentifier():
        raise NasError(
            f"{axis} {name!r}: an operator's name is part of the names of its parameters. It must be letters, digits "
            "and underscores, and begin with a letter."
        )
    if hasattr(nn.Sequential(), name) or hasattr(nn.ModuleDict(), name):
        raise NasError(
            f"{axis} {name!r}: torch's modules have an attribute of that name, so that no submodule can. Choose "
            f"another, for example {name}_{axis}."
        )


_loaded = False


def load() -> None:
    """Import the files of all operators that come with the package (needs torch), and a user's own (`extensions`)."""
    global _loaded
    if not _loaded:
        from mixnas.search_space import operators

        for info in pkgutil.walk_packages(operators.__path__, f"{operators.__name__}."):
            importlib.import_module(info.name)
        _loaded = True
    import_extensions()


def get(axis: str, name: str) -> Operator:
    """Look an operator up.

    Raises:
        ConfigError: No such operator on this axis; the message names the nearest and all there are.
    """
    operator = _operators.get((axis, name))
    if operator is None:
        load()
        operator = _operators.get((axis, _aliases.get((axis, name), name)))
    if operator is None:
        known = names(axis)
        elsewhere = [a for a in AXES if (a, name) in _operators]
        hint = f" It is a {elsewhere[0].replace('_', ' ')}." if elsewhere else nearest(name, known)
        raise ConfigError(f"no {axis.replace('_', ' ')} is called {shown(name)}.{hint} Allowed: {listed(known)}.{HINT}")
    return operator


def names(axis: str, pattern: str = "*") -> list[str]:
    """Sorted names of the operators of an axis that match a shell-style pattern."""
    load()
    return sorted(name for (a, name) in _operators if a == axis and fnmatch.fnmatch(name, pattern))
