"""Many units at once: each distinct operator and frame once, and a unit as a short row of integers.

A space of many operators has a hundred thousand units. As objects they would take seconds to make and megabytes to
keep; as rows they are one array, and what is known of operators becomes known of units by adding up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from mixnas.predictors.latency.model import Columns
from mixnas.search_space.architecture import Op
from mixnas.search_space.units import Unit, describe_frame, describe_op

SLOTS = 4
"""Places for operators in a unit: up to three, in the order in which they are built, and the policy in the last."""
POLICY = SLOTS - 1
WIDTH = 1 + SLOTS
"""Integers of a row: its frame, and what stands in each slot."""

Filling = tuple[str, Op] | None
"""What stands in a slot: (axis, operator), or nothing."""

_CHUNK = 8192


def frame_of(unit: Unit) -> Unit:
    """A unit without its operators: role, contexts, and whether it reads integers."""
    return Unit(unit.role, (), unit.before, unit.after, None, unit.tokens)


def fillings(unit: Unit) -> list[Filling]:
    """What stands in the slots of a unit."""
    found: list[Filling] = [*unit.ops, *(None,) * (POLICY - len(unit.ops))]
    return [*found, None if unit.quant is None else ("quant", unit.quant)]


@dataclass(frozen=True)
class UnitRows:
    """A list of distinct units.

    Attributes:
        frames: The distinct frames, see `frame_of`.
        slots: For each slot what may stand in it, nothing (None) first.
        rows: (units, `WIDTH`) int32: indices into `frames` and into each of `slots`.
    """

    frames: tuple[Unit, ...]
    slots: tuple[tuple[Filling, ...], ...]
    rows: np.ndarray

    @classmethod
    def of(cls, units: Iterable[Unit]) -> UnitRows:
        """The distinct ones of these units, in their order."""
        found = Interner()
        rows = list(dict.fromkeys(found.row(unit) for unit in units))
        return found.rows(np.array(rows, dtype=np.int32).reshape(-1, WIDTH))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Unit:
        frame, *filled = self.rows[index]
        frame_unit = self.frames[frame]
        *ops, quant = (slot[i] for slot, i in zip(self.slots, filled, strict=True))
        return Unit(
            frame_unit.role,
            tuple(op for op in ops if op is not None),
            frame_unit.before,
            frame_unit.after,
            None if quant is None else quant[1],
            frame_unit.tokens,
        )

    def __iter__(self) -> Iterator[Unit]:
        return (self[i] for i in range(len(self)))

    def take(self, index: np.ndarray | slice) -> UnitRows:
        """Some of them."""
        return UnitRows(self.frames, self.slots, self.rows[index])

    def chunks(self) -> Iterator[tuple[slice, UnitRows]]:
        """All of them in portions, for work that takes much memory per unit."""
        for start in range(0, len(self), _CHUNK):
            part = slice(start, start + _CHUNK)
            yield part, self.take(part)

    # -- finding --------------------------------------------------------------------------------------------------

    @property
    def _sizes(self) -> list[int]:
        return [len(self.frames), *map(len, self.slots)]

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        keys = packed(self.rows, self._sizes)
        order = np.argsort(keys, kind="stable")
        return keys[order], order

    @cached_property
    def _ids(self) -> list[dict[Any, int]]:
        return [{entry: i for i, entry in enumerate(entries)} for entries in (self.frames, *self.slots)]

    def find(self, unit: Unit) -> int:
        """The row of a unit; -1 where it is not among them."""
        parts = (frame_of(unit), *fillings(unit))
        ids = [known.get(part, -1) for known, part in zip(self._ids, parts, strict=True)]
        return -1 if min(ids) < 0 else int(self._rows_at(packed(np.array([ids]), self._sizes))[0])

    def find_all(self, others: UnitRows) -> np.ndarray:
        """(others,) the row of each of other units; -1 where it is not among these."""
        entries = (others.frames, *others.slots)
        maps = [np.array([known.get(e, -1) for e in own]) for known, own in zip(self._ids, entries, strict=True)]
        ids = np.stack([m[column] for m, column in zip(maps, others.rows.T, strict=True)], axis=1)
        unknown = (ids < 0).any(axis=1)
        return np.where(unknown, -1, self._rows_at(packed(np.maximum(ids, 0), self._sizes)))

    def _rows_at(self, keys: np.ndarray) -> np.ndarray:
        known, order = self._sorted
        if not len(known):
            return np.full(len(keys), -1)
        at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        return np.where(known[at] == keys, order[at], -1)

    def joined(self, *others: UnitRows) -> UnitRows:
        """These units and then those of the others that are not among them."""
        found = Interner()
        rows = distinct(np.concatenate([found.rows_of(units) for units in (self, *others)]), found.sizes)[0]
        return found.rows(rows)

    # -- what they are --------------------------------------------------------------------------------------------

    def described(self) -> Columns:
        """The settings of each unit (`units.describe`) as columns."""
        parts = [[describe_frame(frame) for frame in self.frames]]
        parts += [[{} if entry is None else describe_op(*entry) for entry in slot] for slot in self.slots]
        return Columns.summed(parts, self.rows)

    def described_names(self) -> tuple[str, ...]:
        """The names of the columns of `described`."""
        return self.take(slice(0)).described().names

    # -- files ----------------------------------------------------------------------------------------------------

    def to_plain(self) -> dict[str, Any]:
        """Frames and slots as plain data; `rows` is kept apart, as an array."""
        slots = [[None if e is None else [e[0], e[1].to_plain()] for e in slot] for slot in self.slots]
        return {"frames": [frame.to_plain() for frame in self.frames], "slots": slots}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], rows: np.ndarray) -> UnitRows:
        """The inverse of `to_plain`."""
        frames = tuple(Unit.from_plain(frame) for frame in plain["frames"])
        slots = tuple(
            tuple(None if e is None else (e[0], Op.from_plain(e[1])) for e in slot) for slot in plain["slots"]
        )
        return cls(frames, slots, rows)


class Interner:
    """Gives frames and operators their numbers; see `UnitRows`."""

    def __init__(self) -> None:
        self.frames: dict[Unit, int] = {}
        self.slots: tuple[dict[Filling, int], ...] = tuple({None: 0} for _ in range(SLOTS))

    @property
    def sizes(self) -> list[int]:
        """How many frames there are, and how many fillings of each slot."""
        return [len(self.frames), *map(len, self.slots)]

    def frame(self, frame: Unit) -> int:
        """The number of a frame."""
        return self.frames.setdefault(frame, len(self.frames))

    def filling(self, slot: int, filling: Filling) -> int:
        """The number of a filling of a slot."""
        return self.slots[slot].setdefault(filling, len(self.slots[slot]))

    def row(self, unit: Unit) -> tuple[int, ...]:
        """The row of a unit."""
        filled = (self.filling(slot, filling) for slot, filling in enumerate(fillings(unit)))
        return (self.frame(frame_of(unit)), *filled)

    def rows_of(self, units: UnitRows) -> np.ndarray:
        """The rows of other units, in these numbers."""
        frames = np.array([self.frame(frame) for frame in units.frames], dtype=np.int32)
        columns = [frames[units.rows[:, 0]]] if len(frames) else [units.rows[:, 0]]
        for slot, entries in enumerate(units.slots):
            numbers = np.array([self.filling(slot, entry) for entry in entries], dtype=np.int32)
            columns.append(numbers[units.rows[:, 1 + slot]])
        return np.stack(columns, axis=1)

    def rows(self, rows: np.ndarray) -> UnitRows:
        """The units of rows in these numbers."""
        return UnitRows(tuple(self.frames), tuple(map(tuple, self.slots)), rows)


def packed(rows: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """(rows,) one integer for each row, equal for equal rows.

    A slot has few fillings and a space at most some millions of cells, so 63 bits hold all of it.
    """
    assert prod(sizes) < 1 << 63, "more combinations of operators than an integer holds"
    keys = np.zeros(len(rows), dtype=np.int64)
    for column, size in zip(rows.T, sizes, strict=True):
        keys = keys * size + column
    return keys


def distinct(rows: np.ndarray, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows in the order in which they first stand, and for each row which of them it is."""
    _, first, inverse = np.unique(packed(rows, sizes), return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return rows[first[order]], rank[inverse.reshape(-1)]
