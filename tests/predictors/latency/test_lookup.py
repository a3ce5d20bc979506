"""Look-up tables agree with the sum over a network's units, for whatever a space may contain."""

import json

import numpy as np
import pytest

from mixnas.predictors.latency import lookup
from mixnas.predictors.latency.lookup import SpaceTable, build_parts, tree_from_plain, tree_to_plain
from mixnas.predictors.units import io_fields, registry_size_after, walk
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.network import IOSpec
from mixnas.search_space.space import SearchSpace

IMAGE = IOSpec("image", (8, 8), 1, 10)
CAUSAL = IOSpec("causal", (16,), 20, 20, head="token", tokens=True)

# Everything that changes which unit stands where: strides, shared blocks, knobs without a choice of operator, depth.
TRICKY = {
    "stem": [{"name": "conv", "stride": [1, 2], "kernel_size": 3}, {"name": "patch", "patch_size": 2}],
    "norm": ["layer", "rms"],
    "stages": [
        {
            "width": [8, 16],
            "depth": [1, 3],
            "block": {
                "mixer": [{"name": "dwconv", "kernel_size": [3, 5]}, {"name": "attention", "heads": [1, 2, 4]}],
                "gate": ["none", "se"],
                "channel_mixer": {"name": "mlp", "expansion": [1, 2]},
            },
        },
        {
            "width": 16,
            "depth": [1, 2],
            "downsample": ["patch", "none"],
            "share": True,
            "block": {"mixer": ["identity", "pooling"], "channel_mixer": "none", "recursion": [1, 2]},
        },
        {
            "width": 16,
            "depth": [1, 2],
            "block": {"mixer": "identity", "channel_mixer": {"name": "mlp", "expansion": 1}},
        },
    ],
}
TOKENS = {
    "stem": "embedding",
    "stages": [
        {
            "width": 16,
            "depth": [1, 2],
            "block": {"mixer": ["attention", "linear_attention"], "channel_mixer": ["mlp", "swiglu"]},
        }
    ],
}
FIXED = {"stem": "conv", "stages": [{"width": 8, "block": {"mixer": "identity", "channel_mixer": "mlp"}}]}
SPACES = {"tricky": (TRICKY, IMAGE), "tokens": (TOKENS, CAUSAL), "fixed": (FIXED, IMAGE)}


def table_of(plain, io):
    space, fields = SearchSpace.from_dict(plain), io_fields(io)
    parts, keys = build_parts(space, lambda a: walk(a, fields, registry_size_after))
    table = SpaceTable(space, fields, parts)
    unit_ms, masks = made_up(len(keys))
    table.bind(unit_ms, masks, PRESENCE)
    return space, table, dict(zip(keys, zip(unit_ms, masks, strict=True), strict=True)), fields


PRESENCE = np.random.default_rng(5).uniform(0.1, 1, 20)


def made_up(count):
    rng = np.random.default_rng(0)
    return rng.uniform(0.1, 1, count), [1 << int(i) for i in rng.integers(0, len(PRESENCE), count)]


@pytest.mark.parametrize("name", SPACES)
def test_lookups_are_the_sum_over_units(name):
    space, table, told, fields = table_of(*SPACES[name])
    encoded = space.sample_many(400, np.random.default_rng(1))
    for vector, found in zip(encoded, table.predict_many(encoded), strict=True):
        units = [key for _, key in walk(space.decode(vector), fields, registry_size_after)]
        operators = {told[key][1] for key in units}
        once = sum(PRESENCE[mask.bit_length() - 1] for mask in operators)
        assert found == pytest.approx(sum(told[key][0] for key in units) + once, rel=1e-5)


@pytest.mark.parametrize("name", SPACES)
def test_a_table_survives_its_file_form(name):
    space, table, _, _ = table_of(*SPACES[name])
    plain = json.loads(json.dumps(table.to_plain()))
    back = SpaceTable.restore(plain, table.to_arrays("p"), "p")
    assert back.space.tree == space.tree == tree_from_plain(json.loads(json.dumps(tree_to_plain(space.tree))))
    back.bind(*made_up(1 + max(int(p.units.max()) for p in table.parts)), PRESENCE)
    encoded = space.sample_many(50, np.random.default_rng(2))
    np.testing.assert_array_equal(back.predict_many(encoded), table.predict_many(encoded))


def test_a_changed_space_is_noticed():
    _, table, _, _ = table_of(*SPACES["tokens"])
    plain = table.to_plain() | {"signature": "0" * 16}
    with pytest.raises(ValueError, match="signature"):
        SpaceTable.restore(plain, table.to_arrays("p"), "p")


def test_wrong_shape():
    _, table, _, _ = table_of(*SPACES["tokens"])
    with pytest.raises(ConfigError, match="this space has"):
        table.predict_many(np.zeros((3, 1), dtype=int))


def test_a_space_too_large_to_tabulate_is_refused(monkeypatch):
    monkeypatch.setattr(lookup, "MAX_UNITS", 10)
    with pytest.raises(ConfigError, match="too many settings"):
        table_of(*SPACES["tricky"])
