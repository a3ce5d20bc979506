"""Exact costs of architectures: of one, and of many encoded ones at once.

Peak memory is counted where it is asked for only: each unit has to be run once for it.
"""

from __future__ import annotations

from dataclasses import asdict, astuple

import numpy as np

from mixnas.predictors.latency.parts import places
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.cost import METRICS, cost, cost_of
from mixnas.search_space.memory import PEAK_MEMORY, peak_memory_bytes, placed_peak
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec, plan, registry_size_after


def costs(architecture: Architecture, io: IOSpec, *, memory: bool = False) -> dict[str, float]:
    """Parameters, multiply-accumulates and weight bytes of an architecture, and peak memory where it is wanted."""
    found = {name: float(value) for name, value in asdict(cost(architecture, io)).items()}
    return {**found, PEAK_MEMORY: float(peak_memory_bytes(architecture, io))} if memory else found


class SpaceCosts:
    """Costs of encoded architectures of one space.

    A network is the sum of its places, and few variables decide what stands at each: what was counted for a place once
    is looked up from then on. Of memory it is the largest of its places, beside the weights.

    Args:
        space: Of the architectures.
        io: What their networks read and answer.
        memory: Whether peak memory is wanted.
    """

    def __init__(self, space: SearchSpace, io: IOSpec, *, memory: bool = False) -> None:
        self._space, self._io, self._memory = space, io, memory
        found = [place.part(0) for place in places(space, io, registry_size_after)]
        self._places = [(part.name, np.array(part.variables, dtype=np.intp)) for part in found]
        self._known: list[dict[bytes, tuple[int, ...]]] = [{} for _ in self._places]

    def of(self, matrix: np.ndarray) -> dict[str, np.ndarray]:
        """Each cost (rows,) of encoded architectures (rows, variables)."""
        matrix = np.ascontiguousarray(matrix, dtype=np.int32)
        total = np.zeros((len(matrix), len(METRICS)), dtype=np.int64)
        peak = np.zeros(len(matrix), dtype=np.int64)
        for (name, columns), known in zip(self._places, self._known, strict=True):
            deciding = np.ascontiguousarray(matrix[:, columns])
            first, inverse = _distinct(deciding)
            found = [self._cost(name, known, deciding[i].tobytes(), matrix[i]) for i in first]
            if found:
                here = np.array(found)[inverse]
                total += here[:, : len(METRICS)]
                peak = np.maximum(peak, here[:, -1])
        costs = {name: total[:, i].astype(np.float64) for i, name in enumerate(METRICS)}
        return {**costs, PEAK_MEMORY: costs["weight_bytes"] + peak} if self._memory else costs

    def _cost(self, place: str, known: dict[bytes, tuple[int, ...]], key: bytes, row: np.ndarray) -> tuple[int, ...]:
        value = known.get(key)
        if value is None:
            units = plan(self._space.decode(row), self._io)
            here = [(name, unit) for name, unit in units if name == place]
            own = max((placed_peak(unit, self._io) for _, unit in here), default=0) if self._memory else 0
            value = known[key] = (*astuple(cost_of(here)), own)  # of nothing where the block is not there
        return value


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of distinct rows (n, columns), and for each row which of them it is."""
    if len(rows) < 2 or not rows.shape[1]:
        return np.zeros(min(len(rows), 1), dtype=np.intp), np.zeros(len(rows), dtype=np.intp)
    _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    return first, inverse.reshape(-1)
