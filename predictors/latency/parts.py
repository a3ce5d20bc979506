"""Which unit stands where in the networks of a space, without building or decoding any of them.

A network has parts: its stem, the downsample before each stage, two branches for each block that a stage may have, its
head. A part is decided by a few choices of the space. Each is a digit, so that what stands there is one cell of a
table: of a token branch norm x width x grid x mixer x gate x policy x recursion. The index of the cell is linear in the
encoded vector, but for a few choices that are looked up first (`Part.lifts`): an operator with knobs takes as many
positions as they have settings, and a block that is not there has a position of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np

from mixnas.predictors.latency.unit_rows import POLICY, WIDTH, Interner, UnitRows, distinct
from mixnas.search_space.architecture import Op
from mixnas.search_space.grammar import BlockChoice, OpChoice, OpOption, StageChoice
from mixnas.search_space.registry import Context
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import HeadOf, IOSpec, SizeAfter, Unit, registry_head_of

ABSENT = -1
"""Row of a part that an architecture does not have."""

_SLOTS = {"norm": 0, "mixer": 1, "channel_mixer": 1, "gate": 2, "quant": POLICY, "channel_quant": POLICY}
"""Where what a branch chooses stands in its row."""

_At = tuple[int | None, int | None]
"""Stage and block of a variable, as in `Variable`."""
_NOWHERE: _At = (None, None)


@dataclass(frozen=True, eq=False)
class Digit:
    """One of the choices that decide a part.

    Its position is `lift[value of top + 1] + sum(stride x value)` over the knobs, whose inactive values count as 0.

    Attributes:
        axis: What is chosen, as in `Variable.axis`.
        values: What each position stands for: operators with their knobs, or numbers.
        top: The variable; -1 where there is nothing to choose.
        lift: Positions by the variable's value, inactive first.
        knobs: (variable, stride) of what is chosen beside it.
        may_miss: Whether the last position, behind `values`, says that the part is not there.
    """

    axis: str
    values: tuple[Op, ...] | tuple[int, ...]
    top: int = -1
    lift: tuple[int, ...] = ()
    knobs: tuple[tuple[int, int], ...] = ()
    may_miss: bool = False

    @property
    def size(self) -> int:
        """Number of positions."""
        return len(self.values) + self.may_miss

    def or_missing(self) -> Digit:
        """The same with a position for the part that is not there: where its variable is inactive."""
        return replace(self, lift=(len(self.values), *self.lift[1:]), may_miss=True)


@dataclass(frozen=True)
class Part:
    """One part of a network: where its cell is.

    The index is the sum of `stride x max(value, 0)` over `linear`, and of `stride x lift[value + 1]` over `lifts`.

    Attributes:
        name: Its place, as in `units.plan`.
        table: Which of the space's tables holds its cells.
        linear: (variable, stride).
        lifts: (variable, lift, stride).
    """

    name: str
    table: int
    linear: tuple[tuple[int, int], ...]
    lifts: tuple[tuple[int, tuple[int, ...], int], ...]

    @property
    def variables(self) -> tuple[int, ...]:
        """Those that decide it."""
        return tuple(sorted({variable for variable, _ in self.linear} | {variable for variable, _, _ in self.lifts}))


@dataclass(frozen=True)
class Cells:
    """One table: what each of its cells stands for. Parts with the same choices share it.

    Attributes:
        units: (cells,) row of the unit, or `ABSENT`.
        times: (cells,) how often it runs, its block's recursion; 0 where it is absent.
    """

    units: np.ndarray
    times: np.ndarray


@dataclass(frozen=True)
class Parts:
    """All parts of a space's networks.

    Attributes:
        parts: In the order in which they run.
        tables: What `Part.table` points to.
        units: The distinct units that occur; `Cells.units` are rows of it.
    """

    parts: tuple[Part, ...]
    tables: tuple[Cells, ...]
    units: UnitRows


@dataclass(frozen=True)
class _Filled:
    """The cells of a table before all units are known: rows as an `Interner` gives them, and as in `Cells`."""

    rows: np.ndarray
    exists: np.ndarray
    times: np.ndarray


@dataclass(frozen=True)
class Place:
    """A part before its table is made.

    Attributes:
        name: As in `units.plan`.
        stage: Index of its stage; None of stem and head.
        digits: What decides it, the last of them varying fastest.
        fill: Makes the table; the same function for places that share it.
    """

    name: str
    stage: int | None
    digits: tuple[Digit, ...]
    fill: Callable[[Interner], _Filled] = field(repr=False)

    @property
    def cells(self) -> int:
        """Cells of its table."""
        return prod(digit.size for digit in self.digits)

    def part(self, table: int) -> Part:
        """Where its cell is."""
        linear: dict[int, int] = {}
        lifts: list[tuple[int, tuple[int, ...], int]] = []
        step = self.cells
        for digit in self.digits:
            step //= digit.size
            linear |= {variable: stride * step for variable, stride in digit.knobs}
            if digit.top < 0:
                continue
            stride = digit.lift[2] - digit.lift[1]
            if digit.lift == (0, *(stride * i for i in range(len(digit.lift) - 1))):
                linear[digit.top] = stride * step
            else:
                lifts.append((digit.top, digit.lift, step))
        return Part(self.name, table, tuple(linear.items()), tuple(lifts))


def build_parts(space: SearchSpace, io: IOSpec, size_after: SizeAfter, head_of: HeadOf = registry_head_of) -> Parts:
    """What can stand at each place of a space's networks.

    Args:
        space: The space.
        io: What its networks read and answer.
        size_after: Token grids behind stems, downsamples and the head.
        head_of: The head.
    """
    interner = Interner()
    parts: list[Part] = []
    tables: dict[Callable[[Interner], _Filled], tuple[int, _Filled]] = {}
    for place in places(space, io, size_after, head_of):
        if place.fill not in tables:
            tables[place.fill] = len(tables), place.fill(interner)
        parts.append(place.part(tables[place.fill][0]))
    filled = [table for _, table in tables.values()]
    rows, which = distinct(np.concatenate([table.rows[table.exists] for table in filled]), interner.sizes)
    cells, start = [], 0
    for table in filled:
        units = np.full(len(table.rows), ABSENT, dtype=np.int32)
        count = int(table.exists.sum())
        units[table.exists] = which[start : start + count]
        cells.append(Cells(units, np.where(table.exists, table.times, 0)))
        start += count
    return Parts(tuple(parts), tuple(cells), interner.rows(rows))


def places(
    space: SearchSpace, io: IOSpec, size_after: SizeAfter, head_of: HeadOf = registry_head_of
) -> Iterator[Place]:
    """Every place of a space's networks, in the order in which they run; see `build_parts`."""
    return _Places(space, io, size_after, head_of).all()


