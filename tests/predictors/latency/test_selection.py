"""Networks of every size, and an interval that is calibrated on uniformly drawn ones."""

from dataclasses import replace

import numpy as np
import pytest

from mixnas.predictors.latency.fit import fit
from mixnas.predictors.latency.model import FitConfig
from mixnas.predictors.latency.profile import ProfileConfig, Profiler
from mixnas.predictors.latency.selection import draw_by_size, unit_sizes
from mixnas.predictors.measuring.measure import MeasureConfig
from mixnas.predictors.measuring.table import BY_SIZE, MeasurementTable
from mixnas.predictors.units import architecture_from_canonical
from mixnas.search_space.network import IOSpec
from mixnas.search_space.space import SearchSpace

PLAIN = {
    "stem": {"name": "conv", "stride": 2},
    "stages": [
        {
            "width": [8, 16, 32],
            "depth": [1, 2, 3, 4],
            "block": {
                "mixer": ["identity", {"name": "dwconv", "kernel_size": [3, 5]}],
                "gate": ["none", "se"],
                "channel_mixer": ["none", {"name": "mlp", "expansion": [1, 2, 4]}],
            },
        }
    ],
}
IO = IOSpec("image", (8, 8), 1, 10)
QUICK = ProfileConfig(
    max_networks=60, measure=MeasureConfig(passes=1, window_ms=0.2, sentinel_repeats=2, max_extra_passes=0)
)


def profiler(directory, plain=PLAIN, **changes):
    space = SearchSpace.from_dict(plain)
    config = replace(QUICK, **changes)
    return Profiler(space, IO, device="cpu", runtime="eager", directory=directory, config=config)


def sizes(of, subjects):
    architectures = [architecture_from_canonical(what.config["architecture"]) for what in subjects]
    return np.log(of._size_of(of.space.encode_many(architectures)))


def test_units_without_and_with_work():
    units = [{"matmul.calls": 2.0, "matmul.macs": 100.0, "view.calls": 9.0}, {"pointwise.calls": 4.0}, None]
    assert unit_sizes(units)[:2] == pytest.approx([2 / 3 + 2, 4 / 3])
    assert np.isnan(unit_sizes(units)[2])


def test_sizes_are_spread_over_the_whole_range(tmp_path):
    of = profiler(tmp_path, by_size_share=0.5)
    chosen = of.choose_networks(60)
    by_size = np.sort(sizes(of, [what for what in chosen if what.work]))
    uniform = sizes(of, [what for what in chosen if not what.work])
    assert 25 <= len(by_size) <= 30 and len(uniform) == 30
    everything = np.log(of._size_of(of.space.sample_many(20000, np.random.default_rng(0))))
    low, high = everything.min(), everything.max()
    assert by_size[0] < low + 0.1 * (high - low) and by_size[-1] > high - 0.1 * (high - low)
    # Each third of the range, on a logarithmic scale, holds about a third of them.
    for third in range(3):
        inside = (by_size >= low + third / 3 * (high - low)) & (by_size <= low + (third + 1) / 3 * (high - low))
        assert 0.2 < inside.mean() < 0.47
    assert by_size.std() > 1.3 * uniform.std()


def test_the_same_seed_draws_the_same(tmp_path):
    first, second, third = (
        [what.id for what in profiler(tmp_path / name, seed=seed).choose_networks(40)]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == second != third


def test_no_network_twice_when_it_goes_on(tmp_path):
    of = profiler(tmp_path)
    of.measure(of.choose_networks(16), deadline=float("inf"))
    again = profiler(tmp_path)
    known = {identity for identity in again.table.subjects if again.table.accepted(identity)}
    assert sum(BY_SIZE in what.work for what in again.table.subjects.values()) >= 3
    more = again.choose_networks(16)
    assert len(known) >= 4 and len(more) >= 12 and not known & {what.id for what in more}
    table = MeasurementTable.load(tmp_path, again.name, "eager")
    assert table.uniform(table.subjects).sum() == sum(not what.work for what in table.subjects.values())


def test_small_spaces_are_drawn_uniformly(tmp_path):
    single = {
        "stem": {"name": "conv", "stride": 2},
        "stages": [{"width": 8, "block": {"mixer": "identity", "channel_mixer": {"name": "mlp", "expansion": 2}}}],
    }
    one = profiler(tmp_path, single)
    assert [what.work for what in one.choose_networks(10)] == [{}]
    assert draw_by_size(one.space, one._size_of, 3, np.random.default_rng(0)).shape == (3, 0)
    few = profiler(tmp_path, {**PLAIN, "stages": [{**PLAIN["stages"][0], "depth": 1}]})
    assert not any(what.work for what in few.choose_networks(20))


def test_the_interval_is_calibrated_on_uniform_networks(tmp_path):
    of = profiler(tmp_path, by_size_share=0.4)
    of.measure([*of.choose_units(20), *of.choose_networks(40)], deadline=float("inf"))
    uniform = int(of.table.uniform(of.table.latencies("network")).sum())
    predictor = fit(of.table, [of.to_fit], of.work_of, FitConfig(num_trees=20))
    assert predictor.accuracy["networks"] == round(0.4 * uniform) < round(0.4 * 40)
