"""A network unit by unit: what it is, what it holds, and how long it takes by the run's predictor."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from mixnas.predictors.latency.predictor import LatencyPredictor, installed
from mixnas.search.card import describe
from mixnas.search.run.directory import Run
from mixnas.search.run.integrity import weights_problem
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.cost import unit_cost
from mixnas.search_space.errors import NasError
from mixnas.search_space.units import IOSpec, plan


@dataclass(frozen=True, slots=True)
class UnitRow:
    """One unit as it runs; of a block with recursion each time.

    Attributes:
        name: Of the unit, as in `units.plan`.
        operators: In the order in which they act.
        answers: Grid and width of its output.
        params: Parameters; 0 where it runs again.
        weight_bytes: Of its weights as deployed; 0 where it runs again.
        macs: Multiply-accumulates of one example.
        precision: Name of its quantization policy; empty outside branches.
        latency_ms: Its part of the predicted latency; None where nobody predicts.
    """

    name: str
    operators: str
    answers: str
    params: int
    weight_bytes: int
    macs: int
    precision: str
    latency_ms: float | None

    def to_plain(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def io_of(run: Run) -> IOSpec | None:
    """What the run's networks read and answer, from one of their files: the task is not imported."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(run.networks.glob("*.safetensors")):
        if weights_problem(path):
            continue
        known = (SafetensorError, KeyError, TypeError, ValueError)
        with contextlib.suppress(*known), safe_open(str(path), framework="numpy") as file:
            return IOSpec.from_plain(json.loads(file.metadata()["io"]))
    return None


def predictor_of(run: Run) -> LatencyPredictor | None:
    """The predictor that the run fitted or used; None where there is none any more."""
    device, tag = str(run.manifest["device"]), run.latency_tag
    own = any((found, of) == (device, tag) for found, of, _ in installed(run.latency))
    try:
        return LatencyPredictor.load(device, tag, run.latency if own else None)
    except NasError:
        return None


def breakdown(architecture: Architecture, io: IOSpec, predictor: LatencyPredictor | None) -> list[UnitRow]:
    """The units in the order in which they run.

    Raises:
        ConfigError: An operator is not registered here.
    """
    times: list[tuple[str, float]] = []
    if predictor is not None:
        try:
            times = [(unit.name, float(unit.latency_ms)) for unit in predictor.predict(architecture, io).units]
        except NasError:  # of another input, or operators that it never saw
            times = []
    rows, seen = [], set()
    for name, unit in plan(architecture, io):
        own, again = unit_cost(unit), name in seen
        seen.add(name)
        place = next((i for i, (known, _) in enumerate(times) if known == name), None)
        rows.append(
            UnitRow(
                name=name,
                operators=describe(unit),
                answers="x".join(map(str, (*unit.after.size, unit.after.width))),
                params=0 if again else own.params,
                weight_bytes=0 if again else own.weight_bytes,
                macs=own.macs,
                precision="" if unit.quant is None else str(unit.quant),
                latency_ms=None if place is None else times.pop(place)[1],
            )
        )
    return rows
