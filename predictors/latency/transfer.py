"""A predictor for a device from few measurements: start from another device's, and correct it.

What is learned on the new device is only how its networks differ from the old device's: the same composition of units
that a full fit ends with, on top of the old device's units. With four networks that is hardly more than one factor; the
ridge regression lets more through as measurements come.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mixnas.predictors.latency.fit import Networks, accuracy
from mixnas.predictors.latency.lookup import SpaceUnits
from mixnas.predictors.latency.model import Composition, FitConfig, half_width
from mixnas.predictors.latency.predictor import LatencyPredictor, Profiled, categorical, installed
from mixnas.predictors.latency.unit_rows import UnitRows
from mixnas.predictors.measuring.table import MeasurementTable
from mixnas.search_space.errors import ConfigError, IntegrityError
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec

log = logging.getLogger(__name__)

MIN_NETWORKS = 4


@dataclass(frozen=True)
class _Measured:
    """A table's networks in terms of a source's units."""

    units: UnitRows
    unit_ms: np.ndarray
    settings: np.ndarray
    has: np.ndarray
    counts: np.ndarray
    entered: np.ndarray
    latency_ms: np.ndarray
    judging: np.ndarray

    @classmethod
    def of(cls, table: MeasurementTable, source: LatencyPredictor) -> _Measured:
        table.require_device()
        found = Networks.of(table, source.size_after, source.boundaries.policies)
        if len(found.latency_ms) < MIN_NETWORKS:
            raise ConfigError(
                f"{table.csv_path}: {len(found.latency_ms)} measured networks; a transfer needs {MIN_NETWORKS}. "
                "Profile for longer: give `latency.profile` (or --budget) more time."
            )
        settings = found.units.described()
        return cls(
            found.units,
            source.units_ms(found.units),
            categorical(settings, source.meta["categories"]),
            settings.select(source.meta["operators"]) > 0,
            found.counts,
            found.entered,
            found.latency_ms,
            found.judging,
        )

    def fit(self, rows: np.ndarray) -> Composition:
        return Composition.fit(
            self.counts[rows],
            self.unit_ms,
            self.settings,
            self.has,
            self.latency_ms[rows],
            unseen=self.counts,
            entered=self.entered[rows],
            unseen_entered=self.entered,
        )

    def predict(self, composition: Composition, rows: np.ndarray) -> np.ndarray:
        in_network = composition.apply(self.unit_ms, self.settings)
        return composition.network_ms(self.counts[rows], in_network, self.has, self.entered[rows])


def _folds(count: int, seed: int) -> list[np.ndarray]:
    return np.array_split(np.random.default_rng(seed).permutation(count), min(count, 10))


def _cross_validated(measured: _Measured, seed: int) -> np.ndarray:
    """(networks,) each predicted from a correction that had not seen it."""
    everything = np.arange(len(measured.latency_ms))
    predicted = np.empty(len(everything))
    for fold in _folds(len(everything), seed):
        predicted[fold] = measured.predict(measured.fit(np.setdiff1d(everything, fold)), fold)
    return predicted


def sources_of(table: MeasurementTable, space: SearchSpace, io: IOSpec) -> list[LatencyPredictor]:
    """The predictors beside a table, and those that ship, that know a space; not the table's own."""
    found = []
    own = table.csv_path.with_suffix(".npz").name
    for _, _, path in [*installed(table.csv_path.parent), *installed()]:
        if path.name == own:
            continue
        try:
            predictor = LatencyPredictor.open(path)
        except IntegrityError as error:
            log.warning("%s It is not transferred from.", error)
            continue
        if any(known.is_of(space, io) for known in predictor.spaces):
            found.append(predictor)
    return found


def spaces_before(table: MeasurementTable, space: SearchSpace, io: IOSpec) -> list[SpaceUnits]:
    """The spaces that a table's predictor already knows, apart from this one."""
    path = table.csv_path.with_suffix(".npz")
    if not path.exists():
        return []
    try:
        before = LatencyPredictor.open(path)
    except IntegrityError as error:
        log.warning("%s It is fitted anew from its table.", error)
        return []
    return [known for known in before.spaces if not known.is_of(space, io)]


