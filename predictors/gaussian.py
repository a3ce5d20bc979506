"""A Gaussian process on architectures: a linear term, and smooth ones on the choices and on how often each is made.

Rasmussen and Williams 2006, sections 2.2 (posterior), 5.4.1 (marginal likelihood and its gradient). On categories the
smooth term on the choices is a kernel of the weighted Hamming distance. NumPy and SciPy alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_JITTER = 1e-6


@dataclass(frozen=True, slots=True)
class Design:
    """Rows as a process sees them.

    Attributes:
        linear: (rows, columns) of the linear term.
        choices: (rows, columns) of the first smooth term.
        counts: (rows, columns) of the second; without columns it is left out.
    """

    linear: np.ndarray
    choices: np.ndarray
    counts: np.ndarray

    def __len__(self) -> int:
        return len(self.linear)

    @property
    def parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The three in order."""
        return self.linear, self.choices, self.counts

    def __getitem__(self, rows: np.ndarray | slice) -> Design:
        return Design(self.linear[rows], self.choices[rows], self.counts[rows])


@dataclass(frozen=True, slots=True)
class Groups:
    """Which columns of a `Design` share a parameter: an integer per column, from 0 on."""

    linear: np.ndarray
    choices: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True, slots=True)
class Prior:
    """Log-normal priors: the logarithm's mean and deviation.

    Attributes:
        linear: Of the variance of a linear column.
        choices: Of the inverse squared length of a column's group in the first smooth term.
        counts: The same in the second.
        signal: Of the variance of each smooth term.
        noise: Of the variance of the noise.
    """

    linear: tuple[float, float]
    choices: tuple[float, float]
    counts: tuple[float, float]
    signal: tuple[float, float]
    noise: tuple[float, float]


def _squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    found = a @ b.T
    found *= -2
    found += (a * a).sum(1)[:, None]
    found += (b * b).sum(1)[None]
    return np.maximum(found, 0.0, out=found)


def _smooth(a: np.ndarray, b: np.ndarray, weights: np.ndarray, variance: float) -> np.ndarray:
    """`variance` times exp of minus half the weighted squared distance: (rows of a, rows of b)."""
    roots = np.sqrt(weights)
    found = _squared(a * roots, b * roots)
    found *= -0.5
    np.exp(found, out=found)
    found *= variance
    return found


