"""Fitting a latency predictor on a measurement table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mixnas.predictors.latency.lookup import Part, SpaceTable, build_parts
from mixnas.predictors.latency.model import Composition, FitConfig, UnitModel, blend, half_width
from mixnas.predictors.latency.predictor import LatencyPredictor, Profiled, categorical, plain_digest
from mixnas.predictors.measuring.table import MeasurementTable
from mixnas.predictors.units import (
    Key,
    architecture_from_canonical,
    describe,
    key_from_plain,
    registry_size_after,
    walk,
)
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.grammar import BLOCK_AXES
from mixnas.search_space.space import SearchSpace

WorkOf = Callable[[Key], Mapping[str, float] | None]


@dataclass(frozen=True)
class SpaceToFit:
    """A space that the predictor shall tabulate: its parts and units (`build_parts`), and how it was written."""

    space: SearchSpace
    io: Mapping[str, Any]
    parts: list[Part]
    keys: list[Key]
    written_as: tuple[str, ...] = ()

    @classmethod
    def of(cls, space: SearchSpace, io: Mapping[str, Any], plain: Any = None) -> SpaceToFit:
        """Enumerate a space's units.

        Args:
            space: The space.
            io: `units.io_fields` of the task's `IOSpec`.
            plain: What stood under `space:` in its file; a query of the same text then needs no torch.
        """
        parts, keys = build_parts(space, lambda architecture: walk(architecture, io, registry_size_after))
        return cls(space, dict(io), parts, keys, () if plain is None else (plain_digest(plain),))


def fit(
    table: MeasurementTable,
    spaces: Sequence[SpaceToFit],
    work_of: WorkOf,
    config: FitConfig | None = None,
) -> LatencyPredictor:
    """Fit a predictor on everything that a table holds.

    Args:
        table: Of a device; a table of the interpreter is refused.
        spaces: Spaces to tabulate for `predict_many`.
        work_of: Counts of a unit that was not measured (`features.work_of`); None when it cannot be built.
        config: How.

    Raises:
        ConfigError: Too few measurements, or they are no device's.
    """
    config = config or FitConfig()
    table.require_device()
    units = table.latencies("unit")
    networks = table.latencies("network")
    if len(networks) < config.min_networks:
        raise ConfigError(
            f"{table.csv_path}: {len(networks)} measured networks; a fit needs {config.min_networks}. "
            "Profile for longer."
        )

    # Units by themselves.
    measured_keys = [key_from_plain(table.subjects[identity].config) for identity in units]
    works: dict[Key, Mapping[str, float]] = {
        key: table.subjects[identity].work for key, identity in zip(measured_keys, units, strict=True)
    }
    alone = np.array([latency.latency_ms for latency in units.values()])
    model = UnitModel.fit([works[key] for key in measured_keys], [describe(k) for k in measured_keys], alone, config)

    # Every unit that a space or a measured network has.
    walked = []
    for identity in networks:
        plain = table.subjects[identity].config
        architecture = architecture_from_canonical(plain["architecture"])
        walked.append([key for _, key in walk(architecture, plain["io"], registry_size_after)])
    keys = list(dict.fromkeys([*measured_keys, *(k for s in spaces for k in s.keys), *(k for w in walked for k in w)]))
    row = {key: i for i, key in enumerate(keys)}
    buildable = np.ones(len(keys), dtype=bool)
    for key in keys:
        if key not in works:
            counted = work_of(key)
            buildable[row[key]] = counted is not None
            works[key] = counted or {}
    settings = [describe(key) for key in keys]
    predicted = model.predict([works[key] for key in keys], settings)
    measured = np.full(len(keys), np.nan)
    measured_spread = np.full(len(keys), math.inf)
    measured[: len(alone)] = alone
    measured_spread[: len(alone)] = [math.log(u.high_ms / u.low_ms) / 2 / 1.645 for u in units.values()]
    unit_ms = blend(predicted, measured, model.spread, measured_spread)

    # Networks from units: one part fits, the other calibrates.
    counts = np.zeros((len(walked), len(keys)))
    for n, in_network in enumerate(walked):
        for key in in_network:
            counts[n, row[key]] += 1
    latency = np.array([measured_latency.latency_ms for measured_latency in networks.values()])
    categories = [*sorted({name for s in settings for name in s if "=" in name}), "width"]
    groups = categorical(settings, categories)
    # Networks that were drawn by size help to fit, but an interval for uniform ones is calibrated on uniform ones.
    judging = table.judging(networks)
    order = np.random.default_rng(config.seed).permutation(len(latency))
    candidates = order[judging[order]]
    held_out = candidates[: max(1, round(config.calibration_share * len(candidates)))]
    seen = order[~np.isin(order, held_out)]
    operators = [name for name in categories if name.partition("=")[0] in BLOCK_AXES]
    has = np.array([[name in s for name in operators] for s in settings]).reshape(len(keys), len(operators))
    composition = Composition.fit(counts[seen], unit_ms, groups, has, latency[seen])
    in_network_ms = composition.apply(unit_ms, groups)
    error = np.log(composition.network_ms(counts, in_network_ms, has) / latency)

    in_network_ms = np.where(buildable, in_network_ms, np.nan)
    meta = {
        "device": table.device,
        "runtime": table.runtime,
        "threads": table.threads,
        "batch": table.batch,
        "half_width": half_width(error[held_out], config),
        "coverage": config.coverage,
        "accuracy": accuracy(np.exp(error[held_out]) * latency[held_out], latency[held_out]),
        "provenance": table.header["provenance"],
        "rows_digest": table.rows_digest,
        "fit": asdict(config),
        "categories": categories,
        "operators": operators,
        "num_units": len(units),
        "num_networks": len(networks),
        "spaces": [{"written_as": list(space.written_as)} for space in spaces],
    }
    tables = [
        SpaceTable(s.space, s.io, _repoint(s.parts, np.array([row[k] for k in s.keys], dtype=np.int64))) for s in spaces
    ]
    profiled = Profiled(keys, np.where(buildable, unit_ms, np.nan), in_network_ms, np.isfinite(measured))
    return LatencyPredictor(meta, model, composition, profiled, tables)


def _repoint(parts: Sequence[Part], rows: np.ndarray) -> list[Part]:
    """Parts whose `units` point into the predictor's list of units instead of the space's own."""
    return [
        Part(p.name, p.columns, p.strides, p.offset, p.cells, np.where(p.units >= 0, rows[p.units], -1)) for p in parts
    ]


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
