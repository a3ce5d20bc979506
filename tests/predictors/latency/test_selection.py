"""Networks of every size, and an interval that is calibrated on uniformly drawn ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mixnas.predictors.latency.fit import fit
from mixnas.predictors.latency.lookup import SpaceUnits
from mixnas.predictors.latency.model import Columns, FitConfig, totals
from mixnas.predictors.latency.profile import ProfileConfig, Profiler, profile
from mixnas.predictors.latency.selection import cover, draw_by_size, sample_rows, unit_sizes
from mixnas.predictors.measuring import measure, runtimes
from mixnas.predictors.measuring.measure import MeasureConfig
from mixnas.predictors.measuring.table import BY_SIZE, MeasurementTable
from mixnas.search_space.architecture import Architecture, Op
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.operators.quantization.policy import policy_of
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec

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


@pytest.fixture(autouse=True)
def _steady(monkeypatch):
    """Every window counts: these tests are not about how restless the machine is that runs them."""
    monkeypatch.setattr(measure, "MAX_DRIFT", float("inf"))


def profiler(directory, plain=PLAIN, **changes):
    space = SearchSpace.from_dict(plain)
    config = replace(QUICK, **changes)
    return Profiler(space, IO, device="cpu", runtime="eager", directory=directory, config=config)


def sizes(of, subjects):
    architectures = [Architecture.from_canonical(what.config["architecture"]) for what in subjects]
    return np.log(of._size_of(of.space.encode_many(architectures)))


def test_units_without_and_with_work():
    first = {"matmul.calls": 2.0, "k.8.macs": 100.0, "view.calls": 9.0, "k.rounds.macs": 7.0}
    found = totals(Columns.of([first, {"pointwise.calls": 4.0}]))[:, :2]
    assert found.tolist() == [[2, 100], [4, 0]]
    sizes = unit_sizes(np.vstack([found, [[np.nan, np.nan]]]))
    assert sizes[:2] == pytest.approx([2 / 3 + 2, 4 / 3]) and np.isnan(sizes[2])


@pytest.fixture(scope="module")
def many():
    mixers = [{"name": "dwconv", "kernel_size": [3, 5, 7]}, {"name": "attention", "heads": [1, 2]}, "identity"]
    gates = ["none", {"name": "se", "reduction": list(range(1, 33))}]
    block = {"mixer": mixers, "gate": gates, "channel_mixer": "mlp", "quant": ["fp32", "bf16"]}
    stage = {"width": [16 * i for i in range(1, 17)], "block": block}
    return SpaceUnits(SearchSpace.from_dict({"stem": "conv", "stages": [stage]}), IO).units


def test_a_sample_of_units_has_every_operator(many):
    rows = sample_rows(many, 400, np.random.default_rng(0))
    assert len(many) > 6000 and len(rows) == len(set(rows.tolist())) == 400
    for column, everything in zip(many.rows[rows].T, many.rows.T, strict=True):
        assert set(column) == set(everything)
    assert sorted(sample_rows(many, 10**6, np.random.default_rng(0))) == list(range(len(many)))
    few = sample_rows(many, 3, np.random.default_rng(0))  # more operators than that: all of them all the same
    assert set(many.rows[few, 1]) == set(many.rows[:, 1])


def test_the_first_units_cover_all_settings(many):
    rows = sample_rows(many, 2000, np.random.default_rng(0))
    settings = many.take(rows).described()
    chosen = cover(settings, 60)
    assert len(set(chosen.tolist())) == 60
    assert (settings.values[chosen] != 0).any(axis=0).all(), "every operator, role and knob"
    widths = settings.select(["width"])[chosen, 0]
    assert len(set(widths)) >= 16


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
    uniform = int(of.table.uniform(of.table.measurements("network")).sum())
    predictor = fit(of.table, [of.known], of.works, FitConfig(num_trees=20))
    assert predictor.accuracy["networks"] == round(0.4 * uniform) < round(0.4 * 40)


def test_units_are_chosen_once_and_then_where_the_model_is_unsure(tmp_path):
    of = profiler(tmp_path)
    first = of.choose_units(25)
    assert len({what.id for what in first}) == 25
    assert {what.config["role"] for what in first} == {"stem", "token", "channel", "head"}
    of.measure(first, deadline=float("inf"))
    done = {identity for identity in of.table.subjects if of.table.accepted(identity)}
    second = of.choose_units(10)
    assert len(second) == min(10, len(of.known.units) - len(done)) and not done & {what.id for what in second}
    assert len(of.choose_units(10**6)) == len(of.known.units) - len(done)


def test_what_the_runtime_gets_wrong_is_left_out(tmp_path, monkeypatch):
    """Neither a unit that cannot be built, nor one whose outputs are wrong or that the memory does not hold."""
    real = Profiler.call_of

    def call_of(self, what):
        if what.kind == "unit" and what.config["role"] == "channel":
            raise ConfigError("outputs up to 7 away")
        if what.kind == "network":
            raise torch.cuda.OutOfMemoryError("40 GiB asked for")
        return real(self, what)

    monkeypatch.setattr(Profiler, "call_of", call_of)
    of = profiler(tmp_path)
    units = of.choose_units(1000)
    networks = of.choose_networks(4)
    count = of.measure([*units, *networks], deadline=float("inf"))
    channels = sum(what.config["role"] == "channel" for what in units)
    assert channels > 0 and count == len(units) - channels and len(of.left_out) == channels + 4
    assert not any(what.config["role"] == "channel" for what in of.choose_units(1000))
    assert not {what.id for what in of.choose_networks(4)} & {what.id for what in networks}
    quick = replace(QUICK, budget_s=4.0, max_networks=4)
    with pytest.raises(ConfigError, match=r"needs 12.*were left out, the first because: .*(7 away|40 GiB)"):
        profile(of.space, IO, device="cpu", directory=tmp_path / "again", config=quick)


def test_what_a_runtime_has_no_kernels_for_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(type(policy_of(Op("bf16"))), "why_not", lambda _, device, runtime: f"{runtime} has no kernels")
    block = {"mixer": ["identity", "pooling"], "channel_mixer": "mlp", "quant": ["fp32", "bf16"]}
    space = SearchSpace.from_dict({"stem": "conv", "stages": [{"width": 8, "block": block}]})
    if runtimes.missing("onnxruntime"):
        pytest.skip(runtimes.missing("onnxruntime"))
    of = Profiler(space, IO, device="cpu", runtime="onnxruntime", directory=tmp_path, config=QUICK)
    chosen = [what.config.get("quant") for what in of.choose_units(100)]
    assert "fp32" in chosen and "bf16" not in chosen
    assert all("bf16" not in str(what.config) for what in of.choose_networks(10))