@dataclass(frozen=True)
class _Grid:
    """The token grid at one place of the network: `sizes`, an array over the positions of the digits that decide it."""

    digits: tuple[Digit, ...]
    sizes: np.ndarray

    @classmethod
    def fixed(cls, size: tuple[int, ...]) -> _Grid:
        sizes = np.empty((), dtype=object)
        sizes[()] = size
        return cls((), sizes)

    def distinct(self) -> list[tuple[int, ...]]:
        return list(dict.fromkeys(self.sizes.ravel()))

    def reduced(self) -> _Grid:
        """The same without digits that do not change it."""
        digits, sizes = list(self.digits), self.sizes
        for axis in reversed(range(len(digits))):
            if all(len(set(column)) == 1 for column in np.moveaxis(sizes, axis, -1).reshape(-1, sizes.shape[axis])):
                digits.pop(axis)
                sizes = sizes.take(0, axis=axis)
        if not digits:
            return _Grid.fixed(np.ravel(sizes)[0] if isinstance(sizes, np.ndarray) else sizes)
        return _Grid(tuple(digits), sizes)


class _Places:
    def __init__(self, space: SearchSpace, io: IOSpec, size_after: SizeAfter, head_of: HeadOf) -> None:
        self.space, self.io, self.size_after, self.head_of = space, io, size_after, head_of
        self.index = {(v.axis, v.stage, v.block, v.option, v.knob): i for i, v in enumerate(space.variables)}
        self.norm = self.digit(space.tree.norm, "norm")

    # -- digits -------------------------------------------------------------------------------------------------------

    def number(self, axis: str, values: Sequence[int], at: _At) -> Digit:
        """A choice of a number."""
        top = self.index.get((axis, *at, "", ""), -1)
        return Digit(axis, tuple(values), top, (0, *range(len(values))) if top >= 0 else ())

    def digit(
        self,
        choice: OpChoice,
        axis: str,
        at: _At = _NOWHERE,
        matters: Callable[[OpOption, str], bool] | None = None,
    ) -> Digit:
        """A choice of an operator and its knobs; a knob that does not matter is left at its first value."""
        top = self.index.get((axis, *at, "", ""), -1)
        ops: list[Op] = []
        starts: list[int] = []
        knobs: list[tuple[int, int]] = []
        for option, label in zip(choice.options, choice.labels, strict=True):
            kept = [(k, vs if matters is None or matters(option, k) else vs[:1]) for k, vs in option.knobs]
            stride = prod(len(vs) for _, vs in kept)
            starts.append(len(ops))
            names = [k for k, _ in kept]
            settings = itertools.product(*(vs for _, vs in kept))
            ops += [Op(option.name, tuple(zip(names, values, strict=True))) for values in settings]
            for k, vs in kept:
                stride //= len(vs)
                if len(vs) > 1:
                    knobs.append((self.index[axis, *at, label, k], stride))
        if top < 0 and knobs:  # one operator: the first of its knobs tells what a choice of operator would
            (top, stride), *knobs = knobs
            starts = [stride * i for i in range(len(self.space.variables[top].values))]
        return Digit(axis, tuple(ops), top, (0, *starts) if top >= 0 else (), tuple(knobs))

    # -- grids --------------------------------------------------------------------------------------------------------

    def after(self, axis: str, op: Op, size: tuple[int, ...], stage: int | None = None) -> tuple[int, ...]:
        """The grid behind a stem or a downsample on a grid of `size`."""
        if stage == 0 and op.name == "none":  # the network has no such unit
            return size
        return self.size_after(axis, op, Context(self.io.in_features, size, self.io.kind, self.io.padded))

    def behind(self, choice: OpChoice, axis: str, stage: int | None, before: _Grid) -> _Grid:
        """The grid behind a stem or a downsample; only the choices that decide it become digits."""
        sizes = before.distinct()

        def after(op: Op) -> tuple[tuple[int, ...], ...]:
            return tuple(self.after(axis, op, size, stage) for size in sizes)

        def matters(option: OpOption, knob: str) -> bool:
            found: dict[tuple[object, ...], set[tuple[tuple[int, ...], ...]]] = {}  # by the other knobs' values
            for values in itertools.product(*(vs for _, vs in option.knobs)):
                knobs = tuple(zip((k for k, _ in option.knobs), values, strict=True))
                rest = tuple(value for k, value in knobs if k != knob)
                found.setdefault(rest, set()).add(after(Op(option.name, knobs)))
            return any(len(results) > 1 for results in found.values())

        digit = self.digit(choice, axis, (stage, None), matters)
        result = np.empty((*before.sizes.shape, digit.size), dtype=object)
        for position, op in enumerate(digit.values):
            assert isinstance(op, Op)
            of = dict(zip(sizes, after(op), strict=True))
            for cell in np.ndindex(before.sizes.shape):
                result[(*cell, position)] = of[before.sizes[cell]]  # type: ignore[index]
        return _Grid((*before.digits, digit), result).reduced()

    # -- places -------------------------------------------------------------------------------------------------------

    def all(self) -> Iterator[Place]:
        tree = self.space.tree
        widths = [self.number("width", stage.width, (s, None)) for s, stage in enumerate(tree.stages)]
        grid = _Grid.fixed(self.io.size)
        yield self.between("stem", None, tree.stem, None, widths[0], grid)
        grid = self.behind(tree.stem, "stem", None, grid)
        for s, stage in enumerate(tree.stages):
            if s > 0 or any(option.name != "none" for option in stage.downsample.options):
                # A stem answers with the first stage's width already.
                yield self.between("downsample", s, stage.downsample, widths[max(s - 1, 0)], widths[s], grid)
                grid = self.behind(stage.downsample, "downsample", s, grid)
            yield from self.blocks(s, stage, widths[s], grid)
        yield self.head(widths[-1], grid)

    def between(
        self, axis: str, stage: int | None, choice: OpChoice, before: Digit | None, after: Digit, grid: _Grid
    ) -> Place:
        """A stem, which has no digit of the width before it, or a downsample."""
        own = self.digit(choice, axis, (stage, None))
        widths = (after,) if before is None or before is after else (before, after)
        digits = (own, *widths, *grid.digits)
        kind, padded = self.io.kind, self.io.padded

        def frame(cell: tuple[int, ...]) -> Unit:
            op, size = own.values[cell[0]], grid.sizes[cell[1 + len(widths) :]]
            wide = [digit.values[position] for digit, position in zip(widths, cell[1:], strict=False)]
            assert isinstance(op, Op)
            inside = self.io.in_features if before is None else wide[0]
            behind = Context(wide[-1], self.after(axis, op, size, stage), kind, padded)  # type: ignore[arg-type]
            tokens = before is None and self.io.tokens
            return Unit(axis, (), Context(inside, size, kind, padded), behind, None, tokens)  # type: ignore[arg-type]

        def fill(interner: Interner) -> _Filled:
            frames = np.empty([digit.size for digit in digits], dtype=np.int32)
            for cell in np.ndindex(frames.shape):
                frames[cell] = interner.frame(frame(cell))
            ops = [interner.filling(0, (axis, op)) for op in own.values]  # type: ignore[arg-type]
            there = [stage != 0 or op.name != "none" for op in own.values]  # type: ignore[union-attr]
            return _filled(digits, frames, {0: _along(digits, own, ops)}, _along(digits, own, there))

        return Place("stem" if stage is None else f"stages.{stage}.downsample", stage, digits, fill)

    def blocks(self, s: int, stage: StageChoice, width: Digit, grid: _Grid) -> Iterator[Place]:
        """The branches of a stage's blocks."""
        depth = self.number("depth", stage.depth, (s, None))
        fills: dict[tuple[object, ...], Callable[[Interner], _Filled]] = {}
        for b in range(max(stage.depth)):
            choice = stage.blocks[b]
            at: _At = (s, None if stage.shared else b)
            branches = [("token", self.token(choice, at))]
            if any(option.name != "none" for option in choice.channel_mixer.options):
                # Of a branch that is never there nothing is a variable of the space, its policy's knobs included.
                branches.append(("channel", self.channel(choice, at)))
            for role, own in branches:
                digits = (self.norm, width, *grid.digits, *own)
                optional = b >= min(stage.depth)
                telling = next((d for d in own if d.top >= 0), None)
                if optional and not stage.shared and telling is not None:
                    digits = tuple(d.or_missing() if d is telling else d for d in digits)
                elif optional:  # nothing that the block chooses for itself tells whether it is there
                    digits = (*digits, depth)
                key = (role, choice, tuple(d.may_miss for d in digits), b if digits[-1] is depth else -1)
                if key not in fills:
                    fills[key] = self.branch(role, digits, width, grid, b)
                yield Place(f"stages.{s}.blocks.{b}.{role}", s, digits, fills[key])

    def token(self, choice: BlockChoice, at: _At) -> tuple[Digit, ...]:
        """What a token branch chooses for itself."""
        ops = (self.digit(getattr(choice, axis), axis, at) for axis in ("mixer", "gate", "quant"))
        return (*ops, self.number("recursion", choice.recursion, at))

    def channel(self, choice: BlockChoice, at: _At) -> tuple[Digit, ...]:
        """What a channel branch chooses for itself, or with its block."""
        quant = "quant" if choice.channel_quant is None else "channel_quant"
        ops = (self.digit(getattr(choice, axis), axis, at) for axis in ("channel_mixer", quant))
        return (*ops, self.number("recursion", choice.recursion, at))

    def branch(
        self, role: str, digits: tuple[Digit, ...], width: Digit, grid: _Grid, b: int
    ) -> Callable[[Interner], _Filled]:
        """Makes the table of a branch of block `b` of its stage."""

        def fill(interner: Interner) -> _Filled:
            exists: np.ndarray = np.ones((), dtype=bool)
            times: np.ndarray = np.ones((), dtype=np.int32)
            columns = {}
            for digit in digits:
                spare = [0] * digit.may_miss
                if digit.axis in _SLOTS:
                    slot = _SLOTS[digit.axis]
                    axis = "quant" if slot == POLICY else digit.axis
                    numbers = [
                        interner.filling(slot, (axis, op) if _is_there(axis, op) else None)  # type: ignore[arg-type]
                        for op in digit.values
                    ]
                    columns[slot] = _along(digits, digit, [*numbers, *spare])
                there = [True] * len(digit.values)
                if digit.axis == "channel_mixer":
                    there = [_is_there(digit.axis, op) for op in digit.values]  # type: ignore[arg-type]
                elif digit.axis == "depth":
                    there = [depth > b for depth in digit.values]  # type: ignore[operator]
                elif digit.axis == "recursion":
                    times = _along(digits, digit, [*digit.values, *spare])
                exists = exists & _along(digits, digit, [*there, *(False for _ in spare)])
            frames = self.frames(interner, role, width, grid, lambda context: context)
            return _filled(digits, _over(digits, (width, *grid.digits), frames), columns, exists, times)

        return fill

    def frames(
        self, interner: Interner, role: str, width: Digit, grid: _Grid, after: Callable[[Context], Context]
    ) -> np.ndarray:
        """Frames of a role, an array over the width and the grid's digits."""
        frames = np.empty((width.size, *grid.sizes.shape), dtype=np.int32)
        for position, wide in enumerate(width.values):
            for cell in np.ndindex(grid.sizes.shape):
                context = Context(wide, grid.sizes[cell], self.io.kind, self.io.padded)  # type: ignore[arg-type]
                frames[(position, *cell)] = interner.frame(Unit(role, (), context, after(context)))
        return frames

    def head(self, width: Digit, grid: _Grid) -> Place:
        """The head."""
        digits = (self.norm, width, *grid.digits)
        head = self.head_of(self.io)

        def after(context: Context) -> Context:
            return self.io.after(self.size_after("head", head, context))

        def fill(interner: Interner) -> _Filled:
            norms = [interner.filling(0, ("norm", op)) for op in self.norm.values]  # type: ignore[arg-type]
            columns = {0: _along(digits, self.norm, norms), 1: np.array(interner.filling(1, ("head", head)))}
            frames = self.frames(interner, "head", width, grid, after)
            return _filled(digits, _over(digits, (width, *grid.digits), frames), columns, np.array(True))

        return Place("head", None, digits, fill)


