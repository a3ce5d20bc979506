"""How far off a guess at an operator is that was never measured: whole operators are left out to tell."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mixnas.predictors.latency.fit import fit
from mixnas.predictors.latency.lookup import SpaceUnits
from mixnas.predictors.latency.model import Columns, FitConfig
from mixnas.predictors.latency.outside import groups_of, half_width_outside
from mixnas.search_space.space import SearchSpace

from .devices import IO, PLAIN, WORKS, device

CONFIG = FitConfig(num_trees=5)


def _operators(count: int, spread: float, rng: np.random.Generator) -> tuple[Columns, Columns, np.ndarray]:
    """Twelve units each of so many operators, which all multiply alike, each with a factor of its own on its time."""
    works, settings, ms = [], [], []
    for operator in range(count):
        factor = rng.lognormal(0, spread)
        for macs in rng.uniform(1e5, 1e7, 12):
            works.append({"linear.calls": 1.0, "linear.macs": macs})
            settings.append({"role=token": 1.0, f"mixer=op{operator}": 1.0})
            ms.append((0.004 + 1e-6 * macs) * factor)
    return Columns.of(works), Columns.of(settings), np.array(ms)


def test_the_interval_covers_operators_that_nobody_measured():
    covered = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        width = half_width_outside(*_operators(20, 0.5, rng), CONFIG)
        new = np.abs(rng.normal(0, 0.5, 500))  # logarithms of what new operators are off by
        covered.append((new <= width).mean())
    assert 0.8 < np.mean(covered) < 1.0
    # and where operators hardly differ, it is narrow
    assert half_width_outside(*_operators(20, 0.02, np.random.default_rng(0)), CONFIG) < 0.1


def test_of_too_few_operators_there_is_no_telling():
    assert half_width_outside(*_operators(5, 0.5, np.random.default_rng(0)), CONFIG) is None
    works, settings, ms = _operators(1, 0.5, np.random.default_rng(0))
    assert groups_of(settings) == [] and half_width_outside(works, settings, ms, CONFIG) is None


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return device(tmp_path_factory.mktemp("tables"), "cpu-old-1t", 40, np.random.default_rng(7))


def test_a_network_s_interval_grows_by_its_share_of_guesses(table):
    space = SearchSpace.from_dict(PLAIN)
    predictor = fit(table, [SpaceUnits(space, IO)], WORKS, FitConfig(num_trees=10))
    block = {"mixer": "attention", "channel_mixer": {"name": "mlp", "expansion": 2}}
    plain = {"stem": {"name": "conv", "stride": 2}, "stages": [{"width": 8, "block": block}]}
    unknown = SearchSpace.from_dict(plain).single()
    predictor.meta["half_width_outside"] = math.log(2)
    prediction = predictor.predict(unknown, IO)
    latency = prediction.latency
    assert latency.outside == ("stages.0.blocks.0.token: mixer attention was not measured",) or latency.outside
    guessed = sum(unit.latency_ms for unit in prediction.units if unit.name.endswith("token"))
    spread = math.exp(predictor.half_width)
    assert latency.high_ms == pytest.approx((latency.ms + guessed) * spread)
    assert latency.low_ms == pytest.approx((latency.ms - guessed / 2) / spread)
    predictor.meta["half_width_outside"] = None  # as in files of before
    latency = predictor.predict(unknown, IO).latency
    assert latency.low_ms is None and latency.high_ms is None and latency.outside and latency.ends == {}
    known = predictor.predict(space.sample(np.random.default_rng(0)), IO).latency
    assert known.low_ms is not None and known.outside == ()
