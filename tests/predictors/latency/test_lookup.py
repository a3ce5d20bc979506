"""Look-up tables agree with the sum over a network's units, for whatever a space may contain."""

import json
from pathlib import Path

import numpy as np
import pytest

from mixnas.predictors.latency import lookup
from mixnas.predictors.latency.lookup import SpaceTable, SpaceUnits, check_tables, tree_from_plain, tree_to_plain
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.files import load_yaml
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec, plan

from .spaces import IMAGE, SPACES, TOKENS

CONFIGS = Path(__file__).parents[3] / "configs"
POLICIES = [{"name": "fp32"}, {"name": "bf16"}]


def made_up(units, operators):
    rng = np.random.default_rng(0)
    pairs = rng.uniform(-0.1, 1, (operators, operators))
    return rng.uniform(0.1, 1, len(units)), rng.random((len(units), operators)) < 0.05, pairs + pairs.T


@pytest.mark.parametrize("operators", [0, 7, 130])
@pytest.mark.parametrize("name", SPACES)
def test_lookups_are_the_sum_over_units(name, operators):
    plain, io = SPACES[name]
    space = SearchSpace.from_dict(plain)
    of = SpaceUnits(space, io)
    unit_ms, has, presence_ms = made_up(of.units, operators)
    table = SpaceTable(of, unit_ms, has, presence_ms)
    encoded = space.sample_many(400, np.random.default_rng(1))
    for vector, found in zip(encoded, table.predict_many(encoded), strict=True):
        rows = [of.units.find(unit) for _, unit in plan(space.decode(vector), io)]
        present = has[rows].any(axis=0)
        once = presence_ms[np.ix_(present, present)].sum()
        assert found == pytest.approx(unit_ms[rows].sum() + once, rel=1e-5)


def test_many_threads_and_portions_answer_as_one(monkeypatch):
    plain, io = SPACES["tricky"]
    space = SearchSpace.from_dict(plain)
    table = SpaceTable(SpaceUnits(space, io), *made_up(SpaceUnits(space, io).units, 70))
    encoded = space.sample_many(5001, np.random.default_rng(2))
    together = table.predict_many(encoded)
    monkeypatch.setattr(lookup, "_CHUNK", 1)
    monkeypatch.setattr(lookup, "_LEAST", 100)
    np.testing.assert_array_equal(table.predict_many(encoded), together)
    np.testing.assert_array_equal(table.predict_many(encoded[:1]), together[:1])
    assert table.predict_many(encoded[:0]).shape == (0,)


def test_a_unit_that_cannot_be_built_shows():
    plain, io = SPACES["tokens"]
    space = SearchSpace.from_dict(plain)
    of = SpaceUnits(space, io)
    unit_ms, has, presence_ms = made_up(of.units, 3)
    broken = next(i for i, unit in enumerate(of.units) if unit.role == "token")
    unit_ms[broken] = np.nan
    encoded = space.sample_many(50, np.random.default_rng(3))
    has_it = [of.units[broken] in dict.fromkeys(u for _, u in plan(a, io)) for a in space.decode_many(encoded)]
    found = SpaceTable(of, unit_ms, has, presence_ms).predict_many(encoded)
    assert np.isnan(found).tolist() == has_it and 0 < sum(has_it) < 50


@pytest.mark.parametrize("name", SPACES)
def test_a_space_survives_its_file_form(name):
    tree = SearchSpace.from_dict(SPACES[name][0]).tree
    assert tree_from_plain(json.loads(json.dumps(tree_to_plain(tree)))) == tree


def test_the_same_space_is_known_by_its_choices():
    of = SpaceUnits(SearchSpace.from_dict(TOKENS), SPACES["tokens"][1])
    assert of.is_of(SearchSpace.from_dict(TOKENS), SPACES["tokens"][1])
    assert not of.is_of(SearchSpace.from_dict(TOKENS), IMAGE)
    assert not of.is_of(SearchSpace.from_dict({**TOKENS, "norm": "rms"}), SPACES["tokens"][1])
    dense = IOSpec("image", (8, 8), 1, 10, head="token", out_size=(4, 4))
    strided = {"stem": {"name": "conv", "stride": 2}, "stages": [{"width": 8, "block": TOKENS["stages"][0]["block"]}]}
    same = IOSpec("image", (8, 8), 1, 10, head="token")
    assert SpaceUnits(SearchSpace.from_dict(strided), dense).is_of(SearchSpace.from_dict(strided), same)


def test_wrong_shape():
    plain, io = SPACES["tokens"]
    of = SpaceUnits(SearchSpace.from_dict(plain), io)
    with pytest.raises(ConfigError, match="this space has"):
        SpaceTable(of, *made_up(of.units, 3)).predict_many(np.zeros((3, 1), dtype=int))


def test_the_default_space_with_more_policies_is_no_wall():
    """With the nine policies to come the default space has 26,244 settings of blocks, which used to be refused."""
    plain = load_yaml(CONFIGS / "digits.yaml")["space"]
    for stage in plain["stages"]:
        stage["block"]["quant"] = {"mixer": POLICIES, "channel_mixer": POLICIES}
        stage["block"]["mixer"].append({"name": "convnext", "kernel_size": [3, 5, 7, 9], "expansion": [0.5, 1, 2, 4]})
    space = SearchSpace.from_dict(plain)
    check_tables(space, IMAGE)
    of = SpaceUnits(space, IMAGE)
    assert sum(len(cells.units) for cells in of.parts.tables) < lookup.MAX_CELLS / 100


def test_a_space_too_large_to_tabulate_is_refused(monkeypatch):
    plain, io = SPACES["tricky"]
    space = SearchSpace.from_dict(plain, "big.yaml")
    check_tables(space, io)
    monkeypatch.setattr(lookup, "MAX_CELLS", 300)
    with pytest.raises(ConfigError, match=r"big.yaml: .* allowed are 300.*stages\[0\], mixer"):
        check_tables(space, io)
    with pytest.raises(ConfigError, match="allowed are 300"):
        _ = SpaceUnits(space, io).units


def test_what_is_too_large_is_named():
    mixers = [
        {"name": "convnext", "kernel_size": list(range(3, 32, 2)), "expansion": [i / 4 for i in range(1, 65)]},
        {"name": "dwconv", "kernel_size": list(range(3, 32, 2))},
    ]
    gates = ["none", {"name": "se", "reduction": list(range(1, 9))}]
    block = {"mixer": mixers, "channel_mixer": "mlp", "gate": gates, "quant": ["fp32", "bf16"]}
    stage = {"width": list(range(8, 264)), "block": block}
    with pytest.raises(ConfigError) as error:
        check_tables(SearchSpace.from_dict({"stem": "conv", "stages": [stage]}, "huge"), IMAGE)
    text = str(error.value)
    assert "stages.0.blocks.0.token alone" in text and "975 of mixer" in text and "256 of width" in text
    assert "Give fewer choices at stages[0], mixer" in text
