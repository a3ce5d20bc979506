"""Strategies on a table whose exact front is known."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest

from mixnas.evaluators.tabular import Table
from mixnas.search.benchmarking import Truth, checkpoints, compare, objectives_of
from mixnas.search.strategies import Strategy
from mixnas.search_space.errors import ConfigError
from tests.cli.command import nas


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Three operators at four places; the more of the good one, the slower."""
    folder = tmp_path_factory.mktemp("table")
    lines = ["a,b,c,d,accuracy,latency_ms"]
    for row in itertools.product("xyz", repeat=4):
        worth = [{"x": 0.0, "y": 1.0, "z": 2.5}[op] for op in row]
        accuracy = sum(value * weight for value, weight in zip(worth, (4, 3, 2, 1), strict=True))
        latency = 1 + sum({"x": 0.0, "y": 0.5, "z": 2.0}[op] for op in row)
        lines.append(",".join([*row, f"{accuracy}", f"{latency}"]))
    (folder / "made.csv").write_text("\n".join(lines) + "\n")
    knobs = "{a: [x, y, z], b: [x, y, z], c: [x, y, z], d: [x, y, z]}"
    (folder / "made.yaml").write_text(f"name: made\nknobs: {knobs}\nmetrics: {{accuracy: max, latency_ms: min}}\n")
    return folder / "made.csv"


def test_the_exact_front_and_its_hypervolume(path):
    table = Table.load(path)
    truth = Truth(table, objectives_of(table, None))
    accuracy, latency = table.values["accuracy"], table.values["latency_ms"]
    assert truth.reference == pytest.approx([np.quantile(accuracy, 0.01), 1.05 * np.quantile(latency, 0.99)])
    assert truth.share(np.stack([accuracy, latency], axis=1)) == pytest.approx(1)
    assert truth.share(np.array([[accuracy.min(), latency.max()]])) == 0
    # by the definition: staircases of the best accuracy at each latency
    volume, best = 0.0, truth.reference[0]
    at = [t for t in np.unique(latency) if t < truth.reference[1]]
    for here, following in zip(at, [*at[1:], truth.reference[1]], strict=True):
        best = max(best, accuracy[latency <= here].max())
        volume += (following - here) * (best - truth.reference[0])
    assert truth.volume == pytest.approx(volume)


def test_strategies_side_by_side(path):
    table = Table.load(path)
    strategies = {name: Strategy.from_plain(name, "test") for name in ("predictor", "random", "linas")}
    found = compare(table, objectives_of(table, None), strategies, trials=40, seeds=2, cheap=["latency_ms"])
    assert list(found["strategies"]) == ["predictor", "random", "linas"]
    for one in found["strategies"].values():
        means = [one["share"][str(count)]["mean"] for count in checkpoints(40)]
        assert means == sorted(means) and 0 < means[-1] <= 1 and one["proposal_s"] > 0
    share = {name: one["share"]["40"]["mean"] for name, one in found["strategies"].items()}
    assert share["predictor"] > share["random"] and share["predictor"] > 0.99
    again = compare(table, objectives_of(table, None), {"random": strategies["random"]}, trials=40, seeds=2)
    assert again["strategies"]["random"]["share"] == found["strategies"]["random"]["share"]


def test_a_table_that_is_smaller_than_the_trials_is_searched_to_its_end(path):
    table = Table.load(path)
    found = compare(table, objectives_of(table, None), {"tpe": Strategy.from_plain("tpe", "")}, trials=81, seeds=1)
    assert found["strategies"]["tpe"]["share"]["81"]["mean"] == pytest.approx(1)


def test_the_command(path):
    words = ("bench", "table", path, "--strategies", "random, {name: nsga2, population_size: 6}", "--seeds", 2)
    answer = nas(*words, "--trials", 30, "--json", "--quiet")
    assert answer.returncode == 0 and answer.stderr == ""
    found = json.loads(answer.stdout)
    assert set(found["strategies"]) == {"random", "nsga2 population_size=6"}
    assert set(found["strategies"]["random"]["share"]) == {"25", "30"}
    assert set(found["strategies"]["random"]["share"]["25"]) == {"mean", "sd"}
    answer = nas(*words, "--trials", 26)
    assert "reference point: accuracy" in answer.stdout and "nsga2 population_size=6" in answer.stdout
    assert "seed 1" in answer.stderr