def _is_there(axis: str, op: Op) -> bool:
    """Whether it makes a unit: without a channel mixer there is no channel branch."""
    return axis != "channel_mixer" or op.name != "none"


def _along(digits: Sequence[Digit], digit: Digit, values: Sequence[int]) -> np.ndarray:
    """Values of a digit's positions, shaped such that they broadcast over all digits."""
    return _over(digits, (digit,), np.array(values))


def _over(digits: Sequence[Digit], some: Sequence[Digit], values: np.ndarray) -> np.ndarray:
    """An array over some of the digits, in their order, shaped such that it broadcasts over all."""
    return values.reshape([digit.size if any(digit is d for d in some) else 1 for digit in digits])


def _filled(
    digits: Sequence[Digit],
    frames: np.ndarray,
    columns: dict[int, np.ndarray],
    exists: np.ndarray,
    times: np.ndarray | None = None,
) -> _Filled:
    """A table from what its cells have by digit; `columns` are fillings by slot."""
    shape = [digit.size for digit in digits]

    def flat(values: np.ndarray) -> np.ndarray:
        return np.broadcast_to(values, shape).ravel()

    rows = np.zeros((prod(shape), WIDTH), dtype=np.int32)
    rows[:, 0] = flat(frames)
    for slot, column in columns.items():
        rows[:, 1 + slot] = flat(column)
    return _Filled(rows, flat(exists), flat(np.ones((), dtype=np.int32) if times is None else times))
