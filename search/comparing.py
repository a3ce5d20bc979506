"""Two things beside each other: networks of a run unit by unit, or the fronts of two runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixnas.search.report.breakdown import UnitRow, breakdown, io_of, predictor_of
from mixnas.search.run.directory import Run
from mixnas.search.run.front import Front, Member
from mixnas.search.run.typed import typed
from mixnas.search.study.objectives import Objective, parse_constraints, parse_objectives
from mixnas.search.study.pareto import Reference, as_minimised
from mixnas.search.study.reading import read_results
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError, NasError, nearest

# -- networks of a run ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Explained:
    """A network, unit by unit.

    Attributes:
        id: Of the architecture.
        metrics: What the run knows of it.
        units: In the order in which they run.
        floors_ms: For each unit, how long it would take at the greatest rate of multiply-accumulates that any unit of
            the run's front, or of the networks explained beside it, reaches by the predictor; so never more than its
            latency. None where that is not known.
    """

    id: str
    metrics: Mapping[str, float]
    units: tuple[UnitRow, ...]
    floors_ms: tuple[float | None, ...]

    def to_plain(self) -> dict[str, Any]:
        """Plain data for JSON."""
        rows = [{**u.to_plain(), "floor_ms": f} for u, f in zip(self.units, self.floors_ms, strict=True)]
        return {"id": self.id, "metrics": dict(self.metrics), "units": rows}


def explain(run: Run, names: Sequence[str]) -> list[Explained]:
    """Networks of a run by their ids, the start of one, or the number of a trial.

    Raises:
        ConfigError: No such network.
        NasError: The run has no networks yet, or their operators are not known here.
    """
    front, io, predictor = run.front(), io_of(run), predictor_of(run)
    if io is None:
        raise NasError(f"{run.path}: no network has been trained yet. nas resume {typed(run.path)}")
    found = []
    for name in names:
        identity, architecture, metrics = _network(run, front, name)
        found.append((identity, metrics, tuple(breakdown(architecture, io, predictor))))
    members = (breakdown(Architecture.from_canonical(m.architecture), io, predictor) for m in front.members)
    units = (unit for rows in (*members, *(rows for *_, rows in found)) for unit in rows)
    best = max((unit.macs / unit.latency_ms for unit in units if unit.latency_ms), default=0.0)
    return [Explained(identity, metrics, rows, _floors(rows, best)) for identity, metrics, rows in found]


def _floors(units: Sequence[UnitRow], best: float) -> tuple[float | None, ...]:
    """Milliseconds of each unit at the rate `best`; a quotient may round above the unit's own time."""
    return tuple(None if u.latency_ms is None or not best else min(u.macs / best, u.latency_ms) for u in units)


def _network(run: Run, front: Front, name: str) -> tuple[str, Architecture, Mapping[str, float]]:
    """Id, architecture and metrics of a network of the front, or of a trial."""
    members = [m for m in (*front.members, *front.others) if m.id.startswith(name)]
    if len(members) == 1:
        return members[0].id, Architecture.from_canonical(members[0].architecture), members[0].values
    fixed = run.manifest["fixed"]
    objectives, constraints = parse_objectives(fixed["objectives"]), parse_constraints(fixed.get("constraints", []))
    records = [r for r in read_results(run.journal, objectives, constraints).records if r.architecture_json]
    found = [r for r in records if str(r.number) == name] or [r for r in records if r.id.startswith(name)]
    ids = sorted({r.id for r in found})
    if len(ids) != 1:
        known = [m.id for m in (*front.members, *front.others)]
        problem = f"stands for several: {', '.join(ids[:8])}" if ids else "is no network and no trial"
        listed = f"{'The final networks' if front.final else 'The front so far'}: {', '.join(known) or 'none'}"
        raise ConfigError(f"{name!r} {problem} of {run.name}.{nearest(name, known)} {listed}.")
    return ids[0], found[0].architecture, found[0].metrics


def changes(before: Explained, after: Explained) -> list[tuple[str, UnitRow | None, UnitRow | None, float | None]]:
    """Units that differ between two networks: name, each one's row, difference in ms; the greatest first."""
    rows: dict[str, list[list[UnitRow]]] = {}
    for side, network in enumerate((before, after)):
        for unit in network.units:
            rows.setdefault(unit.name, [[], []])[side].append(unit)
    found = []
    for name, (old, new) in rows.items():
        if [(u.operators, u.answers) for u in old] == [(u.operators, u.answers) for u in new]:
            continue
        times = [u.latency_ms for u in (*old, *new)]
        known = all(ms is not None for ms in times)
        difference = sum(u.latency_ms or 0.0 for u in new) - sum(u.latency_ms or 0.0 for u in old) if known else None
        found.append((name, old[0] if old else None, new[0] if new else None, difference))
    return sorted(found, key=lambda row: -abs(row[3] or 0.0))


# -- fronts of two runs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Compared:
    """Two fronts under one reference point.

    Attributes:
        objectives: Those that are compared.
        reference: The point.
        hypervolumes: Of each front, in units of the box of both.
        dominated: Of each front, ids of members that a member of the other dominates.
        remarks: Why they may not compare.
    """

    objectives: tuple[Objective, ...]
    reference: tuple[float, ...]
    hypervolumes: tuple[float, float]
    dominated: tuple[tuple[str, ...], tuple[str, ...]]
    remarks: tuple[str, ...]

    @property
    def ratio(self) -> float | None:
        """Second over first hypervolume; None where the first is 0."""
        return self.hypervolumes[1] / self.hypervolumes[0] if self.hypervolumes[0] > 0 else None


def compare_fronts(first: Front, second: Front) -> Compared:
    """Compare two fronts by the objectives that both have.

    Raises:
        ConfigError: They share no objective, or differ in its direction.
        NasError: One of them is empty.
    """
    for front in (first, second):
        if not front.members:
            raise NasError(f"{front.run}: its front is empty.")
    shared = [name for name in first.objectives if second.objectives.get(name) == first.objectives[name]]
    if not shared:
        raise ConfigError(f"{first.run} and {second.run} share no objective: they cannot be compared.")
    objectives = parse_objectives({name: first.objectives[name] for name in shared})
    values = [np.array([[m.metrics[name] for name in shared] for m in f.members]) for f in (first, second)]
    reference = Reference.of(np.concatenate(values), objectives)
    points = [as_minimised(v, objectives) for v in values]
    return Compared(
        objectives,
        reference.point,
        (reference.hypervolume(values[0], objectives), reference.hypervolume(values[1], objectives)),
        (_dominated(first.members, points[0], points[1]), _dominated(second.members, points[1], points[0])),
        tuple(_remarks(first, second)),
    )


def _dominated(members: Sequence[Member], own: np.ndarray, others: np.ndarray) -> tuple[str, ...]:
    found = []
    for member, point in zip(members, own, strict=True):
        better = (others <= point).all(axis=1) & (others < point).any(axis=1)
        if better.any():
            found.append(member.id)
    return tuple(found)


def _remarks(first: Front, second: Front) -> list[str]:
    found = []
    for what in ("task", "device", "latency", "evaluator", "final"):
        one, other = getattr(first, what), getattr(second, what)
        if one != other:
            found.append(f"{what} differs: {one} and {other}")
    if list(first.objectives) != list(second.objectives):
        found.append(f"objectives differ: {', '.join(first.objectives)} and {', '.join(second.objectives)}")
    if first.constraints != second.constraints:
        one, other = (", ".join(front.constraints) or "none" for front in (first, second))
        found.append(f"constraints differ: {one} and {other}")
    return found
