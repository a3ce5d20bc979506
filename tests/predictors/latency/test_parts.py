"""What stands where in a space's networks, for whatever a space may contain, without a network being built."""

import time
from dataclasses import dataclass

import numpy as np
import pytest

from mixnas.predictors.latency.parts import build_parts
from mixnas.search_space import registry
from mixnas.search_space.cost import cost
from mixnas.search_space.enumeration import cost_corner
from mixnas.search_space.operators.quantization.float import FP32
from mixnas.search_space.registry import Knob, register
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import plan, registry_size_after

from .spaces import FIXED, IMAGE, SPACES


def cell(part, vector):
    linear = sum(stride * max(vector[variable], 0) for variable, stride in part.linear)
    return linear + sum(stride * lift[vector[variable] + 1] for variable, lift, stride in part.lifts)


@pytest.mark.parametrize("name", SPACES)
def test_parts_are_the_plan(name):
    plain, io = SPACES[name]
    space = SearchSpace.from_dict(plain)
    found = build_parts(space, io, registry_size_after)
    seen = set()
    for vector in space.sample_many(500, np.random.default_rng(1)):
        told = []
        for part in found.parts:
            table, at = found.tables[part.table], cell(part, vector)
            row = table.units[at]
            seen.add(int(row))
            told += [(part.name, found.units[row])] * int(table.times[at] if row >= 0 else 0)
        assert sorted(told, key=str) == sorted(plan(space.decode(vector), io), key=str)
    assert len(seen - {-1}) > 0.9 * len(found.units), "hardly any unit is listed that no network has"


def test_only_what_matters_decides():
    """The knobs of a stem that do not change the grid multiply no table but the stem's own."""
    stem = {"name": "conv", "stride": [1, 2], "kernel_size": [1, 3, 5, 7], "position": ["none", "learned"]}
    space = SearchSpace.from_dict({**FIXED, "stem": stem})
    found = build_parts(space, IMAGE, registry_size_after)
    sizes = {part.name: len(found.tables[part.table].units) for part in found.parts}
    assert sizes == {"stem": 16, "stages.0.blocks.0.token": 2, "stages.0.blocks.0.channel": 2, "head": 2}


@dataclass(frozen=True)
class _Stepped(FP32):
    bits: int


@pytest.mark.parametrize("bits", [[4, 8], 4])
@pytest.mark.parametrize("channel_mixer", ["none", ["none", "mlp"], "mlp"])
def test_the_knobs_of_a_policy_of_a_branch_that_may_be_absent(channel_mixer, bits, monkeypatch):
    monkeypatch.setattr(registry, "_operators", dict(registry._operators))  # for this test alone
    knobs = {"bits": Knob(8, low=2, high=8)}
    register("quant", "parts_stepped", paper="made for a test", knobs=knobs)(_Stepped)
    policy = {"name": "parts_stepped", "bits": bits}
    quant = {"mixer": ["fp32", policy], "channel_mixer": policy}
    block = {"mixer": ["identity", "pooling"], "channel_mixer": channel_mixer, "quant": quant}
    space = SearchSpace.from_dict({"stem": "linear", "stages": [{"width": [4, 8], "block": block}]})
    found = build_parts(space, IMAGE, registry_size_after)
    matrix = space.sample_many(300, np.random.default_rng(0))
    assert len(set(map(bytes, matrix))) == space.size()
    for vector in matrix:
        rows = [found.tables[part.table].units[cell(part, vector)] for part in found.parts]
        told = [found.units[row] for row in rows if row >= 0]
        assert sorted(told, key=str) == sorted((unit for _, unit in plan(space.decode(vector), IMAGE)), key=str)
    values = [cost(architecture, IMAGE).weight_bytes for architecture in space.decode_many(matrix)]
    for largest, value in ((False, min(values)), (True, max(values))):
        corner = cost_corner(space, IMAGE, "weight_bytes", largest=largest)
        assert corner.value == value and space.contains(corner.architecture)


def test_blocks_with_the_same_choices_share_a_table():
    block = {"mixer": ["identity", "pooling"], "channel_mixer": "mlp"}
    stage = {"width": [8, 16], "depth": [1, 2, 3, 4], "block": block}
    found = build_parts(SearchSpace.from_dict({"stem": "conv", "stages": [stage]}), IMAGE, registry_size_after)
    tokens = [part.table for part in found.parts if part.name.endswith("token")]
    assert len(tokens) == 4 and len(set(tokens[1:])) == 1 != len(set(tokens))


def test_many_units_take_seconds():
    """Some eighty thousand distinct units of one block; decoding an architecture for each took minutes."""
    mixers = [{"name": "dwconv", "kernel_size": list(range(3, 32, 2))}, {"name": "attention", "heads": [1, 2, 4, 8]}]
    gates = [{"name": "se", "reduction": list(range(1, 65))}, "none"]
    block = {"mixer": mixers, "gate": gates, "channel_mixer": "mlp", "quant": ["fp32", "bf16"]}
    stage = {"width": [16 * i for i in range(1, 33)], "block": block}
    space = SearchSpace.from_dict({"stem": "conv", "stages": [stage]})
    begun = time.process_time()
    found = build_parts(space, IMAGE, registry_size_after)
    assert len(found.units) > 75_000 and time.process_time() - begun < 5
