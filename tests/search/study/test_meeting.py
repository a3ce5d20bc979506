"""Whether constraints can be kept: by themselves, by a metric's range, and by the architectures of a space."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mixnas.evaluators.costs import SpaceCosts
from mixnas.search.config import read_config
from mixnas.search.study.bounds import POSITIVE, SHARE, check_contradictions
from mixnas.search.study.feasibility import check_costs, corners
from mixnas.search.study.meeting import nearest, ruled_out
from mixnas.search.study.objectives import Comparison, parse_constraint, parse_constraints
from mixnas.search_space.errors import ConfigError, InfeasibleError
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec
from tests.search.problems import SPACE, TINY

IO = IOSpec("image", (8, 8), 1, 10)


@pytest.fixture(scope="module")
def tiny():
    space = SearchSpace.from_dict(TINY)
    return space, SpaceCosts(space, IO, memory=True).of, corners(space, IO)


@pytest.fixture(scope="module")
def large():
    """Of some 100,000 architectures: too many to look at each."""
    space = SearchSpace.from_dict(SPACE)
    assert space.size() > 20_000
    return space, SpaceCosts(space, IO, memory=True).of, corners(space, IO)


def check(of, *texts: str) -> str:
    space, known, found = of
    return check_costs(space, IO, parse_constraints(list(texts)), known, found)


@pytest.mark.parametrize(
    ("texts", "asked"),
    [
        (["params >= 4000", "params <= 1000"], "at least 4000 and at most 1000"),
        (["accuracy > 0.9", "params <= 10", "accuracy < 0.9"], "above 0.9 and below 0.9"),
        (["params <= 5", "params > 5"], "above 5 and at most 5"),
        (["params == 5", "params == 6"], "exactly 6 and exactly 5"),
        (["params == 5", "params < 5"], "exactly 5 and below 5"),
        (["about 5k parameters", "about 7k params"], "at least 6300 and at most 5500"),
        (["params <= 9", "params >= 1", "params >= 7", "params <= 6"], "at least 7 and at most 6"),
    ],
)
def test_two_that_leave_no_value_are_refused_as_the_file_is_read(texts, asked):
    with pytest.raises(ConfigError, match=f"c.yaml.*cannot both be kept: .* would have to be {asked}") as raised:
        read_config({"constraints": texts}, "c.yaml")
    assert sum(f"'{text}'" in str(raised.value) for text in texts) == 2


@pytest.mark.parametrize(
    "texts",
    [
        ["about 5k parameters", "about 6k parameters"],  # both allow 5,400 to 5,500
        ["params >= 5", "params <= 5", "params == 5"],
        ["params > 5", "macs < 5", "latency_ms@cpu-x-1t < 5", "latency_ms > 5"],
    ],
)
def test_what_numbers_can_keep_is_none_of_these(texts):
    check_contradictions(texts)


def test_a_range_allows_what_one_of_its_values_keeps():
    values = [0.0, 0.25, 1.0]
    for comparison in ("<", "<=", ">", ">=", "=="):
        for bound in (-1.0, 0.0, 0.25, 1.0, 97.0):
            one = Comparison("m", comparison, bound)
            assert SHARE.allows(one) == any(one.holds({"m": value}) for value in values), one
            above = [math.ulp(0.0), 0.25, 1.0, 1e300]
            assert POSITIVE.allows(one) == any(one.holds({"m": value}) for value in above) or bound == 97.0, one


def test_of_a_small_space_it_is_known_for_certain(tiny):
    """Every pair of bounds at and beside what architectures cost; the whole space is the oracle."""
    space, known, _ = tiny
    costs = known(space.every())
    params, macs = (np.unique(costs[name])[::4] for name in ("params", "macs"))
    for p in [*params, *(params + 1)]:
        for m in macs:
            texts = f"params <= {p:.0f}", f"macs >= {m:.0f}"
            if ((costs["params"] <= p) & (costs["macs"] >= m)).any():
                assert check(tiny, *texts) == ""
            else:
                with pytest.raises(InfeasibleError, match="no architecture of the space meets"):
                    check(tiny, *texts)
        one = f"params == {p:.0f}"
        if p in costs["params"]:
            assert check(tiny, one) == ""
        else:
            with pytest.raises(InfeasibleError, match=rf"meets {one}: (of all \d+ the nearest has )?params"):
                check(tiny, one)


@pytest.mark.parametrize("text", ["peak_memory_bytes >= 1e15", "peak_memory_bytes <= 10"])
def test_peak_memory_beyond_the_space_is_refused_on_either_side(tiny, large, text):
    for of in (tiny, large):
        with pytest.raises(InfeasibleError, match=r"the nearest has peak_memory_bytes [\d,]+"):
            check(of, text)


def test_of_a_large_space_what_one_keeps_is_found(large):
    """Exactly the costs of random architectures, all of them at once."""
    space, known, _ = large
    rows = space.sample_many(4, np.random.default_rng(5))
    for params, macs in zip(*(known(rows)[name] for name in ("params", "macs")), strict=True):
        assert check(large, f"params == {params:.0f}") == ""
        wide = [f"{m} {side} {v * f:.0f}" for m, v in (("params", params), ("macs", macs))
                for side, f in ((">=", 0.98), ("<=", 1.02))]  # fmt: skip
        assert check(large, *wide) == ""


def test_of_a_large_space_what_is_impossible_is_refused_and_what_is_not_known_is_told(large):
    _, _, found = large
    ends = found["params"]["smallest"].value, found["macs"]["largest"].value
    with pytest.raises(InfeasibleError, match=r"together: the nearest has params [\d,]+, macs [\d,]+: (layer|rms)"):
        check(large, f"params <= {ends[0] * 1.2:.0f}", f"macs >= {ends[1] * 0.9:.0f}")
    half = found["params"]["smallest"].value + 0.5  # no number of parameters, and within the corners
    assert f"none meets params == {half}: the nearest has params" in check(large, f"params == {half}")


def test_what_is_ruled_out_no_architecture_keeps(large):
    """Random pairs of bounds; where many random architectures have one that keeps both, it is not ruled out."""
    space, known, _ = large
    rng = np.random.default_rng(0)
    costs = known(space.sample_many(3000, rng))
    said = []
    for _ in range(12):
        p, m = (float(np.quantile(costs[name], rng.random())) for name in ("params", "macs"))
        both = [parse_constraint(f"params <= {p}"), parse_constraint(f"macs >= {m}")]
        kept = (costs["params"] <= p) & (costs["macs"] >= m)
        said.append(ruled_out(space, IO, both))
        assert not (said[-1] and kept.any())
    assert any(said) and not all(said)


def test_what_is_too_rare_to_be_drawn_is_found(large):
    """The one with the fewest parameters, of so many; nothing to begin with."""
    space, known, found = large
    least = found["params"]["smallest"].value
    one = nearest(space, known, [parse_constraint(f"params <= {least:.0f}")], space.encode_many([]))
    assert one.kept and one.values == {"params": least} and not one.every
