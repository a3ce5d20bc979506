"""Tables as spaces: what depends on what, what has gaps, what is refused."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from mixnas.evaluators.protocol import Request
from mixnas.evaluators.tabular import Table, TabularEvaluator
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError

ABOUT = """
name: small
source: made up
knobs:
  op: [conv, none, 3]
  size: [numeric]
  depth: [numeric]
metrics:
  accuracy: max
  latency_ms: min
"""
ROWS = """op,size,depth,accuracy,latency_ms,note
conv,3,1,0.5,1.0,x
conv,5,1,0.6,1.5,x
conv,3,2,0.7,2.0,x
none,,1,0.1,0.5,x
none,,2,0.2,0.6,x
3,,2.0,,0.7,x
conv,3,1,0.7,3.0,again
"""


def write(folder, about=ABOUT, rows=ROWS):
    (folder / "small.yaml").write_text(about)
    (folder / "small.csv").write_text(rows)
    return folder / "small.csv"


def test_a_table_is_read_with_its_conditional_knob(tmp_path):
    table = Table.load(write(tmp_path))
    space = table.space
    assert (table.name, space.size()) == ("small", 6)
    by_name = {v.name: v for v in space.variables}
    assert by_name["op"].values == ("3", "conv", "none") and by_name["depth"].values == (1, 2)
    size = by_name["size"]
    assert size.values == (3, 5) and space.variables[size.parent].name == "op" and size.parent_options == {1}
    # two lines that say the same are one row, with the mean
    row = space.row(space.encode(space.from_params({"op": "conv", "size": 3, "depth": 1})))
    assert table.values["accuracy"][row] == pytest.approx(0.6) and table.values["latency_ms"][row] == 2.0


def test_architectures_go_round(tmp_path):
    space = Table.load(write(tmp_path)).space
    assert len({a.id for a in space.decode_many(space.rows)}) == 6
    for vector in space.rows:
        architecture = space.decode(vector)
        assert (space.encode(architecture) == vector).all()
        assert space.from_params(space.params_of(architecture)) == architecture
        assert Architecture.from_canonical(architecture.to_dict()) == architecture
        assert (space.active(vector) == (vector >= 0)).all()


def test_nothing_leads_out_of_a_table_with_gaps(tmp_path):
    space = Table.load(write(tmp_path)).space
    rows = {tuple(row) for row in space.rows}
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = space.sample(rng), space.sample(rng)
        for architecture in (space.mutate(a, rng), space.crossover(a, b, rng), *space.neighbours(a)):
            assert tuple(space.encode(architecture)) in rows
    # neighbours of neighbours are all of it
    found, frontier = set(), [space.sample(rng)]
    while frontier:
        for one in space.neighbours(frontier.pop()):
            if one.id not in found:
                found.add(one.id)
                frontier.append(one)
    assert len(found) == 6


def test_a_complete_table_is_an_ordinary_space(tmp_path):
    about = "knobs: {a: [x, y], b: [p, q, r]}\nmetrics: {loss: min}\n"
    rows = "a,b,loss\n" + "".join(f"{a},{b},{i}.5\n" for i, (a, b) in enumerate((a, b) for a in "xy" for b in "pqr"))
    space = Table.load(write(tmp_path, about, rows)).space
    assert [len(list(space.neighbours(space.decode(row)))) for row in space.rows] == [3] * 6


def test_a_knob_that_nothing_else_switches_has_a_value_for_its_absence(tmp_path):
    about = "knobs: {a: [x, y], b: [p, q]}\nmetrics: {loss: min}\n"
    space = Table.load(write(tmp_path, about, "a,b,loss\nx,p,1\nx,,2\ny,q,3\ny,,4\n")).space
    assert {v.name: v.values for v in space.variables} == {"a": ("x", "y"), "b": ("-", "p", "q")}
    assert (space.rows >= 0).all()


def test_an_evaluation_looks_up_and_an_empty_cell_fails(tmp_path):
    evaluator = TabularEvaluator(write(tmp_path), cheap=["latency_ms"])
    space = evaluator.space
    full, empty = (space.from_params(p) for p in ({"op": "none", "depth": 2}, {"op": "3", "depth": 2}))
    outcomes = evaluator.evaluate([Request(full), Request(empty)])
    assert outcomes[0].metrics == {"accuracy": 0.2, "latency_ms": 0.6} and not outcomes[0].failure
    assert outcomes[1].failure == "the table has no accuracy"
    assert evaluator.cheap(space.encode_many([full, empty]))["latency_ms"].tolist() == [0.6, 0.7]
    assert evaluator.metrics["latency_ms"].cheap and not evaluator.metrics["accuracy"].cheap
    again = pickle.loads(pickle.dumps(evaluator.spec)).open()
    assert again.evaluate([Request(full)])[0].metrics == outcomes[0].metrics
    only = TabularEvaluator(write(tmp_path), ["latency_ms"])
    assert only.evaluate([Request(empty)])[0].metrics == {"latency_ms": 0.7}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (("conv,5,1", "cnov,5,1"), r"line 3: op is 'cnov'\. Did you mean 'conv'"),
        (("conv,5,1", "conv,five,1"), r"line 3: size is 'five'\. Allowed: a finite number\."),
        (("0.6,1.5", "0.6,nan"), r"line 3: latency_ms is 'nan'"),
        (("0.6,1.5,x", "0.6,1.5"), r"line 3 has 5 cells; the first line has 6"),
        (("accuracy", "acuracy"), r"column 'accuracy' of small\.yaml stands 0 times .*Did you mean 'acuracy'"),
    ],
)
def test_what_is_wrong_in_a_table_is_named(tmp_path, change, match):
    with pytest.raises(ConfigError, match=match):
        Table.load(write(tmp_path, rows=ROWS.replace(*change, 1)))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (("accuracy: max", "accuracy: up"), r"metrics\.accuracy: 'up' is not a direction"),
        (("[conv, none, 3]", "conv"), r"knobs\.op: expected a list of values"),
        (("metrics:", "metrik:"), r"metrics: expected a mapping"),
    ],
)
def test_what_is_wrong_beside_a_table_is_named(tmp_path, change, match):
    with pytest.raises(ConfigError, match=match):
        Table.load(write(tmp_path, ABOUT.replace(*change)))


def test_what_cannot_be_cheap_is_refused(tmp_path):
    path = write(tmp_path)
    with pytest.raises(ConfigError, match="accuracy is empty in some rows"):
        TabularEvaluator(path, cheap=["accuracy"])
    with pytest.raises(ConfigError, match="Did you mean 'latency_ms'"):
        TabularEvaluator(path, cheap=["latency"])
    with pytest.raises(ConfigError, match="cannot be read"):
        Table.load(tmp_path / "other.csv")
