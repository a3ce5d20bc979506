"""The latency of a unit from what it does, and of a network from its units.

A unit: a physical model, `sum over kinds (calls x launch + macs / rate + bytes / bandwidth)` with coefficients that are
never negative, fitted to the relative error; on a GPU, for each kernel, also its waves and its work per wave (see
`gpus.launch_work`). Then boosted trees on the logarithm of measured over physical. A unit that
was itself measured is drawn towards its measurement, as far as that is the surer of the two.

A network: the sum over its units of `unit x (scale + corrections of its operators)` plus a constant per unit, once for
each operator and each pair of operators that occur in it at all, and each time that a unit has another policy than the
one before it (`boundaries`), by ridge regression on whole networks. In a network a unit is slower than by itself, over
and over: its code and data are no longer at hand, the less so the more different operators there are. Pairs: two
operators that run the same kernels load their code once (measured: a depthwise mixer and an inverted residual take 8 us
less than apart, of 400 us). All of it is sums and look-ups over units, so that many architectures are soon predicted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist

import numpy as np

from mixnas.predictors.latency.trees import Trees
from mixnas.search_space.errors import ConfigError

Numbers = Mapping[str, float]

MIN_UNITS = 8
"""Measured units that a fit needs at least."""

ABOUT = "about."
"""Counts whose names begin so describe a unit's work without being work: the trees see them, the physics does not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FitConfig:
    """How the predictor is fitted.

    Attributes:
        num_trees: Boosted trees of the unit model.
        depth: Their depth.
        rate: Their learning rate.
        subsample: Share of rows per tree.
        calibration_share: Share of the measured networks that only calibrate the interval.
        min_networks: Whole networks that a fit needs at least.
        coverage: Of the interval.
        between_runs: Scatter (standard deviation of the logarithm) of what all networks together gain or lose against
            the sentinel from one run to another, which no profile sees in itself. Measured on two shared cores:
            fourteen runs over 50 to 80 networks, 0.7%.
        seed: Of the trees and of the split.
    """

    num_trees: int = 200
    depth: int = 3
    rate: float = 0.1
    subsample: float = 0.7
    calibration_share: float = 0.4
    min_networks: int = 12
    coverage: float = 0.90
    between_runs: float = 0.007
    seed: int = 0


def half_width(errors: np.ndarray, config: FitConfig) -> float:
    """Half of the interval's width, a logarithm: split conformal over `errors`, and what lies between two runs.

    Args:
        errors: Logarithms of predicted over measured (N,), of networks that the fit has not seen.
        config: Coverage, and the scatter between runs.
    """
    inside = conformal_quantile(np.abs(errors), config.coverage)
    if not math.isfinite(inside):  # too few to calibrate: the widest seen, doubled
        inside = 2 * float(np.abs(errors).max())
    return math.hypot(inside, NormalDist().inv_cdf((1 + config.coverage) / 2) * config.between_runs)


@dataclass(frozen=True)
class Columns:
    """Numbers of many things by name.

    Attributes:
        names: Of the columns.
        values: (rows, names).
    """

    names: tuple[str, ...]
    values: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Numbers]) -> Columns:
        """From a mapping for each row; what a row lacks is zero."""
        names = sorted({name for row in rows for name in row})
        index = {name: i for i, name in enumerate(names)}
        values = np.zeros((len(rows), len(names)))
        for r, row in enumerate(rows):
            for name, value in row.items():
                values[r, index[name]] = value
        return cls(tuple(names), values)

    @classmethod
    def summed(cls, parts: Sequence[Sequence[Numbers]], rows: np.ndarray) -> Columns:
        """Row r is the sum over p of `parts[p][rows[r, p]]`."""
        every = cls.of([numbers for part in parts for numbers in part])
        values = np.zeros((len(rows), len(every.names)))
        start = 0
        for part, index in zip(parts, rows.T, strict=True):
            values += every.values[start + index]
            start += len(part)
        return cls(every.names, values)

    def select(self, names: Sequence[str]) -> np.ndarray:
        """(rows, names): these columns in this order, zero where one is missing."""
        index = {name: i for i, name in enumerate(self.names)}
        result = np.zeros((len(self.values), len(names)))
        for i, name in enumerate(names):
            if name in index:
                result[:, i] = self.values[:, index[name]]
        return result