def nearest_source(
    table: MeasurementTable, sources: Sequence[LatencyPredictor], config: FitConfig | None = None
) -> LatencyPredictor:
    """The source from which a table's networks are predicted best, by cross-validated relative error.

    Raises:
        ConfigError: There is no source, or the table has too few networks.
    """
    if not sources:
        raise ConfigError("no device to transfer from: none was measured. Profile this one in full.")
    seed = (config or FitConfig()).seed

    def error(source: LatencyPredictor) -> float:
        measured = _Measured.of(table, source)
        return float(np.abs(_cross_validated(measured, seed) / measured.latency_ms - 1).mean())

    return min(sources, key=error)


def transfer(table: MeasurementTable, source: LatencyPredictor, config: FitConfig | None = None) -> LatencyPredictor:
    """The predictor of a table's device, from few measured networks and another device's predictor.

    Args:
        table: At least 4 measured networks of the new device.
        source: Of a measured device; see `nearest_source`.
        config: Coverage of the interval and seed.

    Returns:
        A predictor of the new device. Its interval is calibrated by cross-validation over the few networks, and its
        `meta["transferred_from"]` names the source.
    """
    config = config or FitConfig()
    measured = _Measured.of(table, source)
    latency = measured.latency_ms
    predicted = _cross_validated(measured, config.seed)
    judging = measured.judging
    error = np.log(predicted / latency)[judging]
    own = measured.fit(np.arange(len(latency)))
    composition = replace(own, base=source.composition)
    units = source.profiled.units.joined(measured.units)
    known = len(source.profiled.units)
    alone = np.append(source.profiled.alone_ms, np.full(len(units) - known, np.nan))
    in_network = np.empty(len(units))
    for part, some in units.chunks():
        settings = categorical(some.described(), source.meta["categories"])
        in_network[part] = own.apply(source.units_ms(some), settings)
    meta: dict[str, Any] = source.meta | {
        "device": table.device,
        "runtime": table.runtime,
        "threads": table.threads,
        "batch": table.batch,
        "half_width": half_width(error, config),
        "half_width_outside": None,  # no unit was measured here
        "coverage": config.coverage,
        "accuracy": accuracy(predicted[judging], latency[judging]),
        "provenance": table.header["provenance"],
        "rows_digest": table.rows_digest,
        "num_units": 0,
        "num_networks": len(latency),
        "transferred_from": f"{source.device} ({source.runtime})",
    }
    profiled = Profiled(units, alone, in_network, np.zeros(len(units), dtype=bool))
    return LatencyPredictor(meta, source.model, composition, profiled, source.spaces)


def transfer_curve(
    table: MeasurementTable, source: LatencyPredictor, sizes: Sequence[int], repeats: int, rng: np.random.Generator
) -> list[dict[str, float]]:
    """Error of the transfer against the number of measured networks.

    Args:
        table: Of the new device, with more networks than the greatest size; the others judge.
        source: Of a measured device.
        sizes: Numbers of networks.
        repeats: Random choices of each number.
        rng: Draws them.

    Returns:
        Per size: "networks", "mape_percent", "within_10_percent", "kendall_tau", means over the repeats.
    """
    measured = _Measured.of(table, source)
    result = []
    for size in sizes:
        if size >= len(measured.latency_ms):
            raise ConfigError(f"{size} networks to fit on and none to judge: the table has {len(measured.latency_ms)}.")
        found = []
        for _ in range(repeats):
            order = rng.permutation(len(measured.latency_ms))
            rows, rest = order[:size], order[size:][measured.judging[order[size:]]]
            found.append(accuracy(measured.predict(measured.fit(rows), rest), measured.latency_ms[rest]))
        names = ("mape_percent", "within_10_percent", "kendall_tau")
        result.append({"networks": float(size)} | {n: round(float(np.mean([f[n] for f in found])), 4) for n in names})
    return result
