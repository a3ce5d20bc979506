"""Tables as spaces: what depends on what, what has gaps, what is refused."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from mixnas.evaluators.protocol import Request
from mixnas.evaluators.tabular import Table, TabularEvaluator
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError
from tests.contracts.evaluator import EvaluatorContract

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


class TestTabular(EvaluatorContract):
    steady = frozenset({"accuracy", "latency_ms"})

    @pytest.fixture
    def evaluator(self, tmp_path):
        return TabularEvaluator(write(tmp_path, rows=ROWS.replace("2.0,,", "2.0,0.3,")), cheap=["latency_ms"])

    @pytest.fixture
    def space(self, evaluator):
        return evaluator.space


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


def test_numbers_stay_numbers_where_some_are_absent(tmp_path):
    about = "knobs: {x: [numeric], y: [numeric]}\nmetrics: {loss: min}\n"
    cells = [(x, y) for x in ("", 1, 2.5, 10) for y in ("", 3, 20) if (x, y) != (1, 20)]
    rows = "x,y,loss\n" + "".join(f"{x},{y},{i}\n" for i, (x, y) in enumerate(cells))
    table = Table.load(write(tmp_path, about, rows))
    space = table.space
    assert {v.name: v.values for v in space.variables} == {"x": ("-", 1, 2.5, 10), "y": ("-", 3, 20)}
    found = [space.params_of(space.decode(row)) for row in space.rows]
    assert [(p["x"], p["y"]) for p in found] == [(x or "-", y or "-") for x, y in cells]
    evaluator = TabularEvaluator("", table=table)
    for i, (row, params) in enumerate(zip(space.rows, found, strict=True)):
        architecture = space.from_params(params)
        assert (space.encode(architecture) == row).all()
        assert (space.encode(Architecture.from_canonical(architecture.to_dict())) == row).all()
        assert evaluator.evaluate([Request(architecture)])[0].metrics == {"loss": i}
    # one number is nearer to the next than to being absent, and to another knob's change
    assert space.params_of(space.from_params({"x": 1, "y": 20})) == {"x": 2.5, "y": 20}


def test_a_value_that_looks_like_absence_is_another(tmp_path):
    about = "knobs: {x: ['-', b], y: [c, d]}\nmetrics: {loss: min}\n"
    lines = [f"{x},{y},{i}\n" for i, (x, y) in enumerate((x, y) for x in ("", "-", "b") for y in "cd")]
    table = Table.load(write(tmp_path, about, "x,y,loss\n" + "".join(lines)))
    space = table.space
    assert {v.name: v.values for v in space.variables} == {"x": ("--", "-", "b"), "y": ("c", "d")}
    assert len({a.id for a in space.decode_many(space.rows)}) == 6
    outcomes = TabularEvaluator("", table=table).evaluate([Request(a) for a in space.decode_many(space.rows)])
    assert [outcome.metrics["loss"] for outcome in outcomes] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("held", [True, False], ids=["costs held", "too large to hold"])
def test_the_nearest_row_is_the_nearest_by_the_definition(tmp_path, monkeypatch, held):
    """Each knob counts alike: of numbers the share of their order between two, of all else 1 where they differ."""
    if not held:
        monkeypatch.setattr("mixnas.evaluators.tabular._LARGEST_COSTS", 0)
    rng = np.random.default_rng(0)
    about = "knobs: {a: [p, q, r], b: [numeric], c: [numeric], d: [s, t], e: [numeric]}\nmetrics: {loss: min}\n"
    rows = set()
    for _ in range(40):
        a, d = "pqr"[rng.integers(3)], ["", "s", "t"][rng.integers(3)]
        b = "" if a == "p" else rng.integers(5)  # a decides whether b is there, nothing whether c is
        rows.add((a, b, ["", 1, 2, 4, 8][rng.integers(5)], d, rng.integers(3)))
    text = "a,b,c,d,e,loss\n" + "".join(",".join(map(str, (*row, 0))) + "\n" for row in rows)
    space = Table.load(write(tmp_path, about, text)).space

    def apart(mine, other):
        total = 0.0
        for p, q, v in zip(mine, other, space.variables, strict=True):
            numbers = [i for i, value in enumerate(v.values) if not isinstance(value, str)]
            graded = p in numbers and q in numbers
            total += abs(p - q) / max(len(numbers) - 1, 1) if graded else float(p != q)
        return total

    by_name = {v.name: v for v in space.variables}
    assert [name for name in "abcde" if by_name[name].values[0] == "-"] == ["c", "d"] and by_name["b"].parent >= 0
    missing = 0
    free = rng.integers(0, [len(v.values) for v in space.variables], size=(150, 5))
    vectors = np.where(space.active(free), free, -1)
    assert (space.complete(vectors, rng) == [space.rows[space.row(vector)] for vector in vectors]).all()
    for vector in vectors:
        distances = [apart(vector, row) for row in space.rows]
        missing += min(distances) > 0
        assert distances[space.row(vector)] == pytest.approx(min(distances))
        assert (space.encode(space.decode(vector)) == space.rows[space.row(vector)]).all()
    assert missing > 50
    again = pickle.loads(pickle.dumps(space))
    assert (again.encode_many(space.decode_many(space.rows)) == space.rows).all()


def test_what_one_line_lacks_another_has(tmp_path):
    about = "knobs: {a: [numeric]}\nmetrics: {acc: max, lat: min}\n"
    rows = "a,acc,lat\n1,0.5,1\n1,,3\n2,,2\n2,,4\n3,1e308,1\n3,1.5e308,1\n"
    table = Table.load(write(tmp_path, about, rows))
    assert table.values["acc"].tolist() == pytest.approx([0.5, np.nan, 1.25e308], nan_ok=True)
    assert table.values["lat"].tolist() == [2, 3, 1] and table.lines == 6


@pytest.mark.parametrize(
    ("csv_name", "yaml_name", "given"),
    [
        ("t.csv", "t.yaml", "t"),
        ("T.CSV", "T.yaml", "T.CSV"),
        ("T.CSV", "T.yaml", "T.yaml"),
        ("t.csv", "t.yml", "t.csv"),
        ("t.csv", "t.yml", "t.yml"),
        ("v1.2.csv", "v1.2.yaml", "v1.2"),
    ],
)
def test_a_table_as_spreadsheets_write_it(tmp_path, csv_name, yaml_name, given):
    (tmp_path / yaml_name).write_text(
        "knobs: {x: [p, q], y: [one, three]}\nmetrics: {acc: max}\n".replace("[one", r'["one\r\n\r\ntwo"')
    )
    text = '\ufeffx,y,acc\r\np,"one\r\n\r\ntwo",1\r\n\r\nq,three,2\r\n,,\r\n \r\n'
    (tmp_path / csv_name).write_bytes(text.encode())
    table = Table.load(tmp_path / given)
    assert (table.lines, table.values["acc"].tolist()) == (2, [1, 2])
    assert [table.space.params_of(a) for a in table.space.decode_many(table.space.rows)] == [
        {"x": "p", "y": "one\r\n\r\ntwo"},
        {"x": "q", "y": "three"},
    ]


@pytest.mark.parametrize("given", [".", "..", "/", ""])
def test_a_folder_is_no_table(given):
    with pytest.raises(ConfigError, match=r"is a folder\. Give NAME\.csv"):
        Table.load(given)


def test_a_table_that_is_not_text_is_refused(tmp_path):
    path = write(tmp_path)
    path.write_bytes(ROWS.replace("conv", "c\u00f6nv").encode("latin-1"))
    with pytest.raises(ConfigError, match=r"small\.csv: cannot be read: not UTF-8"):
        Table.load(path)


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
