"""Asking about files."""

import numpy as np
import pytest

from mixnas.predictors.latency.fit import fit
from mixnas.predictors.latency.lookup import SpaceUnits
from mixnas.predictors.latency.model import FitConfig
from mixnas.predictors.latency.predictor import plain_digest
from mixnas.predictors.latency.query import ask, ask_sample, to_plain
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec

from .devices import IO, PLAIN, WORKS, device

LARGER = IOSpec("image", (16, 16), 1, 10)
SPACE = SearchSpace.from_dict(PLAIN)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return device(tmp_path_factory.mktemp("tables"), "cpu-old-1t", 40, np.random.default_rng(7))


def fitted(table, *inputs):
    spaces = [SpaceUnits(SPACE, io, (plain_digest(PLAIN),)) for io in inputs]
    return fit(table, spaces, WORKS, FitConfig(num_trees=10))


def test_an_architecture_in_any_spelling(table):
    predictor = fitted(table, IO)
    architecture = SPACE.sample(np.random.default_rng(0))
    wanted = predictor.predict(architecture)

    def short(mixer):
        block = {"mixer": mixer, "channel_mixer": "swiglu"}
        return {"stem": {"name": "conv", "stride": 2}, "stages": [{"width": 8, "block": block}]}

    assert ask(predictor, architecture.to_dict(), "a.yaml") == wanted
    assert ask(predictor, {"space": architecture.to_dict()}, "a.yaml", IO) == wanted
    assert ask(predictor, short("pooling"), "short.yaml").latency.ms > 0
    with pytest.raises(ConfigError, match=r"wrong\.yaml.*Did you mean 'pooling'"):
        ask(predictor, short("poling"), "wrong.yaml")


def test_a_sample_is_the_spaces(table):
    predictor = fitted(table, IO)
    rows = ask_sample(predictor, SPACE, 5, 3, IO)
    assert rows == ask_sample(predictor, predictor.spaces[0].space, 5, 3, IO) and len(rows) == 5
    for row, architecture in zip(rows, SPACE.decode_many(SPACE.sample_many(5, np.random.default_rng(3))), strict=True):
        assert row["id"] == architecture.id and row["architecture"] == architecture.to_dict()
        assert row["latency_ms"] == predictor.predict(architecture).latency.ms
        assert set(row) == {"id", "architecture", *to_plain(predictor.predict(architecture))}
    with pytest.raises(ConfigError, match="whole number from 1"):
        ask_sample(predictor, SPACE, 0, 3, IO)


def test_with_several_inputs_one_must_be_named(table):
    predictor = fitted(table, IO, LARGER)
    plain = SPACE.sample(np.random.default_rng(0)).to_dict()
    with pytest.raises(ConfigError, match=r"profiled for image 8x8 .*; image 16x16"):
        ask(predictor, plain, "a.yaml")
    small, large = (ask(predictor, plain, "a.yaml", io).latency for io in (IO, LARGER))
    assert small.ms < large.ms and small.outside == large.outside == ()
    sampled = [ask_sample(predictor, SPACE, 1, 0, io)[0]["latency_ms"] for io in (IO, LARGER)]
    assert sampled[0] < sampled[1]
    other = ask(predictor, plain, "a.yaml", IOSpec("image", (32, 32), 1, 10)).latency
    assert "image 32x32" in other.outside[0] and other.ms > large.ms