@dataclass(frozen=True)
class UnitModel:
    """Physical model and trees.

    Attributes:
        work_names: Columns of the physical model.
        coefficients: Milliseconds per call, wave, multiply-accumulate, byte; >= 0, and 0 for what only describes.
        typical: Milliseconds per call, multiply-accumulate and byte of whatever kind: of kinds that no measured unit
            has, which would be free else.
        setting_names: Columns that describe a unit's settings.
        trees: Correction: log(measured / physical).
        spread: Standard deviation of log(measured / predicted) on units that a fit had not seen.
        low: Least value of each setting among the measured units.
        high: Greatest.
    """

    work_names: tuple[str, ...]
    coefficients: np.ndarray
    typical: np.ndarray
    setting_names: tuple[str, ...]
    trees: Trees
    spread: float
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def fit(
        cls, works: Columns, settings: Columns, latency_ms: np.ndarray, config: FitConfig, *, spread: bool = True
    ) -> UnitModel:
        """Fit to measured units.

        Args:
            works: Counts of each unit, `features.Works`.
            settings: Settings of each unit, `units.describe`.
            latency_ms: (units,).
            config: How.
            spread: Whether the spread is wanted, which takes some more fits; else it is infinite.

        Raises:
            ConfigError: Fewer than `MIN_UNITS` units.
        """
        count = len(latency_ms)
        if count < MIN_UNITS:
            raise ConfigError(
                f"{count} measured units are too few to fit, which takes {MIN_UNITS}: give more `latency.profile`."
            )
        physical = np.array([not name.startswith(ABOUT) for name in works.names])
        coefficients = np.zeros(len(works.names))
        coefficients[physical] = _fit_physics(works.values[:, physical], latency_ms)
        described = settings.values
        low, high = described.min(axis=0), described.max(axis=0)
        typical = _fit_physics(totals(works), latency_ms)
        half = cls(works.names, coefficients, typical, settings.names, Trees.none(), math.inf, low, high)
        features, floor = half._features(works, settings)
        target = np.log(latency_ms / floor)

        def grow(rows: np.ndarray) -> Trees:
            return Trees.fit(
                features[rows],
                target[rows],
                num_trees=config.num_trees,
                depth=config.depth,
                rate=config.rate,
                subsample=config.subsample,
                seed=config.seed,
            )

        if not spread:
            return replace(half, trees=grow(np.arange(count)))
        order = np.random.default_rng(config.seed).permutation(count)
        errors = []
        for fold in np.array_split(order, 4):
            rest = np.setdiff1d(order, fold)
            errors.append(grow(rest).predict(features[fold]) - target[fold])
        scatter = float(np.sqrt((np.concatenate(errors) ** 2).mean()))
        return replace(half, trees=grow(np.arange(count)), spread=scatter)

    def physical(self, works: Columns) -> np.ndarray:
        """Milliseconds by the physical model alone."""
        new = sorted(set(works.names) - set(self.work_names))
        unknown = totals(Columns(tuple(new), works.select(new))) @ self.typical
        return np.maximum(works.select(self.work_names) @ self.coefficients + unknown, 1e-6)

    def _features(self, works: Columns, settings: Columns) -> tuple[np.ndarray, np.ndarray]:
        floor = self.physical(works)
        columns = [works.select(self.work_names), settings.select(self.setting_names), np.log(floor)[:, None]]
        return np.hstack(columns), floor

    def predict(self, works: Columns, settings: Columns) -> np.ndarray:
        """Milliseconds of each unit by itself."""
        if not len(works.values):
            return np.empty(0)
        features, floor = self._features(works, settings)
        return floor * np.exp(self.trees.predict(features))

    def outside(self, settings: Numbers) -> list[str]:
        """In words, what of a unit lies outside the measured range; empty when nothing does."""
        known = {name: i for i, name in enumerate(self.setting_names)}
        found = []
        for name, value in settings.items():
            i = known.get(name)
            if i is None:
                found.append(f"{name.replace('=', ' ')} was not measured" if value else "")
            elif not self.low[i] <= value <= self.high[i]:
                found.append(f"{name} {value:g} is outside {self.low[i]:g} to {self.high[i]:g}")
        return [text for text in found if text]


