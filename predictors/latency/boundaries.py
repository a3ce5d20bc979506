"""What it takes a unit, beside itself, to stand behind one of another quantization policy.

The residual stream is float32, and each branch quantizes what its norm gives and answers in floats: that is measured
with the branch. What is left at a boundary is a term of its own, fitted to whole networks: by the policy that is
entered, the milliseconds that the change adds. Between neighbours of one policy there is none.

A block that recurs is looked at once. NumPy only: a query needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mixnas.predictors.latency.unit_rows import POLICY, UnitRows
from mixnas.search_space.units import Unit

PLAIN = "fp32"
"""Of units that have no policy: stem, downsample, head."""


def _name(unit: Unit) -> str:
    return PLAIN if unit.quant is None else unit.quant.name


def policies_in(units: UnitRows) -> list[str]:
    """Sorted names of the policies of units; `PLAIN` is always among them."""
    return sorted({PLAIN, *(entry[1].name for entry in units.slots[POLICY] if entry is not None)})


@dataclass(frozen=True)
class Boundaries:
    """The term by policy.

    Attributes:
        policies: Their names.
        ms: (policies,) what entering each from another adds. Entering a policy that is not among them adds nothing.
    """

    policies: tuple[str, ...]
    ms: np.ndarray

    def walk(self, planned: Iterable[tuple[str, Unit]]) -> Iterator[float]:
        """Milliseconds that each unit of a plan adds by standing where it stands; they are in the order of the plan."""
        for index in self._entered(planned):
            yield 0.0 if index is None else float(self.ms[index])

    def counts(self, planned: Iterable[tuple[str, Unit]]) -> np.ndarray:
        """(policies,) how often a network enters each from another."""
        found = np.zeros(len(self.policies))
        for index in self._entered(planned):
            if index is not None:
                found[index] += 1
        return found

    def _entered(self, planned: Iterable[tuple[str, Unit]]) -> Iterator[int | None]:
        before, seen = PLAIN, set()
        for name, unit in planned:
            policy = _name(unit)
            crosses = name not in seen and policy != before and policy in self.policies
            yield self.policies.index(policy) if crosses else None
            if name not in seen:
                before = policy
            seen.add(name)

    def codes(self, units: UnitRows) -> np.ndarray:
        """(units + 1,) of each unit its policy as a number; the last is that of a unit that is not there."""
        known = {name: i for i, name in enumerate(self.policies)}
        names = [PLAIN if entry is None else entry[1].name for entry in units.slots[POLICY]]
        codes = np.array([known.get(name, len(known)) for name in names], dtype=np.int8)
        return np.append(codes[units.rows[:, 1 + POLICY]], np.int8(len(known) + 1))

    def matter(self, codes: np.ndarray) -> bool:
        """Whether any of these codes is of a policy that it takes time to enter."""
        there = set(codes[:-1].tolist())
        return len(there) > 1 and any(code < len(self.ms) and self.ms[code] != 0 for code in there)

    def summed(self, codes: np.ndarray) -> np.ndarray:
        """(networks,) milliseconds of all boundaries, from the codes (parts, networks) of what stands where.

        Of the states that a network is in on the way there is one for each policy, and one for those not known.
        """
        unknown = len(self.policies)
        absent, width = unknown + 1, unknown + 2
        cost, following = np.zeros((unknown + 1, width), dtype=np.float32), np.empty((unknown + 1, width), np.int16)
        for before in range(unknown + 1):
            following[before] = np.arange(width)
            following[before, absent] = before
            cost[before, :unknown] = self.ms
            if before < unknown:
                cost[before, before] = 0.0
        start = self.policies.index(PLAIN) if PLAIN in self.policies else unknown
        state = np.full(codes.shape[1], start, dtype=np.int16)
        total = np.zeros(codes.shape[1], dtype=np.float32)
        flat, then = cost.ravel(), following.ravel()
        for now in codes:
            at = state * np.int16(width) + now
            total += flat.take(at)
            state = then.take(at)
        return total


def boundaries_of(policies: Sequence[str], ms: np.ndarray) -> Boundaries:
    """From what a predictor holds; one that was fitted before there was such a term has none."""
    return Boundaries(tuple(policies), ms) if len(policies) == len(ms) else Boundaries((), np.empty(0))
