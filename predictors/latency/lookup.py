"""Latency of many encoded architectures at once: every part of a network becomes one number looked up in a table.

What a part of a network is (its unit) depends on a few variables of the space. `SpaceTable` holds, per part, an index
that is linear in the encoded vector, so that the indices of all parts of a million architectures are one matrix
product; then each part is one gather. No network, unit or architecture is built.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import numpy as np

from mixnas.predictors.units import Key
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.grammar import BlockChoice, OpChoice, OpOption, SpaceTree, StageChoice
from mixnas.search_space.space import INACTIVE, SearchSpace

MAX_CELLS = 1 << 23
MAX_UNITS = 20_000
_CHUNK = 1 << 14
_DIGIT = 12


def signature(space: SearchSpace, io: Mapping[str, Any]) -> str:
    """What a table of a space is good for: the space's choices and the input."""
    return hashlib.sha256(f"{space.tree!r} {sorted(io.items())!r}".encode()).hexdigest()[:16]


def tree_to_plain(tree: SpaceTree) -> dict[str, Any]:
    """A space as plain data that is read back without the registry of operators (which needs torch)."""
    return asdict(tree)


def tree_from_plain(plain: Mapping[str, Any]) -> SpaceTree:
    """The inverse of `tree_to_plain`."""

    def op(p: Mapping[str, Any]) -> OpChoice:
        options = tuple(OpOption(o["name"], tuple((k, tuple(vs)) for k, vs in o["knobs"])) for o in p["options"])
        return OpChoice(options, tuple(p["labels"]))

    def block(p: Mapping[str, Any]) -> BlockChoice:
        axes = {axis: op(p[axis]) for axis in ("mixer", "gate", "channel_mixer", "quant")}
        return BlockChoice(**axes, recursion=tuple(p["recursion"]))

    def stage(p: Mapping[str, Any]) -> StageChoice:
        blocks = tuple(block(b) for b in p["blocks"])
        return StageChoice(tuple(p["width"]), op(p["downsample"]), tuple(p["depth"]), blocks, p["shared"])

    return SpaceTree(op(plain["stem"]), op(plain["norm"]), tuple(stage(s) for s in plain["stages"]))


@dataclass(frozen=True)
class Part:
    """One part of a network.

    Attributes:
        name: Its place, as in `Unit.name`.
        columns: Variables that decide its unit.
        strides: (columns,) index = offset + strides @ values, inactive values being -1.
        offset: See strides.
        cells: (entries,) the indices that occur.
        units: (entries,) row of the unit list that each stands for; -1 where the part does not exist.
    """

    name: str
    columns: np.ndarray
    strides: np.ndarray
    offset: int
    cells: np.ndarray
    units: np.ndarray


