"""Surrogates of any metric on encoded architectures: models that are averaged as their held-out predictions say.

A Gaussian process, support vectors and ridge regression. Architectures come as the integer vectors of a search space.
The weights are those of stacking (Breiman 1996, "Stacked regressions", section 2). Of few rows held-out errors cannot
tell a slightly better model from noise: where the average is not better than the linear model by a standard error, in
values and in ranks, the linear model has most of the weight (after the rule of Breiman, Friedman, Olshen and Stone
1984, "Classification and Regression Trees", section 3.4.3, which would give it all: a little of the others seldom
harms). Whether the metric or its ranks are fitted is decided by rank correlation, since a search uses the order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from mixnas.predictors.encoding import ChoiceEncoding
from mixnas.predictors.gaussian import Design, GaussianProcess, Groups, Prior
from mixnas.search_space.errors import ConfigError

MODELS = ("gp", "svr", "ridge")
_LEAST = 0.02  # a model of less weight is left out
_UNSURE = 0.3  # of the weight goes by stacking where that is not surely better than the linear model
_RESAMPLES = 30  # of the rows, that weights are the mean of
_RANKS_GAIN = 0.05  # by so many standard errors of a rank correlation ranks have to be better to be fitted instead
_FEW = 200  # rows up to which settings are chosen on all rows, each held out once, rather than on a quarter of them


@dataclass(frozen=True, kw_only=True, slots=True)
class SurrogateConfig:
    """How a surrogate is fitted.

    Attributes:
        models: Which are tried: "gp", "svr" and "ridge".
        folds: Of the cross-validation that chooses between them and calibrates the uncertainty.
        hyper_rows: Rows, at most, that the Gaussian process's lengthscales are fitted on.
        cv_rows: Rows, at most, that the cross-validation uses.
        seed: Of the folds and subsets.
    """

    models: tuple[str, ...] = MODELS
    folds: int = 4
    hyper_rows: int = 250
    cv_rows: int = 600
    seed: int = 0


class _Model(Protocol):
    def fit(self, x: np.ndarray, y: np.ndarray) -> None:
        """Fit to standardised targets."""

    def predict(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation."""


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.maximum((a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T, 0.0)


@dataclass
class GaussianModel:
    """`gaussian.GaussianProcess`; its parameters are fitted on a subset, the posterior then uses all rows."""

    encoding: ChoiceEncoding
    hyper_rows: int
    seed: int
    process: GaussianProcess | None = None

    def fit(self, encoded: np.ndarray, y: np.ndarray) -> None:
        """See `_Model`."""
        design = self._design(encoded)
        if self.process is None:
            self.process = self._new()
            rows = np.random.default_rng(self.seed).permutation(len(y))[: self.hyper_rows]
            self.process.fit(design[rows], y[rows], iterations=60)
        self.process.condition(design, y)

    def _design(self, encoded: np.ndarray) -> Design:
        x = self.encoding.choices(encoded)
        return Design(x * math.sqrt(2 / self.encoding.variables), x, self.encoding.counts(encoded))

    def _new(self) -> GaussianProcess:
        columns = len(self.encoding.group)
        groups = Groups(np.zeros(columns, dtype=np.intp), self.encoding.group, self.encoding.count_group)
        prior = Prior(
            linear=(math.log(0.3), 1.0),
            choices=(-math.log(self.encoding.variables), 1.0),
            counts=(math.log(0.3), 1.0),
            signal=(math.log(0.5), 1.0),
            noise=(math.log(0.05), 1.5),
        )
        return GaussianProcess(groups, prior)

    def predict(self, encoded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `_Model`; the deviation includes the noise."""
        assert self.process is not None
        mean, deviation = np.empty(len(encoded)), np.empty(len(encoded))
        for start in range(0, len(encoded), 4096):
            part = slice(start, start + 4096)
            mean[part], variance, _ = self.process.posterior(self._design(encoded[part]))
            deviation[part] = np.sqrt(variance + self.process.noise)
        return mean, deviation


@dataclass
class Ridge:
    """Linear regression on the choices alone, with a penalty that is chosen by leaving one out."""

    encoding: ChoiceEncoding

    def fit(self, encoded: np.ndarray, y: np.ndarray) -> None:
        """See `_Model`."""
        from sklearn.linear_model import RidgeCV

        self._model = RidgeCV(alphas=np.logspace(-3, 3, 13)).fit(self.encoding.choices(encoded), y)

    def predict(self, encoded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `_Model`; the deviation is filled in by calibration."""
        return self._model.predict(self.encoding.choices(encoded)), np.ones(len(encoded))


@dataclass
class SupportVector:
    """Support-vector regression with a Gaussian kernel; its settings by cross-validation on a subset."""

    encoding: ChoiceEncoding
    hyper_rows: int
    seed: int
    settings: dict[str, float] = field(default_factory=dict)

    def fit(self, encoded: np.ndarray, y: np.ndarray) -> None:
        """See `_Model`."""
        from sklearn.svm import SVR

        x = self.encoding.choices(encoded)
        if not self.settings:
            rows = np.random.default_rng(self.seed).permutation(len(x))[: 2 * self.hyper_rows]
            self.settings = self._choose(x[rows], y[rows])
        self._model = SVR(**self.settings)
        self._model.fit(x, y)

    def _choose(self, x: np.ndarray, y: np.ndarray) -> dict[str, float]:
        from sklearn.svm import SVR

        spread = max(float(x.var(axis=0).sum()), 1e-9)
        best, chosen = -math.inf, {"C": 10.0, "gamma": 0.5 / spread, "epsilon": 0.05}
        if len(x) < 6:
            return chosen
        fold = np.arange(len(x)) % 4  # the rows are in random order
        held_out = range(4 if len(x) <= _FEW else 1)
        judged = np.concatenate([np.flatnonzero(fold == k) for k in held_out])
        for gamma in (0.1, 0.3, 1.0):
            for c in (1.0, 10.0, 100.0):
                settings = {"C": c, "gamma": gamma / (2 * spread), "epsilon": 0.05}
                found = [SVR(**settings).fit(x[fold != k], y[fold != k]).predict(x[fold == k]) for k in held_out]
                score = rank_correlation(np.concatenate(found), y[judged])
                if score > best:
                    best, chosen = score, settings
        return chosen

    def predict(self, encoded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `_Model`; the deviation is filled in by calibration."""
        return self._model.predict(self.encoding.choices(encoded)), np.ones(len(encoded))


def rank_correlation(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Spearman's; 0 where one of the two does not vary."""
    from scipy.stats import rankdata

    a, b = rankdata(predicted), rankdata(truth)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


class _Scale:
    """The metric on the scale that a model sees: standardised, or by normal quantiles of its ranks."""

    def __init__(self, metric: np.ndarray, ranks: bool) -> None:
        from scipy.stats import norm, rankdata

        shift, scale = float(metric.mean()), float(metric.std())
        constant = scale <= 1e-12 * max(1.0, abs(shift))
        self._values = np.unique(metric)
        if ranks and len(self._values) > 2:
            quantile = norm.ppf((rankdata(metric) - 0.5) / len(metric))
            self._scaled = np.array([quantile[metric == value][0] for value in self._values])
        else:
            # Two points make the straight line.
            self._values = np.array([shift, shift + (1.0 if constant else scale)])
            self._scaled = np.array([0.0, 1.0])

    def forward(self, metric: np.ndarray) -> np.ndarray:
        """Metric to scale."""
        return _interpolate(metric, self._values, self._scaled)

    def back(self, scaled: np.ndarray) -> np.ndarray:
        """Scale to metric; beyond what was seen, straight on."""
        return _interpolate(scaled, self._scaled, self._values)

    def interval(self, mean: np.ndarray, deviation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of means and deviations on the scale, the metric and half of what lies a deviation to either side of it.

        Intervals are calibrated in these units: on a scale of ranks twice the deviation is not twice the metric.
        """
        low, high = self.back(mean - deviation), self.back(mean + deviation)
        return self.back(mean), np.maximum((high - low) / 2, 1e-12)


def _interpolate(x: np.ndarray, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Piecewise linear, continued at both ends with the slope between the ends and a tenth of the way in."""
    inner = max(1, len(xs) // 10)
    low = (ys[inner] - ys[0]) / (xs[inner] - xs[0])
    high = (ys[-1] - ys[-1 - inner]) / (xs[-1] - xs[-1 - inner])
    inside = np.interp(x, xs, ys)
    return np.asarray(inside + np.minimum(x - xs[0], 0.0) * low + np.maximum(x - xs[-1], 0.0) * high)


class Surrogate:
    """Predicts one metric, in its own units, with uncertainty. Made by `Surrogate.fit`.

    Attributes:
        chosen: The models that are averaged, joined by "+", with "-ranks" where the metric's ranks were fitted.
        weights: Of each of those, above 0; they sum to 1.
        scores: Cross-validated rank correlation of each that was tried.
    """

    def __init__(
        self,
        models: Mapping[str, _Model],
        weights: np.ndarray,
        scale: _Scale,
        inflation: float,
        suffix: str,
        scores: dict[str, float],
    ) -> None:
        self._models, self._weights, self._scale, self._inflation = tuple(models.values()), weights, scale, inflation
        self.chosen, self.scores = f"{'+'.join(models)}{suffix}", scores
        self.weights = dict(zip(models, weights.tolist(), strict=True))

    @classmethod
    def fit(
        cls,
        values: Sequence[Sequence[Any]],
        encoded: np.ndarray,
        metric: np.ndarray,
        config: SurrogateConfig | None = None,
    ) -> Surrogate:
        """Fit a metric.

        Args:
            values: What each variable may be: `[v.values for v in space.variables]`.
            encoded: (rows, variables) integers, -1 inactive; up to about 5,000 rows.
            metric: (rows,) measured values, finite.
            config: How.

        Raises:
            ConfigError: Fewer than 4 rows, values that are not finite, or vectors that do not fit `values`.
        """
        config = config or SurrogateConfig()
        metric, encoded = np.asarray(metric, dtype=float), np.asarray(encoded)
        unknown = [name for name in config.models if name not in MODELS]
        if unknown or not config.models:
            raise ConfigError(f"models {list(config.models)}: allowed are {', '.join(MODELS)}.")
        if len(metric) != len(encoded) or len(metric) < 4:
            raise ConfigError(f"{len(encoded)} architectures with {len(metric)} values; a surrogate needs 4 or more.")
        if not np.isfinite(metric).all():
            raise ConfigError("a surrogate is fitted on finite values only; leave failed trials out.")
        encoding = ChoiceEncoding(values, [bool(column.min() < 0) for column in encoded.T])
        encoding.check(encoded)
        rows = np.random.default_rng(config.seed).permutation(len(metric))[: config.cv_rows]
        scores: dict[str, float] = {}
        tried: list[tuple[float, str, _Scale, dict[str, _Model], np.ndarray, np.ndarray, np.ndarray]] = []
        for ranks in (False, True):
            scale, suffix = _Scale(metric, ranks), "-ranks" if ranks else ""
            y = scale.forward(metric)[rows]
            held = {name: _held_out(name, encoding, config, encoded[rows], y) for name in config.models}
            scores |= {f"{name}{suffix}": rank_correlation(means, y) for name, (means, _) in held.items()}
            weights = _weights({name: means for name, (means, _) in held.items()}, y, config.seed)
            models = {name: _new_model(name, encoding, config) for name, w in zip(held, weights, strict=True) if w > 0}
            weights = weights[weights > 0]
            mean, deviation = _averaged([held[name] for name in models], weights)
            gain = rank_correlation(mean, y) - (_RANKS_GAIN / math.sqrt(len(rows)) if ranks else 0.0)
            tried.append((gain, suffix, scale, models, weights, mean, deviation))
        _, suffix, scale, models, weights, mean, deviation = max(tried, key=lambda one: one[0])
        centre, half = scale.interval(mean, deviation)
        inflation = _inflation(np.abs(centre - metric[rows]) / half)
        y = scale.forward(metric)
        for model in models.values():
            model.fit(encoded, y)
        return cls(models, weights, scale, inflation, suffix, scores)

    def predict(self, encoded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation, (rows,) each, in the metric's units.

        The mean and 1.645 deviations on either side are an interval of 90%: of held-out folds it held as many.
        """
        mean, deviation = _averaged([model.predict(np.asarray(encoded)) for model in self._models], self._weights)
        centre, half = self._scale.interval(mean, deviation)
        return centre, np.maximum(self._inflation * half, 1e-12)


def _new_model(name: str, encoding: ChoiceEncoding, config: SurrogateConfig) -> _Model:
    if name == "gp":
        return GaussianModel(encoding, config.hyper_rows, config.seed)
    return Ridge(encoding) if name == "ridge" else SupportVector(encoding, config.hyper_rows, config.seed)


def _averaged(found: Sequence[tuple[np.ndarray, np.ndarray]], weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation (rows,) of several models."""
    mean, deviation = (weights @ np.stack([one[i] for one in found]) for i in (0, 1))
    return mean, deviation


def _weights(held_out: Mapping[str, np.ndarray], y: np.ndarray, seed: int) -> np.ndarray:
    """Weights (models,) of the average: stacking's, or nearer to the linear model alone; see the module.

    Args:
        held_out: Of each model, (rows,), each predicted by one that had not seen the row.
        y: (rows,).
        seed: See `_stacked`.
    """
    means = np.stack([*held_out.values()], axis=1)
    weights = _stacked(means, y, seed)
    if "ridge" in held_out and not _surely_better(means @ weights, held_out["ridge"], y):
        linear = np.array([float(name == "ridge") for name in held_out])
        weights = _UNSURE * weights + (1 - _UNSURE) * linear
    weights = np.where(weights >= _LEAST, weights, 0.0)
    return weights / weights.sum()


def _surely_better(first: np.ndarray, second: np.ndarray, y: np.ndarray) -> bool:
    """Whether `first` predicts y better than `second`, (rows,) each: by a standard error, in values and in ranks.

    The squared error of ranks, which is what Spearman's correlation sums, is not ruled by a few large values.
    """
    from scipy.stats import rankdata

    for a, b, truth in ((first, second, y), (rankdata(first), rankdata(second), rankdata(y))):
        gain = (b - truth) ** 2 - (a - truth) ** 2
        if gain.mean() <= gain.std(ddof=1) / math.sqrt(len(y)):
            return False
    return True


def _stacked(held_out: np.ndarray, y: np.ndarray, seed: int) -> np.ndarray:
    """Weights of models, none negative, that sum to 1: the mean of what resamples of the rows say.

    Of few rows the weights of the least squared error are near to all or nothing; those of resamples are less so
    (bagging: Breiman 1996, "Bagging predictors").

    Args:
        held_out: (rows, models), each predicted by a model that had not seen the row.
        y: (rows,).
        seed: Of the resamples.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(y), size=(_RESAMPLES, len(y)))
    weights: np.ndarray = np.mean([_least_squares(held_out[rows], y[rows]) for rows in drawn], axis=0)
    return weights


def _least_squares(held_out: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Weights (models,) of the least squared error, none negative, that sum to 1; see `_stacked`."""
    from scipy.optimize import nnls

    models = held_out.shape[1]
    heavy = 1e4 * max(1.0, float(np.abs(held_out).max()), float(np.abs(y).max()))  # so that the sum is 1 but for little
    found: np.ndarray = nnls(np.vstack([held_out, np.full(models, heavy)]), np.append(y, heavy))[0]
    return found / found.sum()


def _held_out(
    name: str, encoding: ChoiceEncoding, config: SurrogateConfig, encoded: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each row (rows,) by a model that had not seen it, nor chosen its settings by it."""
    order = np.arange(len(y))
    means, deviations = np.empty(len(y)), np.empty(len(y))
    for k in range(count := min(config.folds, len(y) // 2)):
        fold = order % count == k
        model = _new_model(name, encoding, config)
        model.fit(encoded[~fold], y[~fold])
        means[fold], deviations[fold] = model.predict(encoded[fold])
    return means, deviations


def _inflation(errors: np.ndarray) -> float:
    """By how much deviations are multiplied so that 1.645 of them hold 90% of errors like these (in deviations).

    The quantile of split conformal prediction (Lei et al. 2018, "Distribution-free predictive inference for
    regression", section 2.2): of n errors the ceil(0.9 (n + 1))th.
    """
    ordered = np.sort(errors)
    place = min(math.ceil(0.9 * (len(errors) + 1)), len(errors)) - 1
    return max(float(ordered[place]) / 1.645, 1e-6)
