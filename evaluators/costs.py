"""Exact costs of architectures: of one, and of many encoded ones at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass

import numpy as np

from mixnas.search_space.architecture import Architecture
from mixnas.search_space.cost import METRICS, cost, cost_of
from mixnas.search_space.space import SearchSpace, Variable
from mixnas.search_space.units import IOSpec, plan


def costs(architecture: Architecture, io: IOSpec) -> dict[str, float]:
    """Parameters, multiply-accumulates and weight bytes of an architecture."""
    return {name: float(value) for name, value in asdict(cost(architecture, io)).items()}


@dataclass(frozen=True)
class _Place:
    """A place of a space's networks.

    Attributes:
        name: What the names of its units begin with.
        columns: The variables that decide what stands there.
        depth: Index of the variable that decides whether there is anything; -1 where there always is.
        there: By position in that variable, whether there is.
    """

    name: str
    columns: np.ndarray
    depth: int = -1
    there: np.ndarray | None = None


class SpaceCosts:
    """Costs of encoded architectures of one space.

    A network is the sum of its places, and few variables decide what stands at each: what was counted for a place once
    is looked up from then on.
    """

    def __init__(self, space: SearchSpace, io: IOSpec) -> None:
        self._space, self._io = space, io
        self._places = list(_places(space))
        self._known: list[dict[bytes, tuple[int, ...]]] = [{} for _ in self._places]

    def of(self, matrix: np.ndarray) -> dict[str, np.ndarray]:
        """Each cost (rows,) of encoded architectures (rows, variables)."""
        matrix = np.ascontiguousarray(matrix, dtype=np.int32)
        total = np.zeros((len(matrix), len(METRICS)), dtype=np.int64)
        for place, known in zip(self._places, self._known, strict=True):
            there = slice(None) if place.there is None else place.there[matrix[:, place.depth]]
            rows = np.arange(len(matrix))[there]
            deciding = np.ascontiguousarray(matrix[rows][:, place.columns])
            first, inverse = _distinct(deciding)
            found = [self._cost(place, known, deciding[i].tobytes(), matrix[rows[i]]) for i in first]
            if found:
                total[rows] += np.array(found)[inverse]
        return {name: total[:, i].astype(np.float64) for i, name in enumerate(METRICS)}

    def _cost(self, place: _Place, known: dict[bytes, tuple[int, ...]], key: bytes, row: np.ndarray) -> tuple[int, ...]:
        value = known.get(key)
        if value is None:
            units = plan(self._space.decode(row), self._io)
            here = [(name, unit) for name, unit in units if f"{name}.".startswith(f"{place.name}.")]
            value = known[key] = astuple(cost_of(here))
        return value


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of distinct rows (n, columns), and for each row which of them it is."""
    if len(rows) < 2 or not rows.shape[1]:
        return np.zeros(min(len(rows), 1), dtype=np.intp), np.zeros(len(rows), dtype=np.intp)
    _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    return first, inverse.reshape(-1)


def _places(space: SearchSpace) -> Iterator[_Place]:
    def columns(*wanted: Callable[[Variable], bool]) -> np.ndarray:
        found = [i for i, variable in enumerate(space.variables) if any(asked(variable) for asked in wanted)]
        return np.array(found, dtype=np.intp)

    def stem(v: Variable) -> bool:
        return v.axis == "stem"

    def norm(v: Variable) -> bool:
        return v.axis == "norm"

    def width(stage: int) -> Callable[[Variable], bool]:
        return lambda v: v.axis == "width" and v.stage == stage

    def down_to(stage: int) -> Callable[[Variable], bool]:  # with the stem, what decides the grid
        return lambda v: v.axis == "downsample" and v.stage is not None and v.stage <= stage

    def block(stage: int, b: int) -> Callable[[Variable], bool]:
        between = ("width", "depth", "downsample")
        return lambda v: v.stage == stage and v.axis not in between and v.block in (b, None)

    yield _Place("stem", columns(stem, width(0)))
    for s, stage in enumerate(space.tree.stages):
        yield _Place(f"stages.{s}.downsample", columns(stem, width(s - 1), width(s), down_to(s)))
        depth = next((i for i, v in enumerate(space.variables) if v.axis == "depth" and v.stage == s), -1)
        for b in range(max(stage.depth)):
            deciding = columns(stem, norm, width(s), down_to(s), block(s, b))
            there = None if depth < 0 else np.array(space.variables[depth].values) > b
            yield _Place(f"stages.{s}.blocks.{b}", deciding, depth, there)
    last = len(space.tree.stages) - 1
    yield _Place("head", columns(stem, norm, width(last), down_to(last)))
