"""What a profile measures, and when it ends."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from mixnas.predictors.latency import profile as profile_module
from mixnas.predictors.latency.profile import ProfileConfig, Profiler, profile
from mixnas.predictors.latency.selection import largest_affordable
from mixnas.predictors.measuring.measure import MeasureConfig, Window
from mixnas.predictors.measuring.table import MeasurementTable
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError
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
    measured: list[int] = []
    profiler = Profiler(
        space(), IMAGE, device="cpu", runtime="eager", directory=tmp_path, config=ProfileConfig(measure=QUICK)
    )
    monkeypatch.setattr(profiler, "measure", lambda subjects, *_, **__: measured.append(len(subjects)))
    profiler.go_on_until_fit(time.monotonic() + 60, should_stop=lambda: len(measured) == 3)
    assert measured == [20, 20, 20]  # twelve networks and eight units, each time anew: nothing was measured
    assert not profiler.go_on_until_fit(time.monotonic() - 1)  # out of time
    assert len(measured) == 3
    assert MeasurementTable.load(tmp_path, profiler.name, "eager").subjects == {}


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(("network_s", "networks"), [(0.1, 200), (1.5, 15), (4.0, 12)])
def test_what_is_measured_is_planned_from_the_first_timings(tmp_path, monkeypatch, network_s, networks):
    """At 224 x 224 a network takes seconds: first what a fit needs, then as many more as there is time for."""
    clock, rounds = _Clock(), []
    profiler = Profiler(
        space(), IMAGE, device="cpu", runtime="eager", directory=tmp_path, config=ProfileConfig(measure=QUICK)
    )

    def size_of(what):
        encoded = profiler.space.encode(Architecture.from_canonical(what.config["architecture"]))
        return float(profiler._size_of(encoded[None])[0]) / mean

    mean = np.nanmean(profiler._size_of(profiler.space.sample_many(500, np.random.default_rng(1))))

    def measure(subjects, deadline, *_, **__):
        kinds = [what.kind for what in subjects]
        expected = {
            what.id: network_s * size_of(what) if what.kind == "network" else network_s / 20 for what in subjects
        }
        rounds.append((kinds.count("network"), kinds.count("unit"), deadline - clock.now, sum(expected.values())))
        for what in subjects:
            if clock.now >= deadline:
                break
            clock.now += expected[what.id]
        for kind in set(kinds):
            profiler._building[kind] = 0.0
            profiler._window[kind] = np.mean([expected[what.id] for what in subjects if what.kind == kind])
        profiler._last = [what for what in subjects if what.kind == "network"] or profiler._last
        for what in subjects:
            profiler.table.subjects[what.id] = what
            profiler.table.windows[what.id] = [Window(0, 0, np.ones(3), 1.0, 1.0)]
        return len(subjects)

    monkeypatch.setattr(profile_module, "time", clock)
    monkeypatch.setattr(profiler, "measure", measure)
    profiler.run(60.0, 0.5)
    assert rounds[0][0] == 2 and rounds[0][1] >= 8
    assert rounds[0][0] + rounds[1][0] == 12
    measured = [what.kind for what in profiler.table.subjects.values()].count("network")
    assert measured >= min(networks, space().size() // 2)
    # no round was given more than there was time for, by more than the least that a round has
    for _, _, left, expected in rounds[1:]:
        assert expected <= max(1.2 * left, 3 * network_s)


def test_where_too_few_networks_are_small_enough_the_smallest_of_the_others_are_measured(tmp_path):
    """A busy machine: a profile went on with the smallest alone, had soon measured all of these, and could not fit."""
    profiler = Profiler(
        space(), IMAGE, device="cpu", runtime="eager", directory=tmp_path, config=ProfileConfig(measure=QUICK)
    )

    def sizes(subjects):
        found = [Architecture.from_canonical(what.config["architecture"]) for what in subjects]
        return profiler._size_of(profiler.space.encode_many(found))

    whole = np.sort(np.unique(profiler._size_of(profiler.space.sample_many(2000, np.random.default_rng(0)))))
    chosen = profiler.choose_networks(20, largest=float(whole[2]))
    small = sizes(chosen) <= whole[2]
    others = sizes(chosen)[~small].tolist()
    assert len(chosen) == 20 and small[0] and others and others == sorted(others)
    assert small.tolist() == sorted(small.tolist(), reverse=True)
    assert sizes(chosen).max() < np.median(whole)


def test_the_largest_networks_that_there_is_time_for():
    sizes = np.array([1.0, 2.0, math.nan, 3.0, 10.0])
    assert largest_affordable(sizes, 1.0, 4, 16.0) == math.inf  # four of the mean size, 4
    assert largest_affordable(sizes, 1.0, 4, 15.9) == 3.0  # four of 1, 2 and 3 take 8 in the mean
    assert largest_affordable(sizes, 2.0, 4, 15.9) == 2.0
    assert largest_affordable(sizes, 1.0, 4, 0.0) == 1.0  # the smallest, whatever they take
    assert largest_affordable(np.array([math.nan]), 1.0, 4, 1.0) == math.inf


def skewed() -> SearchSpace:
    """14 architectures, of which 13 are drawn once in 26 times each."""
    kernels = {"name": "dwconv", "kernel_size": list(range(3, 29, 2))}
    block = {"mixer": ["identity", kernels], "channel_mixer": "none"}
    return SearchSpace.from_dict({"stem": "conv", "stages": [{"width": 4, "block": block}]})


@pytest.mark.parametrize("largest", [math.inf, 0.1])
def test_of_a_small_space_what_is_seldom_drawn_is_measured_too(tmp_path, largest):
    profiler = Profiler(
        skewed(), IMAGE, device="cpu", runtime="eager", directory=tmp_path, config=ProfileConfig(measure=QUICK)
    )
    assert len(profiler.choose_networks(14, largest)) == skewed().size() == 14
    assert len({what.id for what in profiler.choose_networks(600, largest)}) == 14


def test_a_space_that_is_too_small_is_refused_at_once_unless_others_were_measured_before(tmp_path):
    stage = {"width": [4, 8], "block": {"mixer": "identity", "channel_mixer": "mlp"}}
    small = SearchSpace.from_dict({"stem": "conv", "stages": [stage]}, "small.yaml: space")
    config = ProfileConfig(budget_s=2.0, measure=QUICK)
    with pytest.raises(ConfigError, match=r"small.yaml: .*however long.*the space has 2 architectures, and a fit"):
        profile(small, IMAGE, device="cpu", directory=tmp_path, config=config)
    assert not [path for path in tmp_path.glob("*.npz")]
    profile(space(), IMAGE, device="cpu", directory=tmp_path, config=config)
    predictor = profile(small, IMAGE, device="cpu", directory=tmp_path, config=config)
    assert all(predictor.knows(small.decode(row), IMAGE) for row in small.every())