def totals(works: Columns) -> np.ndarray:
    """(units, 3) calls, multiply-accumulates and bytes of all kinds; what only changes a view does not count."""
    names = [name for name in works.names if ".rounds." not in name and name != "view.calls"]
    values = works.select(names)
    of_kind = [np.array([name.endswith(end) for name in names], dtype=bool) for end in (".calls", ".macs", ".bytes")]
    return np.stack([values[:, columns].sum(axis=1) for columns in of_kind], axis=1)


def _fit_physics(work: np.ndarray, latency_ms: np.ndarray) -> np.ndarray:
    """Non-negative least squares on the relative error; columns scaled to order one."""
    from scipy.optimize import nnls

    scale = np.maximum(work.max(axis=0), 1e-12)
    solution, _ = nnls(work / scale / latency_ms[:, None], np.ones(len(work)))
    return solution / scale


def blend(predicted: np.ndarray, measured: np.ndarray, spread: float, measured_spread: np.ndarray) -> np.ndarray:
    """Draw predictions towards measurements (NaN: not measured) by their variances, on a logarithmic scale.

    Args:
        predicted: (units,) milliseconds.
        measured: (units,) milliseconds or NaN.
        spread: Standard deviation of the prediction's logarithm.
        measured_spread: (units,) the same of the measurement's.
    """
    weight = spread**2 / (spread**2 + measured_spread**2)
    ratio = np.log(measured / predicted)
    return predicted * np.exp(np.where(np.isfinite(ratio), weight * ratio, 0.0))


LEAST_SHARE = 0.25
"""A network takes at least this share of what its units do: the terms of single operators, learnt from a few noisy
networks, may outweigh the units of a network unlike those."""


