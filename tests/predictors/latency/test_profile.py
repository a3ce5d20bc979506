"""What a profile measures, and when it ends."""

from __future__ import annotations

import time

from mixnas.predictors.latency.profile import ProfileConfig, profile
from mixnas.predictors.measuring.measure import MeasureConfig
from mixnas.predictors.measuring.table import MeasurementTable
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec

IMAGE = IOSpec("image", (8, 8), 1, 4)
QUICK = MeasureConfig(passes=1, window_ms=0.5, sentinel_repeats=3, max_extra_passes=0)


def space() -> SearchSpace:
    block = {
        "mixer": ["identity", "pooling", {"name": "dwconv", "kernel_size": [3, 5]}],
        "channel_mixer": ["none", "mlp"],
    }
    return SearchSpace.from_dict({"stem": "conv", "stages": [{"width": [4, 8], "depth": [1, 2], "block": block}]})


def test_a_profile_that_is_out_of_time_goes_on_until_it_can_fit(tmp_path):
    """A budget that ends before twelve networks are measured, as on a machine that is busy otherwise."""
    config = ProfileConfig(budget_s=2.0, measure=QUICK)
    predictor = profile(space(), IMAGE, device="cpu", directory=tmp_path, config=config)
    assert predictor.meta["num_networks"] >= config.fit.min_networks and predictor.meta["num_units"] >= 8


def test_it_stops_when_it_is_asked_to_or_nothing_comes_of_it(tmp_path, monkeypatch):
    from mixnas.predictors.latency.profile import Profiler

    measured: list[int] = []
    profiler = Profiler(
        space(), IMAGE, device="cpu", runtime="eager", directory=tmp_path, config=ProfileConfig(measure=QUICK)
    )
    monkeypatch.setattr(profiler, "measure", lambda subjects, *_: measured.append(len(subjects)))
    profiler.go_on_until_fit(time.monotonic() + 60, should_stop=lambda: len(measured) == 3)
    assert measured == [20, 20, 20]  # twelve networks and eight units, each time anew: nothing was measured
    profiler.go_on_until_fit(time.monotonic() - 1)
    assert len(measured) == 3
    assert MeasurementTable.load(tmp_path, profiler.name, "eager").subjects == {}
