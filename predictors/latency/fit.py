"""Fitting a latency predictor on a measurement table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from mixnas.predictors.latency.boundaries import Boundaries, policies_in
from mixnas.predictors.latency.features import Works
from mixnas.predictors.latency.lookup import SpaceUnits
from mixnas.predictors.latency.model import Columns, Composition, FitConfig, UnitModel, blend, half_width
from mixnas.predictors.latency.outside import half_width_outside
from mixnas.predictors.latency.predictor import LatencyPredictor, Profiled, categorical
from mixnas.predictors.latency.unit_rows import UnitRows
from mixnas.predictors.measuring.table import MeasurementTable
from mixnas.search_space.architecture import BLOCK_AXES, Architecture
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.units import IOSpec, SizeAfter, Unit, describe, plan, registry_size_after


@dataclass(frozen=True)
class Networks:
    """The measured networks of a table in terms of units.

    Attributes:
        units: The units that occur in them.
        policies: The policies that `entered` counts.
        counts: (networks, units) how often each runs in each.
        entered: (networks, policies) how often each policy is entered from another.
        latency_ms: (networks,) measured.
        judging: (networks,) which of them a predictor is judged by, see `MeasurementTable.judging`.
    """

    units: UnitRows
    counts: np.ndarray
    entered: np.ndarray
    policies: tuple[str, ...]
    latency_ms: np.ndarray
    judging: np.ndarray

    @classmethod
    def of(
        cls,
        table: MeasurementTable,
        size_after: SizeAfter = registry_size_after,
        policies: Sequence[str] | None = None,
    ) -> Networks:
        """All that a table holds; `policies` are those whose boundaries are counted, all that occur if not given."""
        found = table.measurements("network")
        planned = []
        for identity in found:
            plain = table.subjects[identity].config
            architecture, io = Architecture.from_canonical(plain["architecture"]), IOSpec.from_plain(plain["io"])
            planned.append(plan(architecture, io, size_after))
        units = UnitRows.of(unit for network in planned for _, unit in network)
        policies = policies_in(units) if policies is None else policies
        boundaries = Boundaries(tuple(policies), np.zeros(len(policies)))
        counts, entered = np.zeros((len(planned), len(units))), np.zeros((len(planned), len(policies)))
        for n, network in enumerate(planned):
            entered[n] = boundaries.counts(network)
            for _, unit in network:
                counts[n, units.find(unit)] += 1
        latency_ms = np.array([measured.latency.ms for measured in found.values()])
        return cls(units, counts, entered, tuple(policies), latency_ms, table.judging(found))


@dataclass(frozen=True)
class _Alone:
    """The measured units of a table, by themselves."""

    units: list[Unit]
    works: list[Mapping[str, float]]
    ms: np.ndarray
    spread: np.ndarray

    @classmethod
    def of(cls, table: MeasurementTable) -> _Alone:
        found = table.measurements("unit")
        subjects = [table.subjects[identity] for identity in found]
        latencies = [measured.latency for measured in found.values()]
        return cls(
            [Unit.from_plain(what.config) for what in subjects],
            [what.work for what in subjects],
            np.array([latency.ms for latency in latencies]),
            np.array([latency.half_width / 1.645 for latency in latencies]),
        )


def fit(
    table: MeasurementTable,
    spaces: Sequence[SpaceUnits],
    works: Works,
    config: FitConfig | None = None,
) -> LatencyPredictor:
    """Fit a predictor on everything that a table holds.

    Args:
        table: Of a device; a table of the interpreter is refused.
        spaces: Spaces whose units it shall know.
        works: Counts units that were not measured, as those of the table were counted.
        config: How.

    Raises:
        ConfigError: Too few measurements, or they are no device's.
    """
    config = config or FitConfig()
    table.require_device()
    count = len(table.measurements("network"))
    if count < config.min_networks:
        raise ConfigError(
            f"{table.csv_path}: {count} measured networks; a fit needs {config.min_networks}. Profile for longer: "
            "give `latency.profile` (or --budget) more time; or profile a larger space, where all of this are measured."
        )
    alone = _Alone.of(table)
    counted, settings = Columns.of(alone.works), Columns.of([describe(unit) for unit in alone.units])
    model = UnitModel.fit(counted, settings, alone.ms, config)
    outside = half_width_outside(counted, settings, alone.ms, config)

    # Every unit that a space or a measured network has.
    networks = Networks.of(table)
    measured_units = UnitRows.of(alone.units)
    units = measured_units.joined(networks.units, *(space.units for space in spaces))
    measured_ms, spread = np.full(len(units), np.nan), np.full(len(units), math.inf)
    measured_ms[: len(measured_units)], spread[: len(measured_units)] = alone.ms, alone.spread
    unit_ms = np.empty(len(units))
    buildable = np.ones(len(units), dtype=bool)
    for part, some in units.chunks():
        work, buildable[part] = works.of_all(some)
        unit_ms[part] = model.predict(work, some.described())
    unit_ms = blend(unit_ms, measured_ms, model.spread, spread)

    # Networks from units: one part fits, the other calibrates; then both fit what is used.
    in_them = units.find_all(networks.units)
    settings = networks.units.described()
    categories = [*sorted(name for name in units.described_names() if "=" in name), "width"]
    operators = [name for name in categories if name.partition("=")[0] in BLOCK_AXES]
    groups, has = categorical(settings, categories), settings.select(operators) > 0
    # Networks that were drawn by size help to fit, but an interval for uniform ones is calibrated on uniform ones.
    order = np.random.default_rng(config.seed).permutation(count)
    candidates = order[networks.judging[order]]
    held_out = candidates[: max(1, round(config.calibration_share * len(candidates)))]
    seen = order[~np.isin(order, held_out)]
    counts, entered, latency_ms = networks.counts, networks.entered, networks.latency_ms
    in_them_ms = unit_ms[in_them]
    partly = Composition.fit(
        counts[seen],
        in_them_ms,
        groups,
        has,
        latency_ms[seen],
        unseen=counts[held_out],
        entered=entered[seen],
        unseen_entered=entered[held_out],
    )
    predicted = partly.network_ms(counts, partly.apply(in_them_ms, groups), has, entered)
    error = np.log(predicted / latency_ms)
    composition = Composition.fit(counts, in_them_ms, groups, has, latency_ms, entered=entered)

    in_network_ms = np.empty(len(units))
    for part, some in units.chunks():
        in_network_ms[part] = composition.apply(unit_ms[part], categorical(some.described(), categories))
    meta = {
        "device": table.device,
        "runtime": table.runtime,
        "threads": table.threads,
        "batch": table.batch,
        "half_width": half_width(error[held_out], config),
        "half_width_outside": outside,
        "coverage": config.coverage,
        "accuracy": accuracy(predicted[held_out], latency_ms[held_out]),
        "provenance": table.header["provenance"],
        "rows_digest": table.rows_digest,
        "fit": asdict(config),
        "categories": categories,
        "operators": operators,
        "policies": list(networks.policies),
        "num_units": len(measured_units),
        "num_networks": count,
    }
    unknown = np.where(buildable, 0.0, np.nan)
    profiled = Profiled(units, unit_ms + unknown, in_network_ms + unknown, np.isfinite(measured_ms))
    return LatencyPredictor(meta, model, composition, profiled, spaces)


def accuracy(predicted: np.ndarray, measured: np.ndarray) -> dict[str, float | int]:
    """Mean absolute percentage error, share within 10%, Kendall's tau and the number of networks."""
    from scipy.stats import kendalltau

    error = np.abs(predicted / measured - 1)
    tau = float(kendalltau(predicted, measured).statistic) if len(measured) > 1 else math.nan
    return {
        "mape_percent": round(100 * float(error.mean()), 3),
        "within_10_percent": round(100 * float((error <= 0.10).mean()), 2),
        "kendall_tau": round(tau, 4) if math.isfinite(tau) else 0.0,
        "networks": len(measured),
    }
