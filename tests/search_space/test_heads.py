"""Heads with knobs: the task sets them in its interface."""

from __future__ import annotations

import json

import pytest
import torch

from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.network import IOSpec, Network

ARCHITECTURE = Architecture.from_dict(
    {"stem": "conv", "stages": [{"width": 8, "block": {"mixer": "identity", "channel_mixer": "mlp"}}]}
)


def finer(scale: int, **settings) -> IOSpec:
    out = (4 * scale, 6 * scale)
    return IOSpec("image", (4, 6), 3, 2, head="sub_pixel", out_size=out, head_knobs={"scale": scale}, **settings)


@pytest.mark.parametrize("scale", [1, 3])
def test_a_network_answers_on_the_finer_grid(scale):
    io = finer(scale)
    network = Network(ARCHITECTURE, io, generator=torch.Generator().manual_seed(0))
    assert network(io.example(2)).shape == (2, 4 * scale, 6 * scale, 2)


def test_the_interface_comes_back_from_plain_data():
    io = finer(3)
    again = IOSpec.from_plain(json.loads(json.dumps(io.to_plain())))
    assert again == io and hash(again) == hash(io) and again.head_op == io.head_op
    assert io == IOSpec("image", (4, 6), 3, 2, head="sub_pixel", out_size=(12, 18), head_knobs=(("scale", 3),))
    assert io != finer(2)
    assert "head_knobs" not in IOSpec("image", (4, 6), 3, 2).to_plain()  # files of before have none


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"scal": 3}, "no knob 'scal'.*Did you mean 'scale'"),
        ({"scale": 0}, "scale is 0. Allowed: a whole number from 1 to 16"),
        (("scale", 3), "must be a mapping"),
        ({"scale": [2, 3]}, "must be a mapping"),
    ],
)
def test_wrong_knobs_are_refused(knobs, says):
    with pytest.raises(ConfigError, match=says):
        Network(ARCHITECTURE, IOSpec("image", (4, 6), 3, 2, head="sub_pixel", head_knobs=knobs))


def test_a_grid_that_the_head_does_not_make_is_refused():
    with pytest.raises(ConfigError, match="answers on 12x18, and the task's targets are 8x12"):
        Network(ARCHITECTURE, IOSpec("image", (4, 6), 3, 2, "sub_pixel", out_size=(8, 12), head_knobs={"scale": 3}))
