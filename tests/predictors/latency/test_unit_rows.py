"""Units without torch are the units of the network."""

import json
import subprocess
import sys

import numpy as np
import pytest

from mixnas.predictors.units import (
    Key,
    architecture_from_canonical,
    describe,
    io_fields,
    key_from_plain,
    key_to_plain,
    registry_size_after,
    walk,
)
from mixnas.search_space.network import IOSpec, Unit, plan
from mixnas.search_space.space import SearchSpace

SPACE = {
    "stem": {"name": "conv", "stride": [1, 2], "position": ["none", "learned"]},
    "norm": ["layer", "rms"],
    "stages": [
        {
            "width": [8, 16],
            "depth": [1, 2],
            "downsample": ["none", "patch"],
            "block": {
                "mixer": ["identity", {"name": "attention", "heads": [1, 2]}],
                "gate": ["none", "se"],
                "channel_mixer": ["none", {"name": "swiglu", "expansion": [1, 2.5]}],
                "quant": ["fp32", "bf16"],
                "recursion": [1, 2],
            },
        },
        {"width": 16, "downsample": "conv", "block": {"mixer": "pooling", "channel_mixer": "mlp"}},
    ],
}
IO = IOSpec("image", (16, 16), 3, 10)


@pytest.fixture(scope="module")
def architectures():
    space = SearchSpace.from_dict(SPACE)
    return space.decode_many(space.sample_many(60, np.random.default_rng(0)))


def test_walk_gives_the_plan(architectures):
    for architecture in architectures:
        walked = walk(architecture, io_fields(IO), registry_size_after)
        assert [Unit(name, *key) for name, key in walked] == list(plan(architecture, IO))


def test_plain_forms_are_inverse(architectures):
    for architecture in architectures:
        assert architecture_from_canonical(json.loads(architecture.to_json())) == architecture
        for _, key in walk(architecture, io_fields(IO), registry_size_after):
            assert key_from_plain(json.loads(json.dumps(key_to_plain(key)))) == key


def test_describe_tells_different_units_apart(architectures):
    keys = {key for a in architectures for _, key in walk(a, io_fields(IO), registry_size_after)}
    described = {tuple(sorted(describe(key).items())) for key in keys}
    assert len(described) == len(keys)
    head = next(key for key in keys if key.role == "head")
    assert describe(head)["width"] == 10 and isinstance(head, Key)


def test_no_torch():
    code = "import sys, mixnas.predictors.units, mixnas.predictors.latency.predictor; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
