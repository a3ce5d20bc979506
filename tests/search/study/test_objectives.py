from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixnas.search.study.objectives import parse_constraint, parse_constraints, parse_filter, parse_objectives
from mixnas.search_space.errors import ConfigError

KNOWN = ("accuracy", "latency_ms", "params", "macs")
OPERATORS = ("<=", ">=", "<", ">", "==")


def test_objectives_keep_their_order():
    objectives = parse_objectives({"accuracy": "max", "latency_ms": "min"}, known=KNOWN)
    assert [(o.name, o.maximise) for o in objectives] == [("accuracy", True), ("latency_ms", False)]


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        ({"acuracy": "max"}, "Did you mean 'accuracy'?"),
        ({"acuracy": "max"}, "Known: accuracy, latency_ms, macs, params"),
        ({"accuracy": "maximise"}, "Allowed: max, min"),
        ({"accuracy": True}, "Allowed: max, min"),
        ({}, "expected a mapping"),
        (["accuracy"], "expected a mapping"),
    ],
)
def test_wrong_objectives(plain, said):
    with pytest.raises(ConfigError, match="objectives") as error:
        parse_objectives(plain, known=KNOWN)
    assert said in str(error.value)


@given(st.sampled_from(KNOWN), st.sampled_from(OPERATORS), st.floats(-1e12, 1e12), st.floats(-1e12, 1e12))
def test_violation_agrees_with_the_comparison(metric, comparison, bound, value):
    constraint = parse_constraint(f"{metric}{comparison} {bound!r}", known=KNOWN)
    assert constraint.bound == bound
    assert (constraint.violation({metric: value}) <= 0) == constraint.holds({metric: value})


def test_violation_is_a_share_of_the_bound():
    assert parse_constraint("params <= 2e5").violation({"params": 3e5}) == pytest.approx(0.5)
    assert parse_constraint("accuracy >= 0.9").violation({"accuracy": 0.99}) == pytest.approx(-0.1)
    assert parse_constraint("latency_ms < 2").violation({"latency_ms": 2.0}) > 0


@pytest.mark.parametrize(
    "text",
    ["params", "params <=", "<= 3", "params <= x", "params = 3", "params <= 2e5 and macs < 1", "params != 3",
     "__import__('os') < 1", "params <= 1e999", "params <= 2k", "", 3],
)  # fmt: skip
def test_wrong_constraints(text):
    with pytest.raises(ConfigError, match="constraints"):
        parse_constraint(text, known=KNOWN)


@pytest.mark.parametrize(
    "text, bound",
    [("about 1M parameters", 1e6), ("about 2.5k params", 2.5e3), ("about 3e8 macs", 3e8), ("about 40 macs", 40)],
)
def test_about_is_a_tenth_on_either_side(text, bound):
    found = parse_constraints([text, "accuracy > 0.5"], known=KNOWN)
    (metric,) = {c.metric for c in found[:2]}
    assert len(found) == 3 and metric == ("macs" if "macs" in text else "params")
    for share, kept in ((0.89, False), (0.91, True), (1.0, True), (1.09, True), (1.11, False)):
        assert all(c.holds({metric: share * bound}) for c in found[:2]) == kept
    assert parse_constraints([str(c) for c in found]) == found  # as a front keeps them


def test_about_of_the_latency_on_another_device():
    low, high = parse_constraints(["about 2 latency_ms@cpu-some.model-1t"])
    assert (low.metric, low.bound) == ("latency_ms@cpu-some.model-1t", pytest.approx(1.8))
    assert (high.comparison, high.bound) == ("<=", pytest.approx(2.2))


@pytest.mark.parametrize(
    "text",
    [
        "about",
        "about 1M",
        "about parameters",
        "about 0 params",
        "about 1T params",
        "about 1M wheels",
        "about -1 params",
    ],
)
def test_wrong_abouts(text):
    with pytest.raises(ConfigError, match=r"constraints\[0\]"):
        parse_constraints([text], known=KNOWN)


def test_unknown_metric_names_the_nearest():
    with pytest.raises(ConfigError, match=r"Did you mean 'latency_ms'\? Known: accuracy"):
        parse_constraints(["latency_m < 2"], known=KNOWN)
    with pytest.raises(ConfigError, match="stands twice"):
        parse_constraints(["params < 2", "params < 2.0"])
    with pytest.raises(ConfigError, match="expected a list"):
        parse_constraints("params < 2")


def test_filter():
    where = parse_filter("latency_ms<2 and (params<1e4 or accuracy >= .97)", known=KNOWN)
    assert where.holds({"latency_ms": 1, "params": 9e3, "accuracy": 0.5})
    assert where.holds({"latency_ms": 1, "params": 9e5, "accuracy": 0.98})
    assert not where.holds({"latency_ms": 3, "params": 9e3, "accuracy": 0.98})
    assert not where.holds({"params": 9e3, "accuracy": 0.98})
    for text in ("latency_ms<2 and", "and", "(params<1", "params<1)", "params<1 macs<1", "latency<2"):
        with pytest.raises(ConfigError, match="--where"):
            parse_filter(text, known=KNOWN)


_term = st.builds(
    lambda m, c, n: f"{m} {c} {n}", st.sampled_from(KNOWN), st.sampled_from(OPERATORS), st.integers(-3, 3)
)
_joined = st.sampled_from(["and", "or"])
_expression = st.recursive(
    _term, lambda inner: st.builds(lambda a, op, b: f"({a}) {op} ({b})", inner, _joined, inner), max_leaves=6
)


@given(_expression, st.fixed_dictionaries({name: st.integers(-3, 3) for name in KNOWN}))
def test_filter_means_what_python_means(text, metrics):
    assert parse_filter(text, known=KNOWN).holds(metrics) == eval(text, {}, dict(metrics))


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text):
    with contextlib.suppress(ConfigError):
        parse_filter(text, known=KNOWN)