def test_lines_that_are_no_row_of_their_own_are_told(path, tmp_path):
    first, *lines = path.read_text().splitlines()
    without = [line.rsplit(",", 1)[0] + "," for line in lines[:2]]
    (tmp_path / "some.csv").write_text("\n".join([first, *without, *lines[2:], *lines[-3:]]) + "\n")
    (tmp_path / "some.yaml").write_text(path.with_suffix(".yaml").read_text())
    words = ("bench", "table", tmp_path / "some.csv", "--strategies", "random", "--seeds", 1, "--trials", 5)
    found = json.loads(nas(*words, "--json").stdout)
    assert (found["lines"], found["rows"], found["empty"]) == (84, 81, 2)
    said = nas(*words).stdout
    assert "made: 81 architectures, the means of 84 lines" in said and "2 of them lack a metric" in said
    assert "lines" not in nas("bench", "table", path, *words[3:]).stdout


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--objectives", "accurracy"], "Did you mean 'accuracy'"),
        (["--objectives", "accuracy,accuracy"], "stands twice"),
        (["--cheap", "latency"], "Did you mean 'latency_ms'"),
        (["--strategies", "nsga22"], "Did you mean 'nsga2'"),
        (["--trials", "0"], "--trials: 0 is not allowed"),
        (["--seeds", "0"], "--seeds: 0 is not allowed"),
        (["--strategies", "{name: random, size: 3}"], "size: unknown key 'size'. Allowed: none; it has no options."),
    ],
)
def test_what_is_wrong_is_refused(path, words, match):
    answer = nas("bench", "table", path, *words)
    assert answer.returncode == 2 and match in answer.stderr and answer.stdout == ""


def write(folder, lines, about):
    (folder / "some.csv").write_text("\n".join(lines) + "\n")
    (folder / "some.yaml").write_text(about)
    return Table.load(folder / "some.csv")


EVERY = ("predictor", "linas", "nsga2", "nsga3", "tpe", "random", "gp", "auto")


@pytest.mark.parametrize("name", EVERY)
def test_rows_with_gaps_are_searched_to_the_end_by_every_strategy(tmp_path, name):
    """Knobs that are absent in places, one of them with a value "-"; five of six evaluations fail."""
    rows = itertools.product(["", 1, 5, 20], ["", "-", "b"])
    worth = {0: "0.1,3", 5: "0.9,2"}
    lines = ["x,y,acc,lat", *(f"{x},{y},{worth.get(i, ',1')}" for i, (x, y) in enumerate(rows))]
    table = write(tmp_path, lines, "knobs: {x: [numeric], y: ['-', b]}\nmetrics: {acc: max, lat: min}\n")
    strategies = {name: Strategy.from_plain(name, "test")}
    for seeds in (1, 2):
        found = compare(table, objectives_of(table, None), strategies, trials=12, seeds=seeds)
        assert found["strategies"][name]["share"]["12"] == {"mean": pytest.approx(1), "sd": pytest.approx(0)}
        assert (found["rows"], found["empty"]) == (12, 10)


def test_a_metric_that_no_row_has_is_refused(tmp_path):
    about = "knobs: {x: [numeric]}\nmetrics: {acc: max, lat: min}\n"
    table = write(tmp_path, ["x,acc,lat", "1,,1", "2,,2", "3,,3"], about)
    with pytest.raises(ConfigError, match="some: no row has all of acc, lat"):
        Truth(table, objectives_of(table, None))
    assert Truth(table, objectives_of(table, ["lat"])).front == 1


