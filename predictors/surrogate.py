"""Surrogates of any metric on encoded architectures: a Gaussian process or support vectors, by cross-validation.

Architectures come as the integer vectors of a search space. The encoding is masked: an inactive choice contributes
nothing, whatever it would have been. What is compared is rank correlation, since a search uses the order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from mixnas.predictors.encoding import MaskedEncoding
from mixnas.search_space.errors import ConfigError

MODELS = ("gp", "svr")


@dataclass(frozen=True, kw_only=True, slots=True)
class SurrogateConfig:
    """How a surrogate is fitted.

    Attributes:
        models: Which are tried: "gp" and "svr".
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
class GaussianProcess:
    """Gaussian process: a linear and a squared-exponential kernel, one lengthscale per variable, by maximum posterior.

    On categories the latter is a kernel of the weighted Hamming distance. Its settings are fitted on a subset of the
    rows, the posterior then uses all of them (Rasmussen and Williams 2006, sections 2.2 and 5.4.1).
    """

    group: Sequence[int]
    hyper_rows: int
    seed: int
    scales: np.ndarray = field(default_factory=lambda: np.empty(0))
    noise: float = 0.1
    signal: float = 1.0
    linear: float = 0.0

    def fit(self, x: np.ndarray, y: np.ndarray) -> None:
        """See `_Model`."""
        if not len(self.scales):
            self._fit_scales(x, y)
        self._x = x
        kernel = self._kernel(x, x)
        kernel[np.diag_indices_from(kernel)] += self.noise
        from scipy.linalg import cho_factor, cho_solve

        self._factor = cho_factor(kernel, lower=True, overwrite_a=True, check_finite=False)
        self._alpha = cho_solve(self._factor, y, check_finite=False)

    def _kernel(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        lengths = self.scales[list(self.group)]
        kernel = _squared_distances(a / lengths, b / lengths)
        kernel *= -0.5
        np.exp(kernel, out=kernel)
        kernel *= self.signal
        kernel += self.linear * (a @ b.T)
        return kernel

    def _fit_scales(self, x: np.ndarray, y: np.ndarray) -> None:
        from scipy.optimize import minimize

        rows = np.random.default_rng(self.seed).permutation(len(x))[: self.hyper_rows]
        x, y = x[rows], y[rows]
        groups = np.array(self.group)
        count = int(groups.max()) + 1
        distances = np.stack([_squared_distances(x[:, groups == g], x[:, groups == g]) for g in range(count)])
        flat = distances.reshape(count, -1)
        products = x @ x.T
        # A prior on lengthscales that fits the number of variables: together they make distances of order one.
        centre = 0.5 * math.log(count)

        def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
            log_scales, (log_signal, log_noise, log_linear) = parameters[:count], parameters[count:]
            weights = np.exp(-2 * log_scales)
            smooth = np.exp(log_signal - 0.5 * (weights @ flat)).reshape(len(x), len(x))
            kernel = smooth + math.exp(log_linear) * products + (math.exp(log_noise) + 1e-8) * np.eye(len(x))
            lower = np.linalg.cholesky(kernel)
            inverse_lower = np.linalg.inv(lower)
            inverse = inverse_lower.T @ inverse_lower
            alpha = inverse @ y
            value = 0.5 * y @ alpha + np.log(np.diag(lower)).sum()
            outer = 0.5 * (inverse - np.outer(alpha, alpha))
            common = (outer * smooth).ravel()
            gradient = np.empty(count + 3)
            gradient[:count] = weights * (flat @ common)
            gradient[count] = common.sum()
            gradient[count + 1] = math.exp(log_noise) * np.trace(outer)
            gradient[count + 2] = math.exp(log_linear) * float((outer * products).sum())
            deviation = (parameters - start) / width
            return float(value + 0.5 * deviation @ deviation), gradient + deviation / width

        start = np.concatenate([np.full(count, centre), [0.0, -3.0, -1.0]])
        width = np.concatenate([np.ones(count), [1.0, 2.0, 2.0]])
        bounds = [(centre - 4, centre + 6)] * count + [(-6.0, 6.0), (-12.0, 1.0), (-8.0, 4.0)]
        found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 40})
        self.scales = np.exp(found.x[:count])
        self.signal, noise, self.linear = (float(v) for v in np.exp(found.x[count:]))
        self.noise = noise + 1e-8

    def predict(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `_Model`; the deviation includes the noise."""
        from scipy.linalg import solve_triangular

        mean, deviation = np.empty(len(x)), np.empty(len(x))
        own = self.signal + self.linear * (x * x).sum(1)
        for start in range(0, len(x), 4096):
            part = slice(start, start + 4096)
            cross = self._kernel(x[part], self._x)
            mean[part] = cross @ self._alpha
            half = solve_triangular(self._factor[0], cross.T, lower=True, check_finite=False)
            deviation[part] = np.sqrt(np.maximum(own[part] - (half * half).sum(0), 0.0) + self.noise)
        return mean, deviation


@dataclass
class SupportVector:
    """Support-vector regression with a Gaussian kernel; its settings by cross-validation on a subset."""

    hyper_rows: int
    seed: int
    settings: dict[str, float] = field(default_factory=dict)

    def fit(self, x: np.ndarray, y: np.ndarray) -> None:
        """See `_Model`."""
        from sklearn.svm import SVR

        if not self.settings:
            rows = np.random.default_rng(self.seed).permutation(len(x))[: 2 * self.hyper_rows]
            self.settings = self._choose(x[rows], y[rows])
        self._model = SVR(**self.settings)
        self._model.fit(x, y)

    def _choose(self, x: np.ndarray, y: np.ndarray) -> dict[str, float]:
        from sklearn.svm import SVR

        spread = max(float(x.var(axis=0).sum()), 1e-9)
        cut = max(1, len(x) // 4)
        best, chosen = -math.inf, {"C": 3.0, "gamma": 0.5 / spread, "epsilon": 0.05}
        if len(x) - cut < 4:
            return chosen
        for gamma in (0.1, 0.3, 1.0):
            for c in (1.0, 10.0, 100.0):
                settings = {"C": c, "gamma": gamma / (2 * spread), "epsilon": 0.05}
                score = rank_correlation(SVR(**settings).fit(x[cut:], y[cut:]).predict(x[:cut]), y[:cut])
                if score > best:
                    best, chosen = score, settings
        return chosen

    def predict(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `_Model`; the deviation is filled in by calibration."""
        return self._model.predict(x), np.ones(len(x))


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
        chosen: "gp" or "svr", with "-ranks" where the metric's ranks were fitted.
        scores: Cross-validated rank correlation of each that was tried.
    """

    def __init__(
        self,
        encoding: MaskedEncoding,
        model: _Model,
        scale: _Scale,
        inflation: float,
        chosen: str,
        scores: dict[str, float],
    ) -> None:
        self._encoding, self._model, self._scale, self._inflation = encoding, model, scale, inflation
        self.chosen, self.scores = chosen, scores

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
        metric = np.asarray(metric, dtype=float)
        unknown = [name for name in config.models if name not in MODELS]
        if unknown or not config.models:
            raise ConfigError(f"models {list(config.models)}: allowed are {', '.join(MODELS)}.")
        if len(metric) != len(encoded) or len(metric) < 4:
            raise ConfigError(f"{len(encoded)} architectures with {len(metric)} values; a surrogate needs 4 or more.")
        if not np.isfinite(metric).all():
            raise ConfigError("a surrogate is fitted on finite values only; leave failed trials out.")
        encoding = MaskedEncoding(values)
        x = encoding(encoded)
        rows = np.random.default_rng(config.seed).permutation(len(metric))[: config.cv_rows]
        tried: dict[str, tuple[float, float, _Model, _Scale]] = {}
        for ranks in (False, True):
            scale = _Scale(metric, ranks)
            y = scale.forward(metric)
            for name in config.models:
                model = cls._new(name, encoding, config)
                score, inflation = _cross_validate(model, x[rows], y[rows], config.folds)
                tried[f"{name}-ranks" if ranks else name] = score, inflation, model, scale
        chosen = max(tried, key=lambda name: tried[name][0])
        _, inflation, model, scale = tried[chosen]
        model.fit(x, scale.forward(metric))
        return cls(encoding, model, scale, inflation, chosen, {name: found[0] for name, found in tried.items()})

    @staticmethod
    def _new(name: str, encoding: MaskedEncoding, config: SurrogateConfig) -> _Model:
        if name == "gp":
            return GaussianProcess(encoding.group, config.hyper_rows, config.seed)
        return SupportVector(config.hyper_rows, config.seed)

    def predict(self, encoded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation, (rows,) each, in the metric's units.

        The deviation is scaled so that on held-out folds errors were as large as it said.
        """
        mean, deviation = self._model.predict(self._encoding(encoded))
        deviation = self._inflation * deviation
        low, high = self._scale.back(mean - deviation), self._scale.back(mean + deviation)
        return self._scale.back(mean), np.maximum((high - low) / 2, 1e-12)


def _cross_validate(model: _Model, x: np.ndarray, y: np.ndarray, folds: int) -> tuple[float, float]:
    """Rank correlation on held-out folds, and by how much errors there exceeded the deviations given.

    Settings are chosen once, on the rows of all folds: what the folds decide is between models.
    """
    model.fit(x, y)
    order = np.arange(len(y))
    means, deviations = np.empty(len(y)), np.empty(len(y))
    for k in range(count := min(folds, len(y) // 2)):
        fold = order % count == k
        model.fit(x[~fold], y[~fold])
        means[fold], deviations[fold] = model.predict(x[fold])
    error = (means - y) / deviations
    return rank_correlation(means, y), max(float(np.sqrt((error**2).mean())), 1e-6)