class GaussianProcess:
    """See the module. Targets are standardised by whoever calls.

    Args:
        groups: Which columns share a parameter.
        prior: Of all parameters.

    Attributes:
        parameters: Logarithms: of `linear` variances, `choices` and `counts` inverse squared lengths, the two signals,
            the noise.
    """

    def __init__(self, groups: Groups, prior: Prior) -> None:
        self._groups = groups
        counts = [int(g.max()) + 1 if len(g) else 0 for g in (groups.linear, groups.choices, groups.counts)]
        self._at = np.cumsum([0, *counts, 2, 1])
        blocks = (prior.linear, prior.choices, prior.counts, prior.signal, prior.noise)
        repeats = np.diff(self._at)
        self._centre = np.repeat([b[0] for b in blocks], repeats)
        self._width = np.repeat([b[1] for b in blocks], repeats)
        self.parameters = self._centre.copy()

    def _weights(self, parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]:
        values = np.exp(parameters)
        parts = [values[self._at[i] : self._at[i + 1]] for i in range(5)]
        linear = parts[0][self._groups.linear]
        return linear, parts[1][self._groups.choices], parts[2][self._groups.counts], parts[3], float(parts[4][0])

    # -- parameters ---------------------------------------------------------------------------------------------------

    def fit(self, design: Design, y: np.ndarray, iterations: int = 30) -> None:
        """Parameters of the largest posterior density, from where they stand now."""
        from scipy.optimize import minimize  # SciPy takes a quarter of a second to import, in each process

        def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
            found = self._loss(parameters, design, y)
            away = (parameters - self._centre) / self._width
            return found[0] + 0.5 * float(away @ away), found[1] + away / self._width

        bounds = [(c - 6 * w, c + 6 * w) for c, w in zip(self._centre, self._width, strict=True)]
        found = minimize(loss, self.parameters, jac=True, method="L-BFGS-B", bounds=bounds,
                         options={"maxiter": iterations})  # fmt: skip
        if np.isfinite(found.x).all():
            self.parameters = found.x

    def _loss(self, parameters: np.ndarray, design: Design, y: np.ndarray) -> tuple[float, np.ndarray]:
        from scipy.linalg import lapack

        linear, choices, counts, (first, second), noise = self._weights(parameters)
        smooth = _smooth(design.choices, design.choices, choices, first)
        kernel = (design.linear * linear) @ design.linear.T
        kernel += smooth
        with_counts = design.counts.shape[1] > 0
        if with_counts:
            other = _smooth(design.counts, design.counts, counts, second)
            kernel += other
        kernel[np.diag_indices_from(kernel)] += noise + _JITTER
        factor, failed = lapack.dpotrf(kernel, lower=True, clean=True)
        gradient = np.zeros_like(parameters)
        if failed:
            return 1e10, gradient
        alpha = lapack.dpotrs(factor, y, lower=True)[0]
        inverse = lapack.dpotri(factor, lower=True)[0]
        inverse = np.tril(inverse) + np.tril(inverse, -1).T
        value = 0.5 * float(y @ alpha) + float(np.log(np.diag(factor)).sum())
        outer = 0.5 * (inverse - np.outer(alpha, alpha))  # half the derivative of the loss by the kernel
        at = self._at
        columns = (design.linear * (outer @ design.linear)).sum(0) * linear
        np.add.at(gradient[at[0] : at[1]], self._groups.linear, columns)
        np.add.at(gradient[at[1] : at[2]], self._groups.choices, _by_column(outer * smooth, design.choices) * choices)
        gradient[at[3]] = float((outer * smooth).sum())
        if with_counts:
            np.add.at(gradient[at[2] : at[3]], self._groups.counts, _by_column(outer * other, design.counts) * counts)
            gradient[at[3] + 1] = float((outer * other).sum())
        gradient[at[4]] = noise * float(np.trace(outer))
        return value, gradient

    # -- posterior ----------------------------------------------------------------------------------------------------

    def kernel(self, a: Design, b: Design) -> np.ndarray:
        """(rows of a, rows of b), without noise."""
        linear = self._weights(self.parameters)[0]
        found = self._smooth_terms(a, b)
        found += (a.linear * linear) @ b.linear.T
        return found

    def _smooth_terms(self, a: Design, b: Design) -> np.ndarray:
        _, choices, counts, (first, second), _ = self._weights(self.parameters)
        found = _smooth(a.choices, b.choices, choices, first)
        if a.counts.shape[1]:
            found += _smooth(a.counts, b.counts, counts, second)
        return found

    def variance(self, a: Design) -> np.ndarray:
        """Prior variance (rows,), without noise."""
        linear, _, _, (first, second), _ = self._weights(self.parameters)
        return (a.linear * a.linear) @ linear + first + (second if a.counts.shape[1] else 0.0)

    @property
    def noise(self) -> float:
        """Variance of the noise."""
        return self._weights(self.parameters)[4] + _JITTER

    def condition(self, design: Design, y: np.ndarray) -> None:
        """Take rows in, with the parameters as they are."""
        from scipy.linalg import lapack

        kernel = self.kernel(design, design)
        kernel[np.diag_indices_from(kernel)] += self.noise
        factor, failed = lapack.dpotrf(kernel, lower=True, clean=True)
        assert not failed
        self._design, self._factor = design, factor
        self._alpha = lapack.dpotrs(factor, y, lower=True)[0]

    def mean(self, design: Design) -> np.ndarray:
        """Posterior mean (rows,)."""
        found: np.ndarray = self._smooth_terms(design, self._design) @ self._alpha
        # of the linear term the weights of its columns are all there is to know
        found += design.linear @ (self._weights(self.parameters)[0] * (self._alpha @ self._design.linear))
        return found

    def posterior(self, design: Design) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Posterior mean (rows,), variance (rows,) without noise, and the half of it (known rows, rows) that is known.

        The posterior covariance of two rows is their kernel less the product of their columns of the half.
        """
        from scipy.linalg import solve_triangular

        cross = self.kernel(design, self._design)
        half = solve_triangular(self._factor, cross.T, lower=True, check_finite=False)
        variance = np.maximum(self.variance(design) - (half * half).sum(0), 1e-9)
        return cross @ self._alpha, variance, half


def _by_column(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Minus half of the sum over pairs of `weights` (n, n, symmetric) times the squared difference in each column."""
    return -((weights.sum(1)[:, None] * x * x).sum(0) - (x * (weights @ x)).sum(0))
