"""What a space's own networks, measured whole, say of a predictor: by how much it is off, and where in the space.

A search finds what its predictor flatters (the optimiser's curse: Smith and Winkler 2006, "The Optimizer's Curse",
section 2). What it holds to be best is therefore measured on the way, and the ratio of measured to predicted is
modelled over the space's choices: a Gaussian process on its logarithm (Rasmussen and Williams 2006, section 2.2), a
constant and a kernel of the share of choices that differ. Nothing is fitted that a few networks could not tell: the
variance is that of the ratios found.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mixnas.search_space.errors import ConfigError

_NOISE = 0.01  # deviation of the logarithm of one measurement, at least: what it differs by when it is repeated
_SHARED = 0.5  # part of the variance that all networks of the space have in common
_DECAY = 4.0  # networks that differ in all choices share exp(-4) of the rest


class Correction:
    """By what predictions of a space's networks are multiplied.

    Args:
        rows: Encoded architectures that were measured (networks, variables), -1 inactive.
        predicted: Their predicted milliseconds (networks,).
        measured: Their measured milliseconds (networks,).

    Raises:
        ConfigError: No network, or a time that is not above 0.
    """

    def __init__(self, rows: np.ndarray, predicted: Sequence[float], measured: Sequence[float]) -> None:
        from scipy.linalg import cho_factor, cho_solve  # SciPy takes a quarter of a second to import, in each process

        self._rows = np.asarray(rows)
        before, found = np.asarray(predicted, dtype=float), np.asarray(measured, dtype=float)
        if not len(self._rows) or len(self._rows) != len(before) or len(before) != len(found):
            raise ConfigError(f"a correction of {len(self._rows)} networks, {len(before)} and {len(found)} times.")
        if not (np.isfinite(before) & np.isfinite(found) & (before > 0) & (found > 0)).all():
            raise ConfigError("a correction is fitted on times above 0.")
        logs = np.log(found / before)
        self._variance = float(np.mean(logs**2)) + _NOISE**2
        kernel = self._kernel(self._rows)
        kernel[np.diag_indices_from(kernel)] += _NOISE**2
        self._weights = cho_solve(cho_factor(kernel), logs)

    def __len__(self) -> int:
        return len(self._rows)

    def _kernel(self, rows: np.ndarray) -> np.ndarray:
        """(rows, networks measured)."""
        differing = (rows[:, None] != self._rows[None]).mean(axis=2) if rows.shape[1] else np.zeros((len(rows), 1))
        return self._variance * (_SHARED + (1 - _SHARED) * np.exp(-_DECAY * differing))

    def factors(self, rows: np.ndarray) -> np.ndarray:
        """(rows,) what predictions of encoded architectures (rows, variables) are multiplied by."""
        rows = np.asarray(rows)
        found = np.empty(len(rows))
        for start in range(0, len(rows), 4096):
            part = slice(start, start + 4096)
            found[part] = np.exp(self._kernel(rows[part]) @ self._weights)
        return found
