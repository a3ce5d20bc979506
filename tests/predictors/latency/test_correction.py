"""Corrections of a predictor by networks that were measured whole."""

from __future__ import annotations

import numpy as np
import pytest

from mixnas.predictors.latency.correction import Correction
from mixnas.search_space.errors import ConfigError


def test_what_was_measured_is_believed_and_neighbours_are_nearly():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 3, size=(400, 12))
    predicted = np.exp(rng.normal(0, 0.3, 400))
    off = 0.25 + 0.15 * (rows[:, 0] == 1) - 0.1 * (rows[:, 5] == 2)  # of the logarithm, as a space's own term
    truth = predicted * np.exp(off)
    correction = Correction(rows[:24], predicted[:24], truth[:24])
    corrected = predicted * correction.factors(rows)
    np.testing.assert_allclose(corrected[:24], truth[:24], rtol=0.02)
    before, after = (np.abs(np.log(p[24:] / truth[24:])).mean() for p in (predicted, corrected))
    assert after < 0.4 * before
    # no better a constant than the mean ratio is needed for that: the choices tell something, too
    constant = predicted * np.exp(off[:24].mean())
    assert after < np.abs(np.log(constant[24:] / truth[24:])).mean()


def test_one_network_corrects_all_in_part_and_itself_wholly():
    rows = np.array([[0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1]])
    correction = Correction(rows[:1], [2.0], [3.0])
    itself, near, far = correction.factors(rows)
    assert itself == pytest.approx(1.5, rel=0.01) and 1.0 < far < near < itself
    assert len(correction) == 1 and correction.factors(rows[:0]).shape == (0,)


@pytest.mark.parametrize(("predicted", "measured"), [([], []), ([1.0], [0.0]), ([1.0], [float("nan")])])
def test_what_is_no_time_is_refused(predicted, measured):
    with pytest.raises(ConfigError, match="correction"):
        Correction(np.zeros((len(predicted), 2)), predicted, measured)
