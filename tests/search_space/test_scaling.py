"""Compound scaling: the published factors, what they do to a space, and what has to fit afterwards."""

from __future__ import annotations

import pytest

from mixnas.search_space.architecture import Architecture
from mixnas.search_space.cost import cost
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.scaling import Rule, missed, scale_extents, scale_space, scale_stages, to_multiple
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec

IO = IOSpec("image", (16, 16), 3, 10)


def stage(**settings):
    return {"width": 16, "block": {"mixer": "identity", "channel_mixer": "mlp"}, **settings}


@pytest.mark.parametrize(
    ("share", "depth", "width", "resolution", "params", "activations"),
    [
        (0.8, 1.1487, 1.7411, 1.0718, 3.48, 2.30),  # fast
        (1.0, 1.0, 2.0, 1.0, 4.0, 2.0),  # width
        (1 / 3, 1.587, 1.260, 1.260, 2.52, 3.17),  # all three alike
    ],
)
def test_factors_are_the_published_ones_at_four(share, depth, width, resolution, params, activations):
    """The rows of the paper's table of model complexities: parameters go with d w^2, activations with d w r^2."""
    rule = Rule(4.0, share)
    assert (rule.depth, rule.width, rule.resolution) == pytest.approx((depth, width, resolution), abs=1e-3)
    assert rule.depth * rule.width**2 * rule.resolution**2 == pytest.approx(4.0)
    assert rule.depth * rule.width**2 == pytest.approx(params, rel=2e-3)
    assert rule.depth * rule.width * rule.resolution**2 == pytest.approx(activations, rel=2e-3)


@pytest.mark.parametrize("factor", [0.3, 2.0, 7.0])
def test_back_and_forth_is_where_it_began(factor):
    there, back = Rule(factor), Rule(1 / factor)
    for name in ("depth", "width", "resolution"):
        assert getattr(there, name) * getattr(back, name) == pytest.approx(1.0)


def test_width_alone_multiplies_dense_blocks_by_the_factor():
    """An MLP's multiply-accumulates are quadratic in width: exactly four times, stem and head by twice."""
    space = {"stem": "conv", "stages": [stage(width=[16, 32], depth=[2, 3])]}
    scaled = scale_space(space, Rule(4.0, 1.0), IO, "here")
    assert scaled["stages"][0]["width"] == [32, 64] and scaled["stages"][0]["depth"] == [2, 3]
    one, four = (cost(Architecture.from_dict({**space, "stages": [stage(width=w)]}), IO).macs for w in (16, 32))
    ends = 16 * 16 * 9 * 3 * 16 + 16 * 10
    assert four - 2 * ends == 4 * (one - ends)


def test_every_way_of_writing_a_stage_is_scaled():
    blocks = [{"mixer": m, "channel_mixer": "mlp"} for m in ("identity", "pooling")]
    space = {"stem": "conv", "stages": [stage(width=[16, 24], depth=[1, 2, 3]), {"width": 40, "blocks": blocks}]}
    scaled = scale_stages(space, Rule(64.0), 8)  # depth x 1.52, width x 5.28
    first, second = scaled["stages"]
    assert first["width"] == [88, 128] and first["depth"] == [2, 3, 5]
    assert second["width"] == 208 and second["blocks"] == [blocks[0], blocks[0], blocks[1]]
    assert space["stages"][0]["width"] == [16, 24]  # nothing of the given was changed
    small = scale_stages(space, Rule(0.05), 8)
    assert small["stages"][0]["width"] == 8 and small["stages"][0]["depth"] == [1, 2]
    assert len(small["stages"][1]["blocks"]) == 1


def test_heads_divide_the_new_widths():
    """96 and 192 by 1.32 are 127 and 253: the nearest multiples of 8 and 16 have no 6 heads, those of 24 do."""
    block = {"mixer": {"name": "attention", "heads": 6}, "channel_mixer": "mlp"}
    space = {"stem": "conv", "stages": [stage(width=[96, 192], block=block)]}
    scaled = scale_space(space, Rule(2.0), IO, "here")
    assert scaled["stages"][0]["width"] == [120, 264]
    SearchSpace.from_dict(scaled, "scaled")


def test_what_fits_nowhere_is_said():
    block = {"mixer": {"name": "attention", "heads": 7}, "channel_mixer": "mlp"}
    space = {"stem": "conv", "stages": [stage(width=112, block=block)]}
    with pytest.raises(ConfigError, match=r"7 heads.*No widths that are multiples of 8, 16.*by another factor"):
        scale_space(space, Rule(2.0), IO, "here")


def test_multiples_and_extents():
    assert [to_multiple(v, 8) for v in (1, 11.9, 12, 20)] == [8, 8, 16, 24]
    assert scale_extents([224], Rule(4.0), 32) == [256] and scale_extents([32, 64], Rule(4.0), 4) == [36, 68]


def test_a_factor_that_is_missed_is_told_with_what_was_rounded_away():
    space = {"stem": "conv", "stages": [stage(width=[16, 32], depth=[2, 3])]}
    rule = Rule(4.0)
    scaled = scale_stages(space, rule, 8)  # width 32 x 1.74 is 56, depth 3 x 1.15 is 3
    assert not missed(rule, 3.9, (space, scaled), ((16, 16), (16, 16)))
    told = missed(rule, 2.9, (space, scaled), ((16, 16), (16, 16)))
    assert told.startswith("the factor 4 is missed: macs of the largest network x 2.9;")
    assert (
        "depth (to whole blocks) x 1 instead of 1.15" in told and "resolution" in told and "x 1 instead of 1.07" in told
    )
    exact = missed(Rule(4.0, 1.0), 3.0, (space, scale_stages(space, Rule(4.0, 1.0), 8)), ((16, 16), (16, 16)))
    assert "stem and head" in exact and "rounding" not in exact