class SpaceTable:
    """The look-up tables of one space and input. Made by `build_parts`; bound to unit latencies by `bind`."""

    def __init__(self, space: SearchSpace, io: Mapping[str, Any], parts: list[Part]) -> None:
        self.space, self.io, self.parts = space, dict(io), parts
        self.signature = signature(space, self.io)
        self._strides = np.zeros((len(space.variables), len(parts)), dtype=np.float32)
        for p, part in enumerate(parts):
            self._strides[part.columns, p] = part.strides
        self._tables: list[np.ndarray] = []
        self._masks: list[np.ndarray | None] = []
        self._presence: list[tuple[int, np.ndarray]] = []

    def bind(self, unit_ms: np.ndarray, masks: Sequence[int], presence_ms: np.ndarray) -> None:
        """Fill the tables.

        Args:
            unit_ms: (units,) latency of each unit in a network.
            masks: (units,) the operators of each unit as bits.
            presence_ms: (operators,) what a network with the operator takes beside that, once.
        """
        if len(presence_ms) > 63:
            raise ConfigError(f"{len(presence_ms)} operators on the axes of a block; at most 63 are told apart.")
        width = np.uint16 if len(presence_ms) <= 16 else np.uint64
        extended = np.append(unit_ms, 0.0)  # row -1: the part does not exist
        bits = np.array([*masks, 0], dtype=width)
        self._tables, self._masks = [], []
        for part in self.parts:
            table = np.full(int(part.cells.max()) + 1, np.nan, dtype=np.float32)
            table[part.cells] = extended[part.units]
            self._tables.append(table)
            own = np.zeros(len(table), dtype=width)
            own[part.cells] = bits[part.units]
            self._masks.append(own if own.any() else None)
        self._presence = []
        for first in range(0, len(presence_ms), _DIGIT):
            values = presence_ms[first : first + _DIGIT]
            digits = np.arange(1 << len(values))[:, None] >> np.arange(len(values)) & 1
            self._presence.append((first, (digits @ values).astype(np.float32)))

    def predict_many(self, encoded: np.ndarray) -> np.ndarray:
        """Encoded architectures (rows, variables) to milliseconds (rows,). NaN for a vector not of this space."""
        encoded = np.asarray(encoded)
        if encoded.ndim != 2 or encoded.shape[1] != len(self.space.variables):
            raise ConfigError(
                f"encoded architectures of shape {encoded.shape}; this space has {len(self.space.variables)} variables."
            )
        result = np.empty(len(encoded))
        starts = range(0, len(encoded), _CHUNK)

        def work(start: int) -> None:
            result[start : start + _CHUNK] = self._predict(encoded[start : start + _CHUNK])

        if len(starts) < 2:
            for start in starts:
                work(start)
        else:  # NumPy lets go of the interpreter in each of these operations
            with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
                list(pool.map(work, starts))
        return result

    def _predict(self, rows: np.ndarray) -> np.ndarray:
        # Single precision is exact here: an index is below 2^23.
        offsets = np.array([part.offset for part in self.parts], dtype=np.float32)
        index = np.ascontiguousarray((rows.astype(np.float32) @ self._strides + offsets).T, dtype=np.intp)
        total = np.zeros(len(rows), dtype=np.float32)
        mask: np.ndarray | None = None
        for table, bits, own in zip(self._tables, self._masks, index, strict=True):
            total += table.take(own, mode="clip")
            if bits is not None:
                found = bits.take(own, mode="clip")
                mask = found if mask is None else np.bitwise_or(mask, found, out=mask)
        for first, values in self._presence if mask is not None else ():
            assert mask is not None
            digit = (mask >> mask.dtype.type(first)) & mask.dtype.type(len(values) - 1)
            total += values.take(digit.astype(np.intp), mode="clip")
        return total

    def to_plain(self) -> dict[str, Any]:
        """What the file's JSON holds of it; arrays are kept apart by `to_arrays`."""
        parts = [{"name": part.name, "offset": part.offset} for part in self.parts]
        return {"tree": tree_to_plain(self.space.tree), "io": self.io, "signature": self.signature, "parts": parts}

    def to_arrays(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays by name."""
        return {
            f"{prefix}.{p}.{field}": getattr(part, field)
            for p, part in enumerate(self.parts)
            for field in ("columns", "strides", "cells", "units")
        }

    @classmethod
    def restore(cls, plain: Mapping[str, Any], arrays: Mapping[str, np.ndarray], prefix: str) -> SpaceTable:
        """The inverse of `to_plain` and `to_arrays`."""
        space = SearchSpace(tree_from_plain(plain["tree"]), "stored space")
        parts = []
        for p, part in enumerate(plain["parts"]):
            fields = {f: arrays[f"{prefix}.{p}.{f}"] for f in ("columns", "strides", "cells", "units")}
            parts.append(Part(name=part["name"], offset=int(part["offset"]), **fields))
        table = cls(space, plain["io"], parts)
        if table.signature != plain["signature"]:
            raise ValueError("a stored space is not what its signature says")
        return table


def _indexing(space: SearchSpace, columns: list[int]) -> tuple[np.ndarray, int, int]:
    """Strides, offset and number of cells of an index that differs wherever active values differ.

    A choice of operator and the knobs under it are one digit: `c x option + sum(stride x knob)`. Inactive knobs are -1
    and so add a constant per option; with c at least twice the most settings an option has, options do not overlap.
    """
    variables = space.variables
    inside = set(columns)
    children: dict[int, list[int]] = {c: [] for c in columns}
    tops = []
    for c in columns:
        parent = variables[c].parent
        is_knob = parent in inside and not variables[parent].name.endswith(".depth")
        if is_knob:
            children[parent].append(c)
        else:
            tops.append(c)
    strides = dict.fromkeys(columns, 0)
    offset, cells = 0, 1
    for top in tops:
        reach = 1
        by_option: dict[frozenset[int], int] = {}
        for knob in children[top]:
            options = variables[knob].parent_options
            strides[knob] = by_option.get(options, 1)
            by_option[options] = strides[knob] * len(variables[knob].values)
            reach = max(reach, by_option[options])
        step = 2 * reach if children[top] else 1
        lowest = step + sum(strides[knob] for knob in children[top])  # of an inactive choice
        digits = lowest + step * len(variables[top].values)
        strides[top] = step
        for c in (top, *children[top]):
            strides[c] *= cells
        offset += lowest * cells
        cells *= digits
    return np.array([strides[c] for c in columns], dtype=np.int64), offset, cells


def _assignments(space: SearchSpace, columns: list[int]) -> np.ndarray:
    """Every combination of values of these variables that can occur, (rows, columns), inactive ones -1."""
    rows: list[dict[int, int]] = [{}]
    for c in columns:
        variable = space.variables[c]
        extended = []
        for row in rows:
            alive = (
                variable.parent < 0 or variable.parent not in columns or row[variable.parent] in variable.parent_options
            )
            extended += [{**row, c: v} for v in (range(len(variable.values)) if alive else (INACTIVE,))]
        rows = extended
    return np.array([[row[c] for c in columns] for row in rows], dtype=np.int64).reshape(len(rows), len(columns))


Walk = Callable[[Architecture], list[tuple[str, Key]]]


def _under(space: SearchSpace, *prefixes: str) -> set[int]:
    """The variables at these paths and below."""
    return {i for i, v in enumerate(space.variables) if any(f"{v.name}.".startswith(f"{p}.") for p in prefixes)}


def _deciding(space: SearchSpace, name: str, sizes_vary: list[bool]) -> list[int]:
    """The variables that decide the unit at a place."""
    stages = space.tree.stages

    def under(*prefixes: str) -> set[int]:
        return _under(space, *prefixes)

    def size_of(stage: int) -> set[int]:
        return under("stem", *(f"stages.{s}.downsample" for s in range(stage + 1))) if sizes_vary[stage] else set()

    if name == "stem":
        found = under("stem", "stages.0.width")
    elif name == "head":
        last = len(stages) - 1
        found = under("norm", f"stages.{last}.width") | size_of(last)
    else:
        s = int(name.split(".")[1])
        if name.endswith(".downsample"):
            found = under(name, f"stages.{s}.width", f"stages.{s - 1}.width")
            found |= size_of(s - 1) if s else under("stem")
        else:
            b = int(name.split(".")[3])
            own = under(f"stages.{s}.block" if stages[s].shared else name)
            found = own | under("norm", f"stages.{s}.width") | size_of(s)
            if b >= min(stages[s].depth) and (stages[s].shared or not own):  # otherwise its own variables tell
                found |= under(f"stages.{s}.depth")
    return sorted(found)


def _sizes_vary(space: SearchSpace, walk_one: Walk) -> list[bool]:
    """Per stage, whether its token grid depends on which stem and downsamples are chosen."""
    result = []
    for s in range(len(space.tree.stages)):
        columns = _under(space, "stem", *(f"stages.{i}.downsample" for i in range(s + 1)))
        sizes = set()
        for values in _assignments(space, sorted(columns)):
            vector = np.zeros(len(space.variables), dtype=np.int64)
            vector[sorted(columns)] = values
            sizes.add(dict(walk_one(space.decode(np.maximum(vector, 0))))[f"stages.{s}.blocks.0"].before.size)
        result.append(len(sizes) > 1)
    return result


def _num_assignments(space: SearchSpace, columns: list[int]) -> int:
    total = 1
    for c in columns:
        variable = space.variables[c]
        if variable.parent in columns and not space.variables[variable.parent].name.endswith(".depth"):
            continue
        knobs = [k for k in columns if space.variables[k].parent == c]
        total *= sum(
            prod(len(space.variables[k].values) for k in knobs if v in space.variables[k].parent_options)
            for v in range(len(variable.values))
        )
    return total


def build_parts(space: SearchSpace, walk_one: Walk) -> tuple[list[Part], list[Key]]:
    """Enumerate what can stand at each place of a space's networks.

    Args:
        space: The space.
        walk_one: An architecture to its units by place.

    Returns:
        The parts, and the list of distinct units that their `units` point into.

    Raises:
        ConfigError: The parts have more than `MAX_UNITS` settings, or an index would be too long.
    """
    variables = space.variables
    deepest = np.array([len(v.values) - 1 if v.name.endswith(".depth") else 0 for v in variables], dtype=np.int64)
    for i, variable in enumerate(variables):
        if variable.name.endswith(".depth"):
            deepest[i] = int(np.argmax(variable.values))
    vary = _sizes_vary(space, walk_one)
    names = ["stem"]
    for s, stage in enumerate(space.tree.stages):
        names += [f"stages.{s}.downsample"] + [f"stages.{s}.blocks.{b}" for b in range(max(stage.depth))]
    names.append("head")
    keys: dict[Key, int] = {}
    parts = []
    entries = 0
    for name in names:
        columns = _deciding(space, name, vary)
        strides, offset, cells = _indexing(space, columns)
        entries += _num_assignments(space, columns)
        if cells > MAX_CELLS or entries > MAX_UNITS:
            raise ConfigError(
                f"{space.source}: the parts of its networks have too many settings to tabulate (at {name}: {entries}, "
                f"allowed are {MAX_UNITS}). Give choices to fewer knobs, or share them in a stage."
            )
        found: dict[int, int] = {}
        for values in _assignments(space, columns):
            vector = deepest.copy()
            vector[columns] = values
            key = dict(walk_one(space.decode(np.maximum(vector, 0)))).get(name)
            found[offset + int(strides @ values)] = -1 if key is None else keys.setdefault(key, len(keys))
        own = [c for c in columns if variables[c].name.startswith(f"{name}.")]
        if (
            ".blocks." in name and own
        ):  # the block may not be there: its variables are inactive, whatever the others are
            for values in _assignments(space, [c for c in columns if c not in own]):
                row = np.full(len(columns), INACTIVE, dtype=np.int64)
                row[[i for i, c in enumerate(columns) if c not in own]] = values
                found.setdefault(offset + int(strides @ row), -1)
        cells_found = np.array(list(found), dtype=np.int64)
        parts.append(
            Part(name, np.array(columns, dtype=np.int64), strides, offset, cells_found, np.array(list(found.values())))
        )
    return parts, list(keys)
