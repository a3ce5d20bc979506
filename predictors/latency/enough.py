"""Whether a space has what it takes to fit a latency predictor: known before anything is measured."""

from __future__ import annotations

from mixnas.predictors.latency.lookup import SpaceUnits
from mixnas.predictors.latency.model import MIN_UNITS, FitConfig
from mixnas.predictors.latency.parts import places
from mixnas.predictors.measuring.table import MeasurementTable
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError, counted
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec, Unit, registry_size_after

_CELLS = 4096  # with more places for units, at least `MIN_UNITS` of them differ


def too_small(space: SearchSpace, io: IOSpec) -> str:
    """Why no profile of a space can be fitted, however long it takes; empty where one can.

    Args:
        space: The only one that is measured.
        io: What its networks read and answer.
    """
    return _lacking(space, io, networks=0, units=None, least=FitConfig().min_networks)


def check_enough(table: MeasurementTable, space: SearchSpace, io: IOSpec, least: int, *, units: bool) -> None:
    """Refuse to profile a space that has too few networks or units for a fit, with what a table holds of others.

    Args:
        table: What was measured on the device so far.
        space: What is to be measured beside it.
        io: What its networks read and answer.
        least: Networks that a fit needs.
        units: Whether it needs measured units too.

    Raises:
        ConfigError: Says how many there are, and what to do.
    """
    networks, others = 0, set[Unit]()
    plain = io.to_plain()
    for what in table.subjects.values():
        if what.kind == "unit":
            others.add(Unit.from_plain(what.config))
        elif what.config["io"] != plain or not space.contains(Architecture.from_canonical(what.config["architecture"])):
            networks += 1
    reason = _lacking(space, io, networks, others if units else None, least, fit_of_units=units)
    if reason:
        raise ConfigError(
            f"{space.source}: no predictor can be fitted, however long is profiled: {reason}. Profile a larger space, "
            "for example one with more widths: this one can then be asked about as well. A search of this one needs no "
            "profile: it measures each network."
        )


def _lacking(
    space: SearchSpace, io: IOSpec, networks: int, units: set[Unit] | None, least: int, *, fit_of_units: bool = True
) -> str:
    size = space.size()
    if networks + size < least:
        beside = f" beside the {networks} that were measured before" if networks else ""
        return f"the space has {counted(size, 'architecture')}{beside}, and a fit needs {least} that are measured"
    if fit_of_units and sum(place.cells for place in places(space, io, registry_size_after)) <= _CELLS:
        own = SpaceUnits(space, io).units
        count = len((units or set()) | {own[row] for row in range(len(own))})
        if count < MIN_UNITS:
            return f"the space's networks have {counted(count, 'unit')} that differ, and a fit needs {MIN_UNITS}"
    return ""
