"""Latency of many encoded architectures at once: every part of a network becomes one number looked up in a table.

`parts` says which unit stands in which cell; here the cells get their milliseconds. The indices of all parts of a
million architectures are one matrix product; then each part is one gather. No network, unit or architecture is built.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from mixnas.predictors.latency.boundaries import Boundaries
from mixnas.predictors.latency.model import LEAST_SHARE
from mixnas.predictors.latency.parts import Parts, Place, build_parts, places
from mixnas.predictors.latency.unit_rows import UnitRows
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.grammar import BlockChoice, OpChoice, OpOption, SpaceTree, StageChoice
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import HeadOf, IOSpec, SizeAfter, registry_head_of, registry_size_after

MAX_CELLS = 1 << 22
"""Cells of all tables of a space together: 4 bytes each, and 8 for every 64 operators. Single precision holds them."""

_CHUNK = 1 << 18  # values of architectures at a time: as many as stay in a core's cache
_LEAST = 512  # architectures at a time
_GROUP = 4  # parts whose indices are one matrix product
_WORD = 64  # operators whose presence one integer tells


def network_input(io: IOSpec) -> IOSpec:
    """An input as far as it decides what a network takes: without the targets' grid and the inputs' mean and spread."""
    if io.out_size is None and io.mean is None and io.std is None:  # each prediction asks, and a copy is checked anew
        return io
    return replace(io, out_size=None, mean=None, std=None)


class SpaceUnits:
    """A space with an input, and which unit stands where in its networks (worked out when it is first asked for).

    Attributes:
        space: The space.
        io: What its networks read and answer, see `network_input`.
        written_as: Digests of the texts that it was written as (`predictor.plain_digest`).
    """

    def __init__(
        self,
        space: SearchSpace,
        io: IOSpec,
        written_as: tuple[str, ...] = (),
        size_after: SizeAfter = registry_size_after,
        head_of: HeadOf = registry_head_of,
    ) -> None:
        self.space, self.io, self.written_as = space, network_input(io), written_as
        self._size_after, self._head_of = size_after, head_of

    @cached_property
    def parts(self) -> Parts:
        """See `parts.build_parts`.

        Raises:
            ConfigError: See `check_tables`.
        """
        _check(self.space, places(self.space, self.io, self._size_after, self._head_of))
        return build_parts(self.space, self.io, self._size_after, self._head_of)

    @property
    def units(self) -> UnitRows:
        """The distinct units of its networks."""
        return self.parts.units

    def is_of(self, space: SearchSpace, io: IOSpec) -> bool:
        """Whether it is of this space and input."""
        return self.io == network_input(io) and (self.space is space or self.space.tree == space.tree)


class SpaceTable:
    """The look-up tables of a space's networks.

    Args:
        of: The space.
        unit_ms: (units,) latency of each of `of.units` in a network; NaN where one cannot be built.
        has: (units, operators) boolean: which of the operators that are told by their presence each unit has.
        presence_ms: (operators, operators) what a network takes beside that, once, see `Composition`.
        boundaries: What it takes beside that where the policy changes; None for nothing.
    """

    def __init__(
        self,
        of: SpaceUnits,
        unit_ms: np.ndarray,
        has: np.ndarray,
        presence_ms: np.ndarray,
        boundaries: Boundaries | None = None,
    ) -> None:
        self.space = of.space
        parts, tables = of.parts.parts, of.parts.tables
        lifts = list(dict.fromkeys((variable, lift) for part in parts for variable, lift, _ in part.lifts))
        self._lifted = np.array([variable for variable, _ in lifts], dtype=np.intp)
        self._lift_starts = _starts([len(lift) for _, lift in lifts])[:, None] + 1
        self._lift = np.array([position for _, lift in lifts for position in lift], dtype=np.float32)
        first_lift = len(self.space.variables)
        strides = np.zeros((len(parts), first_lift + len(lifts)), dtype=np.float32)
        for p, part in enumerate(parts):
            for variable, stride in part.linear:
                strides[p, variable] = stride
            for variable, lift, stride in part.lifts:
                strides[p, first_lift + lifts.index((variable, lift))] = stride
        # Few columns decide a part; a few parts at a time have most of them in common.
        self._groups = []
        for first in range(0, len(parts), _GROUP):
            group = slice(first, first + _GROUP)
            used = np.flatnonzero(strides[group].any(axis=0))
            self._groups.append((group, used, np.ascontiguousarray(strides[group][:, used])))
        sizes = [len(cells.units) for cells in tables]
        starts = _starts(sizes)
        self._starts = np.array([starts[part.table] for part in parts])[:, None]
        units, times = (np.concatenate([getattr(cells, name) for cells in tables]) for name in ("units", "times"))
        self._ms = (np.append(unit_ms, 0.0)[units] * times).astype(np.float32)  # row -1: the part is not there
        codes = np.empty(0, dtype=np.int8) if boundaries is None else boundaries.codes(of.units)
        self._boundaries = boundaries if boundaries is not None and boundaries.matter(codes) else None
        self._codes = codes[units] if self._boundaries is not None else codes
        self._words = []
        for word in _words(has):
            bits = np.append(word, np.uint64(0))[units]
            some = [
                p for p, part in enumerate(parts) if bits[starts[part.table] :][: len(tables[part.table].units)].any()
            ]
            self._words.append((bits, np.array(some, dtype=np.intp)))
        self._operators = has.shape[1]
        # Rounded so that its sums are exact, in whatever order a matrix product adds them up.
        step = np.ldexp(1.0, int(np.frexp(np.abs(presence_ms).max(initial=0.0))[1]) - 30)
        self._presence_ms = np.round(presence_ms / step) * step

    def predict_many(self, encoded: np.ndarray) -> np.ndarray:
        """Encoded architectures of the space (rows, variables) to milliseconds (rows,)."""
        encoded = np.asarray(encoded)
        if encoded.ndim != 2 or encoded.shape[1] != len(self.space.variables):
            raise ConfigError(
                f"encoded architectures of shape {encoded.shape}; this space has {len(self.space.variables)} variables."
            )
        result = np.empty(len(encoded))
        count = min(max(_CHUNK // max(encoded.shape[1], 1), _LEAST), len(encoded))
        if not count:
            return result
        starts = range(0, len(encoded), count)
        workers = min(4, os.cpu_count() or 1, len(starts))

        def work(first: int) -> None:
            scratch = _Scratch(self, max(count, 2))
            for start in starts[first::workers]:
                rows = encoded[start : start + count]
                if len(rows) == 1:  # NumPy adds up a single column in another order
                    rows = rows.repeat(2, axis=0)
                if len(rows) != scratch.count:
                    scratch = _Scratch(self, len(rows))
                result[start : start + count] = self._predict(rows, scratch)[: len(result) - start]

        if workers == 1:
            work(0)
        else:  # NumPy lets go of the interpreter in each of these operations
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(work, range(workers)))
        return result

    def _predict(self, rows: np.ndarray, scratch: _Scratch) -> np.ndarray:
        values, columns, index, total = scratch.values, scratch.columns, scratch.index, scratch.total
        np.copyto(scratch.rows, rows, casting="same_kind")
        np.copyto(values, scratch.rows.T)
        if len(self._lifted):
            at = values[self._lifted] + self._lift_starts
            self._lift.take(at, mode="clip", out=columns[len(values) :])
        columns[: len(values)] = np.multiply(values, values >= 0, out=values)  # quicker than `maximum`
        for group, used, strides in self._groups:
            np.matmul(strides, columns[used], out=scratch.cells[group])
        # Single precision is exact here: an index is below 2^24.
        np.copyto(index, scratch.cells, casting="unsafe")
        index += self._starts
        self._ms.take(index, mode="clip", out=scratch.ms).sum(axis=0, out=total)
        least = LEAST_SHARE * total
        if self._boundaries is not None:
            total += self._boundaries.summed(self._codes.take(index, mode="clip"))
        present = np.empty((len(total), self._operators))
        for w, (bits, some) in enumerate(self._words):
            mask = np.bitwise_or.reduce(bits.take(index[some], mode="clip"), axis=0)
            here = present[:, w * _WORD : (w + 1) * _WORD]
            # Little-endian, so that the first bytes hold the first operators.
            low = mask.astype("<u8", copy=False).view(np.uint8).reshape(-1, 8)[:, : -(-here.shape[1] // 8)]
            here[:] = np.unpackbits(low, axis=1, count=here.shape[1], bitorder="little")
        total += ((present @ self._presence_ms) * present).sum(axis=1)
        return np.maximum(total, least, out=total)


class _Scratch:
    """What a thread works in, for so many architectures at a time: memory asked for anew each time costs more."""

    def __init__(self, table: SpaceTable, count: int) -> None:
        variables, parts = len(table.space.variables), len(table._starts)
        self.count = count
        most = max((len(variable.values) for variable in table.space.variables), default=0)
        dtype = np.int8 if most < 128 else np.int16
        self.rows, self.values = np.empty((count, variables), dtype), np.empty((variables, count), dtype)
        self.columns = np.empty((variables + len(table._lifted), count), dtype=np.float32)
        self.cells, self.ms = (np.empty((parts, count), dtype=np.float32) for _ in range(2))
        self.index = np.empty((parts, count), dtype=np.intp)
        self.total = np.empty(count, dtype=np.float32)


def _starts(sizes: Sequence[int]) -> np.ndarray:
    """Where each of several arrays starts that stand one behind the other."""
    return np.cumsum([0, *sizes])[:-1]


def _words(has: np.ndarray) -> list[np.ndarray]:
    """Which operators units have, as bits of words (units,): the first `_WORD` operators in the first."""
    words = []
    for start in range(0, has.shape[1], _WORD):
        word = np.zeros(len(has), dtype=np.uint64)
        for bit, column in enumerate(has[:, start : start + _WORD].T):
            word |= column.astype(np.uint64) << np.uint64(bit)
        words.append(word)
    return words


def check_tables(space: SearchSpace, io: IOSpec) -> None:
    """Refuse a space whose look-up tables would not fit in memory, before anything is profiled.

    Raises:
        ConfigError: They have more than `MAX_CELLS` cells; the message says where, and what to do.
    """
    _check(space, places(space, io, registry_size_after))


def _check(space: SearchSpace, found: Iterable[Place]) -> None:
    tables = {place.fill: place for place in reversed(list(found))}  # of places that share a table the first
    total = sum(place.cells for place in tables.values())
    if total <= MAX_CELLS:
        return
    largest = max(tables.values(), key=lambda place: place.cells)
    digits = sorted(largest.digits, key=lambda digit: digit.size, reverse=True)
    factors = " x ".join(f"{len(digit.values)} of {digit.axis}" for digit in digits if len(digit.values) > 1)
    axis = digits[0].axis
    where = axis if axis in ("norm", "stem") or largest.stage is None else f"stages[{largest.stage}], {axis}"
    raise ConfigError(
        f"{space.source}: the tables that latency is looked up in would have {total:,} cells; allowed are "
        f"{MAX_CELLS:,}. {largest.name} alone has {largest.cells:,}: {factors}. Give fewer choices at {where} (each "
        "combination of an operator's knobs is one), or fewer widths, policies or norms."
    )


def tree_to_plain(tree: SpaceTree) -> dict[str, Any]:
    """A space as plain data that is read back without the registry of operators (which needs torch)."""
    return asdict(tree)


def tree_from_plain(plain: Mapping[str, Any]) -> SpaceTree:
    """The inverse of `tree_to_plain`."""

    def op(p: Mapping[str, Any]) -> OpChoice:
        options = tuple(OpOption(o["name"], tuple((k, tuple(vs)) for k, vs in o["knobs"])) for o in p["options"])
        return OpChoice(options, tuple(p["labels"]))

    def block(p: Mapping[str, Any]) -> BlockChoice:
        ops = {f.name: p[f.name] for f in fields(BlockChoice) if f.name != "recursion"}
        chosen = {name: None if choice is None else op(choice) for name, choice in ops.items()}
        return BlockChoice(**chosen, recursion=tuple(p["recursion"]))  # type: ignore[arg-type]

    def stage(p: Mapping[str, Any]) -> StageChoice:
        blocks = tuple(block(b) for b in p["blocks"])
        return StageChoice(tuple(p["width"]), op(p["downsample"]), tuple(p["depth"]), blocks, p["shared"])

    return SpaceTree(op(plain["stem"]), op(plain["norm"]), tuple(stage(s) for s in plain["stages"]))
