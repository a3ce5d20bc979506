"""A predictor for a device from few measurements: start from another device's, and correct it.

What is learned on the new device is only how its networks differ from the old device's: the same composition of units
that a full fit ends with, on top of the old device's units. With four networks that is hardly more than one factor; the
ridge regression lets more through as measurements come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixnas.predictors.latency.fit import accuracy
from mixnas.predictors.latency.lookup import SpaceTable
from mixnas.predictors.latency.model import Composition, FitConfig, half_width
from mixnas.predictors.latency.predictor import LatencyPredictor, Profiled, categorical
from mixnas.predictors.measuring.table import MeasurementTable
from mixnas.predictors.units import Key, architecture_from_canonical, describe, registry_size_after, walk
from mixnas.search_space.errors import ConfigError

MIN_NETWORKS = 4


@dataclass(frozen=True)
class _Measured:
    """A table's networks in terms of a source's units."""

    keys: list[Key]
    unit_ms: np.ndarray
    settings: np.ndarray
    has: np.ndarray
    counts: np.ndarray
    latency_ms: np.ndarray
    judging: np.ndarray

    def fit(self, rows: np.ndarray) -> Composition:
        return Composition.fit(self.counts[rows], self.unit_ms, self.settings, self.has, self.latency_ms[rows])

    def predict(self, composition: Composition, rows: np.ndarray) -> np.ndarray:
        in_network = composition.apply(self.unit_ms, self.settings)
        return composition.network_ms(self.counts[rows], in_network, self.has)


def _measured(table: MeasurementTable, source: LatencyPredictor) -> _Measured:
    table.require_device()
    found = table.latencies("network")
    if len(found) < MIN_NETWORKS:
        raise ConfigError(f"{table.csv_path}: {len(found)} measured networks; a transfer needs {MIN_NETWORKS}.")
    walked = []
    for identity in found:
        plain = table.subjects[identity].config
        architecture = architecture_from_canonical(plain["architecture"])
        walked.append([key for _, key in walk(architecture, plain["io"], registry_size_after)])
    keys = list(dict.fromkeys([*source.profiled.keys, *(key for units in walked for key in units)]))
    row = {key: i for i, key in enumerate(keys)}
    counts = np.zeros((len(walked), len(keys)))
    for n, units in enumerate(walked):
        for key in units:
            counts[n, row[key]] += 1
    settings = [describe(key) for key in keys]
    operators = source.meta["operators"]
    has = np.array([[name in s for name in operators] for s in settings]).reshape(len(keys), len(operators))
    unit_ms = np.array([source.unit_ms(key) for key in keys])
    latency = np.array([value.latency_ms for value in found.values()])
    judging = table.judging(found)
    return _Measured(keys, unit_ms, categorical(settings, source.meta["categories"]), has, counts, latency, judging)


def _folds(count: int, seed: int) -> list[np.ndarray]:
    return np.array_split(np.random.default_rng(seed).permutation(count), min(count, 10))


def _cross_validated(measured: _Measured, seed: int) -> np.ndarray:
    """(networks,) each predicted from a correction that had not seen it."""
    everything = np.arange(len(measured.latency_ms))
    predicted = np.empty(len(everything))
    for fold in _folds(len(everything), seed):
        predicted[fold] = measured.predict(measured.fit(np.setdiff1d(everything, fold)), fold)
    return predicted


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
        measured = _measured(table, source)
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
    measured = _measured(table, source)
    latency = measured.latency_ms
    predicted = _cross_validated(measured, config.seed)
    judging = measured.judging
    error = np.log(predicted / latency)[judging]
    own = measured.fit(np.arange(len(latency)))
    composition = Composition(own.scale, own.weights, own.constant_ms, own.presence_ms, source.composition)
    keys = measured.keys
    in_network = own.apply(measured.unit_ms, measured.settings)
    alone = np.full(len(keys), np.nan)
    alone[: len(source.profiled.alone_ms)] = source.profiled.alone_ms
    meta: dict[str, Any] = source.meta | {
        "device": table.device,
        "runtime": table.runtime,
        "threads": table.threads,
        "batch": table.batch,
        "half_width": half_width(error, config),
        "coverage": config.coverage,
        "accuracy": accuracy(predicted[judging], latency[judging]),
        "provenance": table.header["provenance"],
        "rows_digest": table.rows_digest,
        "num_units": 0,
        "num_networks": len(latency),
        "transferred_from": f"{source.device} ({source.runtime})",
    }
    tables = [SpaceTable(s.space, s.io, s.parts) for s in source.spaces[: len(source.meta["spaces"])]]
    profiled = Profiled(keys, alone, in_network, np.zeros(len(keys), dtype=bool))
    return LatencyPredictor(meta, source.model, composition, profiled, tables)


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
    measured = _measured(table, source)
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