@pytest.mark.parametrize("exponent", [700, -700, 1020])
@pytest.mark.parametrize("names", [("accuracy", "latency_ms"), ("latency_ms",)])
def test_a_share_is_the_same_in_any_unit(path, exponent, names):
    table = Table.load(path)
    truth = Truth(table, objectives_of(table, names))
    # of two metrics 2^700 is too large a factor for their product; 2^1020 for the difference of two values
    columns = {m: np.ldexp(v, exponent - (6 if m == "accuracy" else 5)) for m, v in table.values.items()}
    other = Truth(dataclasses.replace(table, values=columns), truth.objectives)
    assert other.reference.tolist() == [
        np.ldexp(r, exponent - (6 if n == "accuracy" else 5)) for n, r in zip(names, truth.reference, strict=True)
    ]
    rows = np.random.default_rng(0).permutation(table.space.size())
    for count in (1, 5, 20, len(rows)):
        mine, scaled = (np.stack([v[n][rows[:count]] for n in names], axis=1) for v in (table.values, columns))
        assert other.share(scaled) == truth.share(mine) <= 1
    assert truth.share(mine) == 1
    assert (other.volume is None) == (len(names) == 2)


def test_a_table_of_huge_numbers_is_printed_and_written(path, tmp_path):
    first, *lines = path.read_text().splitlines()
    cells = [line.split(",") for line in lines]
    huge = [",".join([*c[:4], f"{float(c[4]) * 1e200 - 2e199}", f"{float(c[5]) * 1e200}"]) for c in cells]
    (tmp_path / "huge.csv").write_text("\n".join([first, *huge]) + "\n")
    (tmp_path / "huge.yaml").write_text(path.with_suffix(".yaml").read_text())
    words = ("--strategies", "random,nsga2", "--seeds", 1, "--trials", 30)
    mine, other = (json.loads(nas("bench", "table", p, *words, "--json").stdout) for p in (path, tmp_path / "huge.csv"))
    assert other["hypervolume"] is None and mine["hypervolume"] > 0
    assert other["reference"]["latency_ms"] == pytest.approx(1e200 * mine["reference"]["latency_ms"])
    for name in ("random", "nsga2"):
        assert other["strategies"][name]["share"]["30"]["mean"] == pytest.approx(
            mine["strategies"][name]["share"]["30"]["mean"]
        )
    said = nas("bench", "table", tmp_path / "huge.csv", *words).stdout
    assert f"latency_ms {other['reference']['latency_ms']:.4g}" in said and max(map(len, said.splitlines())) < 120


def test_a_reference_point_that_is_no_number_is_refused(tmp_path):
    about = "knobs: {x: [numeric]}\nmetrics: {acc: max, lat: min}\n"
    table = write(tmp_path, ["x,acc,lat", "1,1,1.75e308", "2,2,1.76e308", "3,3,1.77e308"], about)
    with pytest.raises(ConfigError, match="acc, lat is too large"):
        Truth(table, objectives_of(table, None))


def test_what_is_cheap_need_not_be_an_objective(path):
    table = Table.load(path)
    strategies = {name: Strategy.from_plain(name, "test") for name in ("predictor", "linas")}
    found = compare(table, objectives_of(table, ["accuracy"]), strategies, trials=30, seeds=1, cheap=["latency_ms"])
    assert found["cheap"] == ["latency_ms"] and found["strategies"]["predictor"]["share"]["30"]["mean"] > 0.9


def test_a_metric_with_a_comma_in_its_name(tmp_path):
    lines = ['x,"acc,top",lat', "1,0.5,1", "2,0.6,2", "3,0.7,1.5"]
    write(tmp_path, lines, "knobs: {x: [numeric]}\nmetrics: {'acc,top': max, lat: min}\n")
    words = ("bench", "table", tmp_path / "some.csv", "--strategies", "random", "--seeds", 1, "--trials", 3, "--json")
    found = json.loads(nas(*words, "--objectives", 'lat, "acc,top"').stdout)
    assert found["objectives"] == {"lat": "min", "acc,top": "max"}
    answer = nas(*words, "--objectives", "acc,top")
    assert answer.returncode == 2 and "no metric 'acc'" in answer.stderr


def test_a_metric_that_no_table_has(path):
    with pytest.raises(ConfigError, match="It has: accuracy, latency_ms"):
        objectives_of(Table.load(path), ["x"])
