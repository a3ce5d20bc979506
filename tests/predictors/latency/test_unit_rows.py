"""Units as rows of integers are the units of the networks, are found again, and survive their file form."""

import json
import subprocess
import sys

import numpy as np
import pytest

from mixnas.predictors.latency.unit_rows import UnitRows
from mixnas.search_space.architecture import Op
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec, Unit, describe, plan

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
                "quant": {"mixer": ["fp32", "bf16"], "channel_mixer": ["fp32", "bf16"]},
                "recursion": [1, 2],
            },
        },
        {"width": 16, "downsample": "conv", "block": {"mixer": "pooling", "channel_mixer": "mlp"}},
    ],
}
IO = IOSpec("image", (16, 16), 3, 10)


def units_of(seed, count=60):
    space = SearchSpace.from_dict(SPACE)
    networks = space.decode_many(space.sample_many(count, np.random.default_rng(seed)))
    return list(dict.fromkeys(unit for network in networks for _, unit in plan(network, IO)))


@pytest.fixture(scope="module")
def units():
    return units_of(0)


def test_rows_are_the_units(units):
    rows = UnitRows.of([*units, *units])
    assert list(rows) == units and len(rows) == len(units) > 50
    assert {rows[i].role for i in range(len(rows))} == {"stem", "downsample", "token", "channel", "head"}
    assert [rows.find(unit) for unit in units] == list(range(len(units)))


def test_what_is_not_there_is_not_found(units):
    rows = UnitRows.of(units[::2])
    assert [rows.find(unit) for unit in units[1::2]] == [-1] * len(units[1::2])
    again = UnitRows.of(reversed(units))
    numbers = [units.index(unit) for unit in again]
    assert rows.find_all(again).tolist() == [-1 if number % 2 else number // 2 for number in numbers]
    strange = Unit("token", (("norm", Op("layer")), ("mixer", Op("new"))), *(units[0].before,) * 2)
    assert rows.find(strange) == -1
    assert rows.take(slice(0)).find(units[0]) == -1


def test_joined_keeps_the_order_and_nothing_twice(units):
    first, second = UnitRows.of(units[:30]), UnitRows.of(units_of(1, 20))
    assert list(first.joined(second, first)) == list(dict.fromkeys([*first, *second]))


def test_descriptions_are_those_of_each_unit(units):
    rows = UnitRows.of(units)
    columns = rows.described()
    for values, unit in zip(columns.values, units, strict=True):
        assert {n: v for n, v in zip(columns.names, values, strict=True) if v} == describe(unit)
    assert len(np.unique(columns.values, axis=0)) == len(units), "different units are told apart"
    chunked = np.concatenate([some.described().select(columns.names) for _, some in rows.chunks()])
    np.testing.assert_array_equal(chunked, columns.values)


def test_the_file_form_is_inverse_and_small(units):
    rows = UnitRows.of(units)
    plain = json.loads(json.dumps(rows.to_plain()))
    assert list(UnitRows.from_plain(plain, rows.rows)) == units
    contexts = len({(unit.role, unit.before, unit.after) for unit in units})
    assert len(plain["frames"]) == contexts and sum(map(len, plain["slots"])) < 25 < len(units)


def test_no_torch():
    names = ("lookup", "predictor", "query", "unit_rows")
    imports = ", ".join(f"mixnas.predictors.latency.{name}" for name in names)
    code = f"import sys, {imports}, mixnas.predictors.measuring.table; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
