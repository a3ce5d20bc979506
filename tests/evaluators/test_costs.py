"""Costs of many encoded architectures are those of each."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from mixnas.evaluators.costs import SpaceCosts, costs
from mixnas.search_space.cost import cost
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec

IO = IOSpec("image", (8, 8), 3, 10)
BLOCK = {
    "mixer": ["identity", {"name": "dwconv", "kernel_size": [3, 5]}, {"name": "attention", "heads": [2, 4]}],
    "gate": ["none", "se"],
    "channel_mixer": ["none", {"name": "mlp", "expansion": [1, 2]}],
    "quant": ["fp32", "bf16"],
    "recursion": [1, 2],
}
SPACES = {
    "two stages": {
        "stem": ["conv", {"name": "patch", "patch_size": [2, 4]}],
        "norm": ["layer", "rms"],
        "stages": [
            {"width": [8, 16], "depth": [1, 3], "block": BLOCK},
            {"width": [16, 32], "depth": [1, 2], "downsample": ["patch", "none"], "block": BLOCK},
        ],
    },
    "shared": {
        "stem": {"name": "conv", "stride": [1, 2]},
        "stages": [{"width": [8, 16], "depth": [1, 2, 3], "share": True, "block": BLOCK}],
    },
    "nothing to choose in a block": {
        "stem": "conv",
        "stages": [{"width": 8, "depth": [1, 2], "block": {"mixer": "identity", "channel_mixer": "mlp"}}],
    },
    "no choice": {"stem": "conv", "stages": [{"width": 8, "block": {"mixer": "identity", "channel_mixer": "mlp"}}]},
}


@pytest.mark.parametrize("name", SPACES)
def test_many_are_each(name):
    space = SearchSpace.from_dict(SPACES[name])
    matrix = space.sample_many(150, np.random.default_rng(0))
    expected = [asdict(cost(architecture, IO)) for architecture in space.decode_many(matrix)]
    together, counted = SpaceCosts(space, IO), SpaceCosts(space, IO)
    for rows in (matrix, matrix[:1], matrix[:0]):
        found = together.of(rows)
        for metric, values in found.items():
            assert values.tolist() == [each[metric] for each in expected[: len(rows)]]
    one_by_one = [{metric: value[0] for metric, value in counted.of(row[None]).items()} for row in matrix]
    assert one_by_one == expected


def test_peak_memory_of_many_is_that_of_each():
    space = SearchSpace.from_dict(SPACES["two stages"])
    matrix = space.sample_many(30, np.random.default_rng(1))
    found = SpaceCosts(space, IO, memory=True).of(matrix)
    for i, architecture in enumerate(space.decode_many(matrix)):
        assert {name: values[i] for name, values in found.items()} == costs(architecture, IO, memory=True)
    assert "peak_memory_bytes" not in SpaceCosts(space, IO).of(matrix[:1])