@dataclass(frozen=True)
class Composition:
    """From units by themselves to units in a network: `unit_ms * (scale + settings @ weights) + constant_ms`.

    Attributes:
        scale: See above.
        weights: (settings,) see above.
        constant_ms: See above.
        presence_ms: (operators, operators) symmetric. Added once to a network: element (i, i) where it has operator i
            in any branch, and (i, j) together with (j, i) where it has both.
        boundary_ms: (policies,) added each time that a unit has the policy behind one of another; see `boundaries`.
        base: Applied to `unit_ms` first: of a transferred predictor, that of the device that it came from.
    """

    scale: float
    weights: np.ndarray
    constant_ms: float
    presence_ms: np.ndarray
    base: Composition | None = None
    boundary_ms: np.ndarray = field(default_factory=lambda: np.empty(0))

    def apply(self, unit_ms: np.ndarray, settings: np.ndarray) -> np.ndarray:
        """Milliseconds of each unit in a network, (units,) with the categorical settings (units, columns)."""
        if self.base is not None:
            unit_ms = self.base.apply(unit_ms, settings)
        return np.asarray(unit_ms * (self.scale + settings @ self.weights) + self.constant_ms)

    @classmethod
    def fit(
        cls,
        counts: np.ndarray,
        unit_ms: np.ndarray,
        settings: np.ndarray,
        has: np.ndarray,
        latency_ms: np.ndarray,
        unseen: np.ndarray | None = None,
        entered: np.ndarray | None = None,
        unseen_entered: np.ndarray | None = None,
    ) -> Composition:
        """Ridge regression on the relative error; its strength, and whether pairs help, by leave-one-out error.

        From few networks on a restless machine, the terms of single operators may outweigh the units: a solution that
        gives any unit no time, or any network next to none, is none. Where all are such, the units are only scaled.

        Args:
            counts: (networks, units) how often each unit stands in each network.
            unit_ms: (units,) by themselves.
            settings: (units, columns) categorical settings.
            has: (units, operators) whether each operator is in each unit.
            latency_ms: (networks,) measured.
            unseen: (more networks, units) that must take time too.
            entered: (networks, policies) how often each policy is entered from another; None for no such term.
            unseen_entered: (more networks, policies) likewise.
        """
        if entered is None:
            entered = np.zeros((len(counts), 0))
            unseen_entered = None if unseen is None else np.zeros((len(unseen), 0))
        total = counts @ unit_ms
        typical = float(np.median(unit_ms[counts.any(axis=0)]))
        present = (counts @ has) > 0
        single = [
            (counts * unit_ms) @ settings,
            counts.sum(axis=1, keepdims=True) * typical,
            present * typical,
            entered * typical,
        ]
        first, second = (found.astype(np.intp) for found in np.triu_indices(has.shape[1], k=1))
        together = present[:, first] & present[:, second]
        # A pair that all have, or none, says nothing.
        telling = together.any(axis=0) & ~together.all(axis=0)
        first, second, together = first[telling], second[telling], together[:, telling]
        # Relative to the measured latency, so that the error that is least is the relative one.
        weight = total / latency_ms
        target = latency_ms / total
        mean = float(np.average(target, weights=weight**2))
        response = (target - mean) * weight
        every = counts if unseen is None else np.vstack([counts, unseen])
        crossed = entered if unseen_entered is None else np.vstack([entered, unseen_entered])
        ends = np.cumsum([settings.shape[1], 1, has.shape[1], entered.shape[1]])

        def composed(solution: np.ndarray, centre: np.ndarray) -> Composition:
            weights, constant, presence, boundary, pairs = np.split(solution, ends)
            presence_ms = np.diag(presence)
            if len(pairs):
                presence_ms[first, second] = presence_ms[second, first] = pairs / 2
            scale = mean - float(centre @ solution)
            fixed = float(constant[0]) * typical
            return cls(scale, weights, fixed, presence_ms * typical, boundary_ms=boundary * typical)

        def takes_time(found: Composition) -> bool:
            in_network_ms = found.apply(unit_ms, settings)
            networks_ms = found.network_ms(every, in_network_ms, has, crossed)
            least = LEAST_SHARE * (every @ in_network_ms)
            return bool((in_network_ms > 0).all() and (networks_ms > least).all())

        nothing = np.zeros(ends[-1])
        best = (math.inf, composed(nothing, nothing))
        for columns in (np.hstack(single), np.hstack([*single, together * typical])):
            columns = columns / total[:, None]
            centre = np.average(columns, axis=0, weights=weight**2)
            design = (columns - centre) * weight[:, None]
            u, s, vt = np.linalg.svd(design, full_matrices=False)
            for ridge in np.geomspace(1e-3, 1e2, 11):
                shrunk = s / (s**2 + ridge)
                solution = vt.T @ (shrunk * (u.T @ response))
                leverage = ((u * (s * shrunk)) * u).sum(axis=1) + 1 / len(total)
                error = float((((response - design @ solution) / np.maximum(1 - leverage, 1e-3)) ** 2).mean())
                if error < best[0] and takes_time(found := composed(solution, centre)):
                    best = (error, found)
        return best[1]

    def chain(self) -> list[Composition]:
        """This one and those below it, the device's own last."""
        return [*(self.base.chain() if self.base is not None else []), self]

    def network_ms(
        self, counts: np.ndarray, in_network_ms: np.ndarray, has: np.ndarray, entered: np.ndarray | None = None
    ) -> np.ndarray:
        """(networks,) from how often each unit stands in each; see `fit`."""
        present = ((counts @ has) > 0).astype(float)
        in_units = np.asarray(counts @ in_network_ms)
        found = in_units + ((present @ self.presence_ms) * present).sum(axis=1)
        return np.maximum(found if entered is None else found + entered @ self.boundary_ms, LEAST_SHARE * in_units)


def conformal_quantile(scores: np.ndarray, coverage: float) -> float:
    """The score that a new one stays below with probability `coverage` (split conformal; infinite when too few)."""
    rank = math.ceil((len(scores) + 1) * coverage)
    return float(np.sort(scores)[rank - 1]) if rank <= len(scores) else math.inf
